"""A batch whose rows go through different adapters gives each row what its adapter gives alone."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from moa_peft import MoAConfig, mixture_layers, packed_weights
from moa_peft.errors import UsageError
from tiny import FAMILIES, METHODS, awaken, base_model, cached, mixture_model, tokens

ADAPTERS = ("soft-moa", "everything", "instance-kinds", "extra-kinds")
"""Prompt experts in some, copies of the gates for whole instances in one, experts that are no bottlenecks in another."""
NAMES = ["soft-moa", "__base__", "everything", "instance-kinds", "soft-moa", "extra-kinds", "__base__"]


def several(family: str = "llama") -> PeftModel:
    """One model with all adapters, each with weights of its own."""
    model = get_peft_model(base_model(family), METHODS[ADAPTERS[0]](FAMILIES[family]), ADAPTERS[0])
    for seed, name in enumerate(ADAPTERS):
        if seed:
            model.add_adapter(name, METHODS[name](FAMILIES[family]))
        model.set_adapter(name)
        awaken(model, seed)
    assert isinstance(model, PeftModel)
    return model.eval()


def prompts(rows: int = len(NAMES)) -> dict[str, Tensor]:
    """Rows of several lengths, padded at the left."""
    ids, mask = tokens(rows, 9), torch.ones(rows, 9, dtype=torch.long)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: PeftModel, name: str, row: int, **generate: Any) -> Tensor:
    """What one row gives through its adapter: logits, or the tokens that `generate` makes of it."""
    inputs = {key: one[row : row + 1] for key, one in prompts().items()}
    run = model.generate if generate else (lambda **call: model(**call).logits)
    if name == "__base__":
        with model.disable_adapter():
            return run(**inputs, **generate)
    model.set_adapter(name)
    return run(**inputs, **generate)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@torch.no_grad()
def test_each_row_has_the_logits_of_its_adapter_alone(family: str) -> None:
    model = several(family)
    together = model(**prompts(), adapter_names=NAMES).logits
    real = prompts()["attention_mask"].bool()
    for row, name in enumerate(NAMES):
        found = alone(model, name, row)[0][real[row]]
        assert (together[row][real[row]] - found).abs().max() <= 1e-5 * found.abs().max(), name


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_each_row_has_the_tokens_of_its_adapter_alone(settings: dict[str, int]) -> None:
    model = several()
    settings |= {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**prompts(), adapter_names=NAMES, **settings)
    answers = settings.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        assert torch.equal(
            together[row * answers : (row + 1) * answers], alone(model, name, row, **settings)
        ), name


@torch.no_grad()
def test_a_call_on_the_cache_of_other_rows_is_refused_where_gates_are_kept_with_it() -> None:
    model = several()
    inputs = prompts(2)
    past = cached(model(**inputs, use_cache=True, adapter_names=["instance-kinds", "__base__"]))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    for names in (["__base__", "instance-kinds"], ["instance-kinds", "instance-kinds"]):
        with pytest.raises(UsageError, match="no instance gates of this adapter"):
            model(inputs["input_ids"][:, :1], attention_mask=mask, **past, adapter_names=names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"], "1 names for 2 rows"),
        (["default"] * 4, "4 names for 2 rows"),
        (["default", "other"], "unknown adapter 'other'"),
        ("default", "give a list"),
        ([], "give a list"),
    ],
)
def test_wrong_names_are_refused(names: Any, message: str) -> None:
    model = mixture_model("llama", "lora")
    for run in (model, model.generate):
        with pytest.raises(UsageError, match=message):
            run(input_ids=tokens(2, 3), adapter_names=names)
    assert model(tokens(2, 3)).logits.isfinite().all()


def test_what_is_of_whole_batches_is_refused() -> None:
    model = mixture_model("llama", "lora")
    mixture_layers(model)[1][1].change_observer = lambda record: None
    with pytest.raises(UsageError, match="cannot go with observers"):
        model(tokens(1, 3), adapter_names=["default"])
    with pytest.raises(UsageError, match="is for evaluation mode"):
        model.train()(tokens(1, 3), adapter_names=["default"])
    saved = get_peft_model(base_model("llama"), MoAConfig.preset("lora", modules_to_save=["lm_head"])).eval()
    with pytest.raises(UsageError, match="cannot go with modules_to_save"):
        saved(tokens(1, 3), adapter_names=["default"])


def hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.slow
@torch.no_grad()
def test_an_adapter_is_replaced_in_a_running_model_without_a_trace(tmp_path: Path) -> None:
    expected: list[Tensor] = []
    made = mixture_model("llama", "lora")
    for seed, method in enumerate(("everything", "instance-kinds")):
        made = get_peft_model(base_model("llama", num_hidden_layers=1), METHODS[method](FAMILIES["llama"]))
        awaken(made, seed)
        made.save_pretrained(str(tmp_path / str(seed)))
        expected.append(made.eval()(tokens(2, 5)).logits)
    counts: list[tuple[int, int]] = []
    with packed_weights(made):
        for swap in range(100):
            made.delete_adapter("default")
            made.load_adapter(str(tmp_path / str(swap % 2)), "default")
            made.set_adapter("default")
            assert torch.equal(made(tokens(2, 5)).logits, expected[swap % 2])
            if swap in (10, 11, 98, 99):
                gc.collect()
                counts.append((hooks(made), sum(issubclass(type(one), Tensor) for one in gc.get_objects())))
    assert counts[:2] == counts[2:]
