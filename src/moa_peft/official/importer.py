"""`moa import`: an official checkpoint becomes an adapter folder of PEFT."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from moa_peft.data.base_loading import empty_model, find_base
from moa_peft.errors import UsageError
from moa_peft.mixture.block_hooks import mixture_layers
from moa_peft.official.adapter_folder import adapter_folder, check_folder
from moa_peft.official.checkpoint import OfficialCheckpoint, checkpoint_files, read_checkpoint
from moa_peft.official.conversion import (
    OfficialSettings,
    head_size,
    load_weights,
    placed_weights,
    read_config,
)
from moa_peft.official.names import Destination, has_kind_gates
from moa_peft.official.official_code import FORK_CONSTANTS, method_of

_LEARNED = "router.gate.threshold_weight"


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
    checkpoint: Path,
    base: str,
    out: Path,
    settings: OfficialSettings,
    *,
    init_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Turn an official checkpoint into an adapter folder.

    The base model is built without its weights, to see that sizes and names fit.

    Args:
        checkpoint: What `read_checkpoint` reads.
        base: The base model: a folder, a name on the hub, or "smollm2".
        out: The folder to write.
        settings: What the weights do not tell.
        init_kwargs: Arguments of `from_pretrained` for the base model, such as a revision.
        overwrite: Whether an adapter in ``out`` may be replaced.

    Raises:
        UsageError: If a setting is needed and not given or contradicts the weights, or a weight cannot be placed.
    """
    check_folder(out, overwrite=overwrite)
    checkpoint_files(checkpoint)  # a wrong path is said before the base is looked for on the hub
    model = empty_model(find_base(base, init_kwargs))
    found = read_checkpoint(checkpoint, frozenset(model.state_dict()))
    num_blocks = model.config.get_text_config().num_hidden_layers
    placed = placed_weights(found.weights, head_size(model.config))
    settings, defaults = _completed(found, settings, placed)
    blocks = _blocks(placed, num_blocks, base)
    config = read_config(found.weights, placed, settings)
    config.revision = dict(init_kwargs or {}).get("revision")
    config.layers_to_transform = None if len(blocks) == num_blocks else list(blocks)
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    for _, layer in mixture_layers(wrapped):
        layer.moa_mixture.to_empty(device="cpu").to(found.dtype)
    load_weights(wrapped, found.weights, placed)
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
        doubts=_doubts(method, settings),
    )


def _completed(
    found: OfficialCheckpoint, settings: OfficialSettings, placed: Mapping[str, Destination]
) -> tuple[OfficialSettings, dict[str, float]]:
    """Add what the fork hard-codes to the settings, and report all that is missing or contradicts at once."""
    parameters = {one.parameter for one in placed.values()}
    ranks = {found.weights[name].shape[0] for name, one in placed.items() if one.parameter.endswith(".A")}
    defaults: dict[str, float] = {}
    if found.layout == "fork" and settings.alpha is None and ranks == {FORK_CONSTANTS["lora_rank"]}:
        defaults["alpha"] = FORK_CONSTANTS["lora_alpha"]
    if found.layout == "fork" and settings.max_threshold is None and _LEARNED in parameters:
        defaults["max_threshold"] = FORK_CONSTANTS["max_threshold"]
    settings = dataclasses.replace(settings, **defaults)
    flags = _flags(settings, found.weights, parameters, sorted(ranks))
    wrong = [
        f"give {one.name}, {one.needed}" for one in flags if one.needed and one.applies and one.given is None
    ]
    wrong += [
        f"{one.name} is given: leave it out, {one.needless}"
        for one in flags
        if one.given is not None and not one.applies
    ]
    if wrong:
        raise UsageError("; ".join(wrong))
    return settings, defaults


class _Flag(NamedTuple):
    name: str
    given: float | None
    applies: bool
    """Whether the checkpoint takes it."""
    needed: str
    """What to say where it is needed and not given; empty where it never is."""
    needless: str
    """Why it is not taken."""


def _flags(
    settings: OfficialSettings, names: Collection[str], parameters: Collection[str], ranks: Sequence[int]
) -> list[_Flag]:
    has_top_k = any(".router.topkroute_linear." in name for name in names)
    has_learned, of_kinds = _LEARNED in parameters, has_kind_gates(names)
    has_router = not of_kinds and any(one.startswith("router.logits.") for one in parameters)
    no_router = "the checkpoint has no router of its blocks"
    if of_kinds:
        no_router = "UniPEFT's gates are of a whole instance already, without a threshold"
    usual = "--alpha 8" if ranks == [FORK_CONSTANTS["lora_rank"]] else "the rank itself in the paper's set-up"
    alpha = (
        f"which the weights do not tell (LoRA of rank {', '.join(map(str, ranks))} is scaled by alpha / rank; the usual "
        f"official value is {usual}; see lora_alpha of the training's arguments)"
    )
    return [
        _Flag("--alpha", settings.alpha, bool(ranks), alpha, "the checkpoint has no LoRA"),
        _Flag(
            "--top-k", settings.keep, has_top_k,
            "the experts that each top-k router keeps (the usual official value is --top-k 2)",
            "the checkpoint has no top-k router",
        ),
        _Flag(
            "--max-threshold", settings.max_threshold, has_learned,
            "the upper bound of the learned threshold (the usual official value is --max-threshold 0.5)",
            "the checkpoint has no learned threshold",
        ),
        _Flag(
            "--constant-threshold", settings.constant_threshold, has_router and not has_learned, "",
            "the checkpoint has a learned threshold" if has_learned else no_router,
        ),
        _Flag("--instance-level", settings.instance_level or None, has_router, "", no_router),
    ]  # fmt: skip


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


def _doubts(method: str, settings: OfficialSettings) -> tuple[str, ...]:
    """What another official method with the same weights would need; the weights cannot tell."""
    if method != "soft-moa" or settings.instance_level:
        return ()
    taken = "taken as Soft MoA with gates for each token"
    others = "a Sparse MoA with a constant threshold and the instance-level code"
    return (f"{taken}: {others} have the same weights (--constant-threshold 0.5, --instance-level)",)
