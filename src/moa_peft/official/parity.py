"""Reference parity: rebuilds the model of a reference file and compares its numbers with ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from moa_peft.errors import UsageError, first_line
from moa_peft.mixture.balance_scaling import set_loss_scale
from moa_peft.mixture.block_hooks import GateRecord, mixture_layers
from moa_peft.official.conversion import load_weights, parameters_by_place, placed_weights, read_config
from moa_peft.official.names import destinations
from moa_peft.official.reference import Reference, read_reference

LIMIT = 1e-4
"""Largest allowed error: absolute on logits and loss, relative to the largest entry on each gradient (float32)."""
ROUNDING = 4
"""How many times as far as rounding moves a tensor here the reference's own may have moved it."""
ROUNDING_LIMIT = 2e-3
"""Largest error that rounding can excuse, in the terms of `LIMIT`."""
VANISHING = torch.finfo(torch.float32).eps
"""Share of the file's largest gradient below which an error in a gradient is nothing: its terms may have cancelled."""

_OF_A_MALFORMED_FILE = (
    LookupError,
    ArithmeticError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    StrictDataclassError,
)

Values = dict[tuple[str, str], Tensor]
"""What is compared, by quantity and name: "gradient" has one for each weight, the others are called ""."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a reference file says against what we compute."""

    name: str
    """The file's name."""
    errors: dict[str, float]
    """Largest absolute error by quantity; for "gradient" relative to the largest entry of each."""
    rule: str = "float32"
    """What decided: "float32" or "float64", in which we computed, or "rounding"."""
    ok: bool
    """Whether every error is within what the rule allows; a NaN is not."""

    def line(self) -> str:
        """One line for a person."""
        figures = "  ".join(f"{what} {error:.1e}" for what, error in self.errors.items())
        rule = "" if self.rule == "float32" else f"  ({self.rule})"
        return f"{self.name}  {figures}{rule}  {'ok' if self.ok else 'FAIL'}"


def compare(path: Path) -> Comparison:
    """Compare one reference file (*.safetensors).

    The reference is float32, with rounding errors of its own. It holds by the first of these rules that is met:

    1. every error is within `LIMIT`, our side in float32;
    2. each is within it in float32 or in float64;
    3. each that is beyond it in both is at most `ROUNDING` times what rounding to float32 moves the same tensor here, and at
       most `ROUNDING_LIMIT`.

    Raises:
        UsageError: If the file is missing or no sound reference file, or its model or method cannot be built here.
    """
    threads = torch.get_num_threads()
    # sums in one order, so that the same file gives the same errors on every machine
    torch.set_num_threads(1)
    try:
        return _compare(read_reference(path))
    except UsageError as error:
        raise UsageError(f"{path} cannot be compared: {error}") from error
    except _OF_A_MALFORMED_FILE as error:
        raise UsageError(f"{path} cannot be compared: {type(error).__name__}: {first_line(error)}") from error
    finally:
        torch.set_num_threads(threads)


