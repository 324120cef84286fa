"""`moa import`: an official checkpoint becomes an adapter folder of PEFT."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from moa_peft.data.base_loading import empty_model, find_base
from moa_peft.errors import UsageError, unknown
from moa_peft.mixture.block_hooks import mixture_layers
from moa_peft.mixture.config import RouterConfig
from moa_peft.mixture.experts.lora import PROJECTIONS
from moa_peft.mixture.peft_config import MoAConfig
from moa_peft.official.adapter_folder import adapter_folder, check_folder
from moa_peft.official.checkpoint import OfficialCheckpoint, checkpoint_files, read_checkpoint
from moa_peft.official.conversion import (
    DEFAULT_ORDER,
    OfficialSettings,
    load_weights,
    placed_weights,
    read_config,
)
from moa_peft.official.names import KIND_GATES, Destination

FORK_ALPHA = 8.0
"""LoRA's alpha, hard-coded in the transformers fork beside rank 8."""
FORK_RANK = 8
"""The rank that the fork's alpha goes with."""
FORK_THRESHOLD = 0.5
"""Gamma_max, hard-coded in the transformers fork."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportFlags:
    """What the user says of a checkpoint; None where nothing is said."""

    alpha: float | None = None
    """LoRA's alpha."""
    top_k: int | None = None
    """Experts that a top-k router keeps."""
    max_threshold: float | None = None
    """Gamma_max of a learned threshold."""
    constant_threshold: float | None = None
    """The constant threshold of a Sparse MoA without a learned one."""
    instance_level: bool = False
    """Whether the gates are those of the official instance-level code."""
    expert_order: tuple[str, ...] | None = None
    """The gate columns in order, as "q_proj" or "prompt"."""
    balance: float | None = None
    """Coefficient of the balance loss, for further training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What an import did."""

    adapter: str
    """The folder that was written."""
    base_model: str
    """The base model, as it was named."""
    layout: str
    """"native" or "fork"."""
    method: str
    """The method that was recognised, by its preset's name."""
    num_parameters: int
    """Entries of all imported weights."""
    num_weights: int
    """Imported weights."""
    dtype: str
    """The dtype in which they are stored."""
    blocks: tuple[int, ...]
    """Decoder blocks with experts."""
    num_blocks: int
    """Decoder blocks of the base model."""
    permuted: tuple[str, ...]
    """Experts whose rows were brought from interleaved rotary pairs to halves."""
    defaults: dict[str, float]
    """Settings that were not given and are hard-coded in the fork."""
    num_base_weights: int
    """Weights of the base model that lay in the checkpoint and were left out."""
    num_idle_weights: int
    """Weights of routers of blocks without an expert, left out."""
    doubts: tuple[str, ...]
    """What the weights cannot tell and was taken for granted, a sentence each."""


def import_checkpoint(
    checkpoint: Path, base: str, out: Path, flags: ImportFlags, *, overwrite: bool = False
) -> ImportReport:
    """Turn an official checkpoint into an adapter folder.

    The base model is built without its weights, to see that sizes and names fit.

    Args:
        checkpoint: What `read_checkpoint` reads.
        base: The base model: a folder, a name on the hub, or "smollm2".
        out: The folder to write.
        flags: What the weights do not tell.
        overwrite: Whether an adapter in ``out`` may be replaced.

    Returns:
        What was done.

    Raises:
        UsageError: If a setting is needed and not given or contradicts the weights, or a weight cannot be placed.
    """
    check_folder(out, overwrite=overwrite)
    checkpoint_files(checkpoint)  # a wrong path is said before the base is looked for on the hub
    model = empty_model(find_base(base))
    found = read_checkpoint(checkpoint, frozenset(model.state_dict()))
    num_blocks = model.config.get_text_config().num_hidden_layers
    placed = placed_weights(found.weights, head_size(model.config))
    settings, defaults = _settings(found, flags, model, placed)
    blocks = _blocks(placed, num_blocks, base)
    config = read_config(found.weights, settings)
    config.layers_to_transform = None if len(blocks) == num_blocks else list(blocks)
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    for _, layer in mixture_layers(wrapped):
        layer.moa_mixture.to_empty(device="cpu").to(found.dtype)
    load_weights(wrapped, found.weights, settings.head_size)
    with adapter_folder(out, overwrite=overwrite) as draft:
        wrapped.save_pretrained(str(draft), save_embedding_layers=False)
    method = method_of(config)
    permuted = {
        one.parameter.split(".")[1] for name, one in placed.items() if _moves(found.weights[name], one)
    }
    return ImportReport(
        adapter=str(out),
        base_model=base,
        layout=found.layout,
        method=method,
        num_parameters=sum(one.numel() for one in found.weights.values()),
        num_weights=len(found.weights),
        dtype=str(found.dtype).removeprefix("torch."),
        blocks=blocks,
        num_blocks=num_blocks,
        permuted=tuple(sorted(permuted)),
        defaults=defaults,
        num_base_weights=len(found.base_weights),
        num_idle_weights=len(found.idle_weights),
        doubts=_doubts(method, flags),
    )


