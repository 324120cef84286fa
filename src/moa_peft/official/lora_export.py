"""`moa export --format lora`: a mixture's LoRA part as plain PEFT LoRA, its gates frozen at their means over data.

What it computes: ``W + sum_e g_e (alpha_e / r_e) B_e A_e`` with ``g_e`` the mean gate over the real tokens of the data,
which no input changes any more. Everything that is no LoRA is dropped. The scale and the gates are folded into B, and all
modules are padded with zeros to one rank, so that ``lora_alpha = r`` and servers that want one rank take it.

Sizes: N copies of an expert, r rank.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from moa_peft.data.base_loading import longest_input
from moa_peft.data.loading import load_rows
from moa_peft.data.row import Row
from moa_peft.data.templates import Template, render_completion
from moa_peft.errors import UsageError
from moa_peft.evaluation.batching import rows_at_once
from moa_peft.evaluation.loading import AdapterFolder, add_adapter, load, read_adapter
from moa_peft.evaluation.scoring import TokenQuestion, plan, score_batch, token_question
from moa_peft.mixture.experts.lora import LowRankChange
from moa_peft.mixture.sites import LinearSite
from moa_peft.official.adapter_folder import adapter_folder, check_apart, check_folder
from moa_peft.official.exporter import read_mixture_config
from moa_peft.official.gate_means import (
    ExpertFigures,
    GateMeans,
    expert_figures,
    gate_means,
    places_of,
    with_bar,
)
from moa_peft.training.rows import hold_out

HELD_OUT_SHARE = 0.2
"""Share of the rows that is held out of the gate means where no held-out rows are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Mean losses over the answer tokens of the held-out rows, nats a token."""

    mixture: float
    export: float
    frozen: float
    rows: int
    """Held-out rows."""
    tokens: int
    """Their answer tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraReport:
    """What an export as plain LoRA did."""

    adapter: str
    """The folder that was written."""
    base_model: str
    """The base model, as it was named."""
    rank: int
    """r and lora_alpha of the LoRA."""
    target_modules: tuple[str, ...]
    """Modules that it changes."""
    num_parameters: int
    """Its parameters, zeros of the padding included."""
    rows: int
    """Rows that the gates' means are over."""
    tokens: int
    """Their tokens."""
    rows_dropped: int
    """Rows left out, of both kinds: longer than what the model reads."""
    losses: Losses
    experts: tuple[ExpertFigures, ...]
    """Every expert of the mixture, kept or dropped."""