def base_model(reference: Reference) -> PreTrainedModel:
    """Build the frozen model of a reference file, in float32.

    Raises:
        UsageError: If its weights are not those of the model that its config makes.
    """
    config = AutoConfig.for_model(reference.architecture, **reference.config)
    with torch.device("meta"):  # nothing is allocated before the sizes are known to be right
        shapes = {name: one.shape for name, one in _from_config(config).state_dict().items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wrong = [f"'base.{name}' is missing" for name in shapes.keys() - reference.base.keys() - tied]
    wrong += [f"'base.{name}' is no weight of the model" for name in reference.base.keys() - shapes.keys()]
    wrong += [
        f"'base.{name}' is {list(one.shape)}, the config makes it {list(shapes[name])}"
        for name, one in reference.base.items()
        if name in shapes and one.shape != shapes[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(f"{'; '.join(sorted(wrong)[:3])}{more}")
    model = _from_config(config)
    model.load_state_dict(dict(reference.base), strict=False)
    return model


def _from_config(config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def _compare(reference: Reference) -> Comparison:
    single = _ours(reference, torch.float32)
    theirs = _theirs(reference)
    tiny = torch.finfo(torch.float32).tiny
    scales = {key: max(_largest(one), tiny) if key[0] == "gradient" else 1.0 for key, one in theirs.items()}
    errors = _errors(single, theirs, scales)
    if all(error <= LIMIT for error in errors.values()):
        return _comparison(reference, errors, "float32", ok=True)
    double = _ours(reference, torch.float64)
    exact = _errors(double, theirs, scales)
    # float64 leaves something of a gradient that is 0 in float32, as of a saturated router: what held there still holds
    exact = {key: error if error <= LIMIT else min(error, errors[key]) for key, error in exact.items()}
    if all(error <= LIMIT for error in exact.values()):
        return _comparison(reference, exact, "float64", ok=True)
    draws = [single, *(_ours(reference, torch.float32, draw=draw) for draw in (1, 2, 3))]
    rounding = [_errors(one, double, scales) for one in draws]
    floor = VANISHING * max((scale for (what, _), scale in scales.items() if what == "gradient"), default=0.0)
    excused = all(
        error <= LIMIT
        or (key[0] != "greedy" and error <= min(ROUNDING * max(one[key] for one in rounding), ROUNDING_LIMIT))
        or (key[0] == "gradient" and error <= floor / scales[key])
        for key, error in exact.items()
    )
    if excused:
        return _comparison(reference, exact, "rounding", ok=True)
    return _comparison(reference, errors, "float32", ok=False)


def _comparison(
    reference: Reference, errors: Mapping[tuple[str, str], float], rule: str, *, ok: bool
) -> Comparison:
    worst: dict[str, float] = {}
    for (what, _), error in errors.items():
        worst[what] = error if error != error else max(worst.get(what, 0.0), error)  # a NaN stays
    return Comparison(name=reference.path.name, errors=worst, rule=rule, ok=ok)


def _theirs(reference: Reference) -> Values:
    tensors = reference.tensors
    values: Values = {("logits", ""): tensors["logits"], ("loss", ""): tensors["loss"]}
    if "load_balancing_loss" in tensors:
        values["balance loss", ""] = tensors["load_balancing_loss"]
    placed = destinations(reference.adapter, reference.head_size)
    for name, one in reference.gradients.items():
        values["gradient", name] = placed[name].transform(one) if name in placed else one
    if "greedy" in tensors:
        values["greedy", ""] = tensors["greedy"]
    return values


def _errors(
    ours: Values, theirs: Values, scales: Mapping[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    """The largest error of each; for "greedy" the number of tokens that differ."""
    return {
        key: float((one != theirs[key]).sum())
        if key[0] == "greedy"
        else _largest(one.double() - theirs[key].double()) / scales[key]
        for key, one in ours.items()
    }


def _ours(reference: Reference, dtype: torch.dtype, draw: int = 0) -> Values:
    """Compute all that a reference file compares.

    With a ``draw`` above 0, every weight is moved at random by at most its last bit in float32, another way for each
    number: a computation that is as right as the one with 0, and rounds otherwise.
    """
    model = _rebuild(reference).to(dtype)
    if draw:
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for one in model.parameters():
                width = torch.finfo(torch.float32).eps
                one.mul_(1 + width * (2 * torch.rand(one.shape, generator=generator, dtype=dtype) - 1))
    values = _forward(model, reference)
    if reference.gradients:
        values |= _gradients(model, reference)
    if "greedy" in reference.tensors:
        values["greedy", ""] = _greedy(model, reference)
    return values


def _rebuild(reference: Reference) -> PeftModel:
    base = base_model(reference)
    torch.manual_seed(0)
    placed = placed_weights(reference.adapter, reference.head_size)
    config = read_config(reference.adapter, placed, reference.settings)
    blocks = {one.block for one in placed.values()}
    if len(blocks) < base.config.num_hidden_layers:
        config.layers_to_transform = sorted(blocks)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    load_weights(model, reference.adapter, placed)
    set_loss_scale(model, 1.0 if reference.coefficient else 0.0)
    return model


def _forward(model: PeftModel, reference: Reference) -> Values:
    """Run forward and backward in training mode, as the references were made; gradients stay on the parameters."""
    balance = torch.zeros(())

    def add_up(record: GateRecord) -> None:
        nonlocal balance
        balance = balance if record.balance_loss is None else balance + record.balance_loss

    for _, layer in mixture_layers(model):
        layer.observer = add_up
    model.train()
    tensors = reference.tensors
    output = model(input_ids=tensors["input_ids"], labels=tensors["labels"])
    output.loss.backward()
    values: Values = {("logits", ""): output.logits.detach(), ("loss", ""): output.loss.detach()}
    if "load_balancing_loss" in tensors:
        values["balance loss", ""] = balance
    return values


def _gradients(model: PeftModel, reference: Reference) -> Values:
    """The gradient of every official weight in our layout; zeros where there is none, as for a weight that gates nothing."""
    parameters = parameters_by_place(model)
    placed = destinations(reference.adapter, reference.head_size)
    values: Values = {}
    for name, theirs in reference.gradients.items():
        one = placed.get(name)
        whole = None if one is None else parameters[one.block, one.parameter].grad
        values["gradient", name] = (
            torch.zeros_like(theirs if one is None else one.transform(theirs))
            if one is None or whole is None
            else one.view(whole)
        )
    return values


def _greedy(model: PeftModel, reference: Reference) -> Tensor:
    """Continue greedily with a cache, whatever token comes: the model's config names none that ends a text."""
    greedy = reference.tensors["greedy"]
    prompt_ids = reference.tensors["input_ids"][:, : reference.prompt]
    settings = GenerationConfig(
        max_new_tokens=greedy.shape[1] - reference.prompt, do_sample=False, use_cache=True
    )
    model.eval()
    return model.generate(
        input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=settings
    )


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()