def expert_order(text: str) -> tuple[str, ...]:
    """Read the gate columns' names off a flag.

    Args:
        text: Names with commas between: projections, "prompt" and "parallel_adapter".

    Returns:
        The names of experts in a mixture.

    Raises:
        UsageError: If a name is unknown or given twice.
    """
    names = [one.strip() for one in text.split(",") if one.strip()]
    known = {**{one: f"lora_{one}" for one in PROJECTIONS}, **{one: one for one in DEFAULT_ORDER}}
    for one in names:
        if one not in known:
            raise UsageError(f"--expert-order: {unknown('expert', one, known)}")
    order = tuple(known[one] for one in names)
    if len(set(order)) < len(order):
        raise UsageError(f"--expert-order names an expert twice: {text}")
    return order


def head_size(config: Any) -> int:
    """The size of a head of a model, from its transformers config."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def method_of(config: MoAConfig) -> str:
    """Name the method that a config stands for, as `moa methods` does; "mixture" where it is none of them.

    Args:
        config: A mixture's config.
    """
    router = config.parts().router
    kinds = {one.kind for one in config.parts().experts}
    copies = {one.copies() for one in config.parts().experts}
    if router is None:
        return _routerless_method(
            kinds, copies, any(getattr(one, "shared", False) for one in config.parts().experts)
        )
    if router.gate != "sigmoid" or not kinds <= {"lora", "prompt", "parallel_adapter"}:
        return "mixture"
    if router.gate_of == "kind":
        return "unipeft"
    if router.threshold is not None:
        return "sparse-moa"
    if router.granularity == "instance":
        return "instance-moa"
    return "soft-moa" if all(number == 1 for number, _ in copies) else "soft-moa-hydra"


def _routerless_method(kinds: set[str], copies: set[tuple[int, RouterConfig | None]], shared: bool) -> str:
    if len(kinds) > 1:
        return "mixture"
    if kinds != {"lora"}:
        return {"parallel_adapter": "parallel-adapter", "prompt": "prompt-tuning"}.get(kinds.pop(), "mixture")
    gates = {router.gate for _, router in copies if router is not None}
    if len(gates) > 1:
        return "mixture"
    if not gates:
        return "lora"
    names = {"softmax": "hydralora" if shared else "molora", "top-k": "topk-moe-lora", "threshold": "adamole"}
    return names.get(gates.pop(), "mixture")


def _settings(
    found: OfficialCheckpoint, flags: ImportFlags, model: Any, placed: Mapping[str, Destination]
) -> tuple[OfficialSettings, dict[str, float]]:
    """Join what the flags say with what the fork hard-codes, and report all that is missing or contradicts at once."""
    parameters = {one.parameter for one in placed.values()}
    ranks = {found.weights[name].shape[0] for name, one in placed.items() if one.parameter.endswith(".A")}
    needs_alpha, needs_k = bool(ranks), any(".router.topkroute_linear." in name for name in found.weights)
    learned = "router.gate.threshold_weight" in parameters
    of_kinds = any(name.rpartition(".")[0].endswith(tuple(KIND_GATES)) for name in found.weights)
    has_router = any(one.startswith("router.logits.") for one in parameters) and not of_kinds
    has_balance = needs_k or any(
        one.startswith("copy_routers.") and ".gate.threshold_" in one for one in parameters
    )
    no_router = (
        "UniPEFT's gates are of a whole instance already, without a threshold"
        if of_kinds
        else "the checkpoint has no router of its blocks"
    )
    defaults: dict[str, float] = {}
    alpha, threshold = flags.alpha, flags.max_threshold
    if found.layout == "fork":
        if needs_alpha and alpha is None and ranks == {FORK_RANK}:
            alpha = defaults["alpha"] = FORK_ALPHA
        if learned and threshold is None:
            threshold = defaults["max_threshold"] = FORK_THRESHOLD
    wrong: list[str] = []
    if needs_alpha and alpha is None:
        sizes = ", ".join(str(one) for one in sorted(ranks))
        usual = "--alpha 8" if ranks == {FORK_RANK} else "the rank itself in the paper's set-up"
        wrong.append(
            f"give --alpha, which the weights do not tell (LoRA of rank {sizes} is scaled by alpha / rank; the usual "
            f"official value is {usual}; see lora_alpha of the training's arguments)"
        )
    if needs_k and flags.top_k is None:
        wrong.append(
            "give --top-k, the experts that each top-k router keeps (the usual official value is --top-k 2)"
        )
    if learned and threshold is None:
        wrong.append(
            "give --max-threshold, the upper bound of the learned threshold (the usual official value is "
            "--max-threshold 0.5)"
        )
    wrong += [
        f"{flag} is given: leave it out, {why}"
        for flag, given, fits, why in (
            ("--alpha", flags.alpha is not None, needs_alpha, "the checkpoint has no LoRA"),
            ("--top-k", flags.top_k is not None, needs_k, "the checkpoint has no top-k router"),
            (
                "--max-threshold",
                flags.max_threshold is not None,
                learned,
                "the checkpoint has no learned threshold",
            ),
            (
                "--constant-threshold",
                flags.constant_threshold is not None,
                has_router and not learned,
                "the checkpoint has a learned threshold" if learned else no_router,
            ),
            ("--instance-level", flags.instance_level, has_router, no_router),
            (
                "--balance",
                flags.balance is not None,
                has_balance,
                "no router of the checkpoint has a balance loss (those of top-k and AdaMoLE have)",
            ),
        )
        if given and not fits
    ]
    if wrong:
        raise UsageError("; ".join(wrong))
    settings = OfficialSettings(
        alpha=FORK_ALPHA if alpha is None else alpha,
        head_size=head_size(model.config),
        expert_order=flags.expert_order or DEFAULT_ORDER,
        max_threshold=threshold,
        constant_threshold=flags.constant_threshold,
        keep=flags.top_k,
        instance_level=flags.instance_level,
        balance=flags.balance,
    )
    return settings, defaults


def _blocks(placed: Mapping[str, Destination], num_blocks: int, base: str) -> tuple[int, ...]:
    blocks = tuple(sorted({one.block for one in placed.values()}))
    if blocks[-1] >= num_blocks:
        raise UsageError(
            f"the checkpoint has weights of block {blocks[-1]}, the base model {base!r} has blocks 0 to "
            f"{num_blocks - 1}: the checkpoint was made on another base model"
        )
    return blocks


def _moves(weight: Tensor, one: Destination) -> bool:
    """Whether a weight's rows change their order on the way."""
    rows = torch.arange(weight.shape[0]).unsqueeze(1) if one.parameter.endswith(".B") else None
    return rows is not None and not torch.equal(one.transform(rows), rows)


def _doubts(method: str, flags: ImportFlags) -> tuple[str, ...]:
    """What another official method with the same weights would need; the weights cannot tell."""
    if method != "soft-moa" or flags.instance_level:
        return ()
    taken = "taken as Soft MoA with gates for each token"
    others = "a Sparse MoA with a constant threshold and the instance-level code"
    return (f"{taken}: {others} have the same weights (--constant-threshold 0.5, --instance-level)",)