def export_lora(
    adapter: AdapterFolder,
    out: Path,
    *,
    data: str,
    held_out: str | None = None,
    limit: int | None = None,
    model: str | None = None,
    template: Template = "paper",
    batch_size: int = 16,
    dtype: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> LoraReport:
    """Write the LoRA part of a mixture as a plain LoRA of PEFT, and measure what that loses.

    Args:
        adapter: From `read_adapter`.
        out: The folder to write.
        data: Rows whose tokens the gates' means are over: what `load_rows` reads.
        held_out: Rows for the losses; None holds a fifth of ``data`` out of the means.
        limit: Only so many rows of each from the start.
        model: The base model; None for the one that the adapter names.
        template: How a row becomes text.
        batch_size: Most rows in a forward pass.
        dtype: Of the base model; None as in `moa_peft.evaluation.loading.choose_base`.
        init_kwargs: How the base model is loaded, likewise.
        overwrite: Whether an adapter in the folder may be replaced.

    Raises:
        UsageError: If the adapter has no LoRA or is no mixture, too few rows are short enough for the model, or the folder cannot
            be used.
    """
    check_folder(out, overwrite=overwrite)
    check_apart(out, adapter.path)
    _check_adapter(adapter)
    rows = _rows(data, held_out, limit)
    loaded = load(model, adapter, dtype=dtype, init_kwargs=init_kwargs)
    most = longest_input(loaded.model) or math.inf
    asked = (
        [token_question(row, [render_completion(row)], loaded.tokenizer, template) for row in some]
        for some in rows
    )
    measured, tested = ([one for one in some if one.num_tokens <= most] for some in asked)
    if not measured or not tested:
        raise UsageError(
            f"no row {'to hold out' if measured else 'for the means of the gates'} is short enough: the model reads {most} tokens"
        )
    means = gate_means(loaded.model, measured, batch_size)
    mixture = _answer_loss(loaded.model, tested, batch_size, "mixture")
    with loaded.model.disable_adapter():
        frozen = _answer_loss(loaded.model, tested, batch_size, "frozen")
    figures = expert_figures(loaded.model, means)
    lora = plain_lora(loaded.model, means)
    base = loaded.model.unload()
    with adapter_folder(out, overwrite=overwrite) as draft:
        made, parameters = write_lora(draft, base, lora, revision=loaded.base_settings.get("revision"))
        try:  # where PEFT gives a target another meaning, as for routed experts, it would leave weights out
            again = add_adapter(base, read_adapter(str(draft))).eval()
        except UsageError as error:
            raise UsageError(f"PEFT has no plain LoRA like this on {loaded.base_model}: {error}") from error
        export = _answer_loss(again, tested, batch_size, "export")
    tokens = sum(len(one.completions[0]) for one in tested)
    return LoraReport(
        adapter=str(out),
        base_model=loaded.base_model,
        rank=made.r,
        target_modules=tuple(sorted(cast("set[str]", made.target_modules))),
        num_parameters=parameters,
        rows=len(measured),
        tokens=sum(one.num_tokens for one in measured),
        rows_dropped=sum(map(len, rows)) - len(measured) - len(tested),
        losses=Losses(mixture=mixture, export=export, frozen=frozen, rows=len(tested), tokens=tokens),
        experts=tuple(figures),
    )


def _check_adapter(adapter: AdapterFolder) -> None:
    config = read_mixture_config(adapter)
    kinds = sorted({own.kind for own in config.experts})
    if "lora" not in kinds:
        raise UsageError(
            f"{adapter.name} has no LoRA, only {', '.join(kinds)}: there is nothing that a plain LoRA could hold"
        )
    if config.modules_to_save:
        raise UsageError(
            f"{adapter.name} has modules_to_save {config.modules_to_save}: a plain LoRA for servers cannot hold them"
        )


def plain_lora(model: Any, means: Mapping[tuple[str, str], GateMeans]) -> dict[str, tuple[Tensor, Tensor]]:
    """Make the LoRA of each module from those of the mixture.

    Args:
        model: A mixture in PEFT's wrapper.
        means: From `gate_means`.

    Returns:
        By the module's path in the base model: A [r, D_in] and B [D_out, r], with gates and scale in B, of one rank r
        for all, float32. A projection inside a fused layer has its rows there.
    """
    low: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for name, mixture, place in places_of(model):
        expert, site = mixture.experts[place.name], place.site
        if type(expert) is LowRankChange and isinstance(site, LinearSite):
            gates = means[name, place.name].mean().to(expert.B.device)
            low[site.path].append((expert.A.detach().double(), _up(expert, site, gates)))
    rank = max(sum(down.shape[0] for down, _ in joined) for joined in low.values())
    return {
        path: _padded(
            torch.cat([down for down, _ in joined]), torch.cat([up for _, up in joined], dim=1), rank
        )
        for path, joined in low.items()
    }


def write_lora(
    folder: Path,
    base: nn.Module,
    lora: Mapping[str, tuple[Tensor, Tensor]],
    revision: str | None = None,
) -> tuple[LoraConfig, int]:
    """Write a LoRA as PEFT does, in a form that servers take: one rank, ``lora_alpha = r``, no patterns.

    Args:
        folder: An existing folder.
        base: The base model, whose modules are named; it is not changed.
        lora: From `plain_lora`.
        revision: Of the base model, if it has one.

    Returns:
        The config, and the number of parameters written. Modules that the names in ``target_modules`` cover without
        having a LoRA get zeros.
    """
    rank = next(iter(lora.values()))[0].shape[0]
    modules = dict(base.named_modules())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        revision=revision,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(_targets(list(modules), lora)),
        fan_in_fan_out=any(type(modules[path]).__name__ == "Conv1D" for path in lora),
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for path in modules:
        if any(path == one or path.endswith(f".{one}") for one in config.target_modules or ()):
            for letter, tensor in zip("AB", lora.get(path) or _zeros(modules[path], rank), strict=True):
                tensors[f"base_model.model.{path}.lora_{letter}.weight"] = tensor
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return config, sum(one.numel() for one in tensors.values())


def _up(expert: LowRankChange, site: LinearSite, gates: Tensor) -> Tensor:
    """The columns [D_out, r] that write, weighted by gates [N], in their place of a fused layer."""
    copies = expert.B.detach().double().unflatten(1, (-1, expert.rank))  # [D_out, N, r]
    weighted = copies * (expert.scale * gates.expand(copies.shape[1])).view(1, -1, 1)
    shared = expert.A.shape[0] != copies.shape[1] * expert.rank
    up = weighted.sum(dim=1) if shared else weighted.flatten(1)
    return up if site.slot is None else site.slot.place(up.T).T


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Bring both to one rank with zeros, as contiguous float32 on the CPU."""
    more = rank - down.shape[0]
    down = nn.functional.pad(down, (0, 0, 0, more)).float().cpu().contiguous()
    return down, nn.functional.pad(up, (0, more)).float().cpu().contiguous()


def _targets(modules: Sequence[str], lora: Mapping[str, tuple[Tensor, Tensor]]) -> set[str]:
    """Names for target_modules: the last part of a path, as servers want, or as much of it as tells modules apart.

    Modules of other blocks may go by the same name; they get zeros.
    """
    targets: set[str] = set()
    for path in lora:
        last = path.rpartition(".")[2]
        alike = {_in_block(one) for one in modules if one == last or one.endswith(f".{last}")}
        targets.add(last if alike == {_in_block(path)} else _in_block(path))
    return targets


def _in_block(path: str) -> str:
    """What follows the last number in a module's path, as "self_attn.q_proj"."""
    parts = path.split(".")
    numbers = [place for place, one in enumerate(parts) if one.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _zeros(module: Any, rank: int) -> tuple[Tensor, Tensor]:
    """A LoRA that changes nothing, of the sizes of a linear layer: a vision tower's may have a decoder's name."""
    if type(module).__name__ == "Conv1D":
        return torch.zeros(rank, module.nx), torch.zeros(module.nf, rank)
    return torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank)


def _rows(data: str, held_out: str | None, limit: int | None) -> tuple[list[Row], list[Row]]:
    """Rows for the gates' means, and rows for the losses."""
    rows = load_rows(data, limit=limit)
    if held_out is not None:
        return rows, load_rows(held_out, split="validation", limit=limit)
    if len(rows) < 2:
        raise UsageError(
            f"data {data!r} holds one row, which cannot be both measured and held out: give more, or --held-out FILE"
        )
    return hold_out(rows, HELD_OUT_SHARE, seed=0)


def _answer_loss(model: Any, questions: Sequence[TokenQuestion], batch_size: int, what: str) -> float:
    """The mean loss over all answer tokens, nats."""
    found: list[float] = []
    for batch in with_bar(plan(questions, rows_at_once(model, batch_size)), f"loss, {what}"):
        for (scores,) in score_batch(model, [questions[place] for place in batch]):
            found += scores
    return -sum(found) / len(found)
