"""`moa export --format lora`: a mixture's LoRA part as plain PEFT LoRA, its gates frozen at their means over data.

What it computes: ``W + sum_e g_e (alpha_e / r_e) B_e A_e`` with ``g_e`` the mean gate over the real tokens of the data,
which no input changes any more. Everything that is no LoRA is dropped. The scale and the gates are folded into B, and all
modules are padded with zeros to one rank, so that ``lora_alpha = r`` and servers that want one rank take it.

Sizes: B rows, T tokens of a row, E gates, N copies of an expert, r rank.
"""

import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from moa_peft.data.loading import load_rows
from moa_peft.data.row import Row
from moa_peft.data.templates import Template, render_completion
from moa_peft.errors import UsageError
from moa_peft.evaluation.batching import pad_left, plan_batches, positions, rows_at_once
from moa_peft.evaluation.loading import AdapterFolder, load
from moa_peft.evaluation.scoring import (
    TOKEN_BUDGET,
    TokenQuestion,
    check_lengths,
    plan,
    score_batch,
    token_question,
)
from moa_peft.mixture.architecture import LinearSite
from moa_peft.mixture.block_hooks import GateRecord, MoALayer, mixture_layers
from moa_peft.mixture.experts.lora import LowRankChange
from moa_peft.mixture.token_watch import prompt_lengths
from moa_peft.official.adapter_folder import adapter_folder, check_folder
from moa_peft.official.exporter import read_mixture_config

HELD_OUT_SHARE = 0.2
"""Share of the rows that is held out of the gate means where no held-out rows are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFigures:
    """One expert of the mixture, over all of its blocks."""

    name: str
    """The expert's name, as in "lora_q_proj"."""
    mean_gate: float
    """Its mean gate over tokens and blocks; that of all its copies together."""
    gate_deviation: float
    """Standard deviation of that gate over tokens, the mean over blocks: what freezing it loses."""
    blocks: int
    """Blocks that carry it."""
    kept: bool
    """Whether it is in the export."""


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
    losses: Losses
    """On held-out rows."""
    experts: tuple[ExpertFigures, ...]
    """Every expert of the mixture, kept or dropped."""


@dataclass(kw_only=True, slots=True)
class GateMeans:
    """Sums of one expert's gates over tokens, in one block."""

    total: Tensor
    """Float64, [N]: of each copy's gate, the block's gate included."""
    of_all: float = 0.0
    """Of the gates of all copies together."""
    of_squares: float = 0.0
    """Of the squares of that."""
    tokens: float = 0.0
    """Tokens that were counted."""

    def mean(self) -> Tensor:
        """The mean gate of each copy, float64, [N]."""
        return self.total / self.tokens

    def deviation(self) -> float:
        """Standard deviation over tokens of the gate of all copies together."""
        mean = self.of_all / self.tokens
        return math.sqrt(max(0.0, self.of_squares / self.tokens - mean * mean))


Means = dict[tuple[str, str], GateMeans]
"""By the name of the tuner layer and of the expert."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """How an export as plain LoRA goes about it."""

    template: Template = "paper"
    """How a row becomes text."""
    batch_size: int = 16
    """Most rows in a forward pass."""
    dtype: str | None = None
    """Of the base model; None as in `moa_peft.evaluation.loading.choose_base`."""
    init_kwargs: Mapping[str, Any] | None = None
    """How the base model is loaded, likewise."""
    seed: int = 0
    """Of the draw of the held-out rows."""
    overwrite: bool = False
    """Whether an adapter in the folder may be replaced."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}: give at least 1")


@dataclass(kw_only=True, slots=True)
class _Low:
    """The LoRA of one module, in parts that are joined."""

    downs: list[Tensor] = field(default_factory=list)
    """Each [r, D_in]."""
    ups: list[Tensor] = field(default_factory=list)
    """Each [D_out, r], gates and scale in it."""


def export_lora(
    adapter: AdapterFolder,
    out: Path,
    *,
    data: str,
    held_out: str | None = None,
    limit: int | None = None,
    model: str | None = None,
    options: LoraOptions | None = None,
) -> LoraReport:
    """Write the LoRA part of a mixture as a plain LoRA of PEFT, and measure what that loses.

    Args:
        adapter: From `read_adapter`.
        out: The folder to write.
        data: Rows whose tokens the gates' means are over: what `load_rows` reads.
        held_out: Rows for the losses; None holds a fifth of ``data`` out of the means.
        limit: Only so many rows of each from the start.
        model: The base model; None for the one that the adapter names.
        options: How; None for the defaults.

    Returns:
        What was done, with the losses of the mixture, the export and the frozen model.

    Raises:
        UsageError: If the adapter has no LoRA or is no mixture, the rows are too few or too long, or the folder cannot
            be used.
    """
    options = options or LoraOptions()
    check_folder(out, overwrite=options.overwrite)
    config = read_mixture_config(adapter)
    if not any(own.kind == "lora" for own in config.parts().experts):
        kinds = ", ".join(sorted({own.kind for own in config.parts().experts}))
        raise UsageError(
            f"{adapter.name} has no LoRA, only {kinds}: there is nothing that a plain LoRA could hold"
        )
    if config.modules_to_save:
        raise UsageError(
            f"{adapter.name} has modules_to_save {config.modules_to_save}: a plain LoRA for servers cannot hold them"
        )
    measured, tested = _rows(data, held_out, limit, options.seed)
    loaded = load(model, adapter, dtype=options.dtype, init_kwargs=options.init_kwargs)
    questions = {
        name: [
            token_question(row, [render_completion(row)], loaded.tokenizer, options.template) for row in rows
        ]
        for name, rows in (("gates", measured), ("held-out", tested))
    }
    for one in questions.values():
        check_lengths(loaded.model, [question.num_tokens for question in one])
    means = gate_means(loaded.model, questions["gates"], options.batch_size)
    scored = questions["held-out"]
    mixture = _answer_loss(loaded.model, scored, options.batch_size, "mixture")
    with loaded.model.disable_adapter():
        frozen = _answer_loss(loaded.model, scored, options.batch_size, "frozen")
    figures = expert_figures(loaded.model, means)
    lora = plain_lora(loaded.model, means)
    base = loaded.model.unload()
    with adapter_folder(out, overwrite=options.overwrite) as draft:
        made, parameters = write_lora(draft, base, lora, revision=loaded.base_settings.get("revision"))
        again = PeftModel.from_pretrained(base, str(draft)).eval()
        export = _answer_loss(again, scored, options.batch_size, "export")
    return LoraReport(
        adapter=str(out),
        base_model=loaded.base_model,
        rank=made.r,
        target_modules=tuple(sorted(cast("set[str]", made.target_modules))),
        num_parameters=parameters,
        rows=len(measured),
        tokens=sum(one.num_tokens for one in questions["gates"]),
        losses=Losses(
            mixture=mixture,
            export=export,
            frozen=frozen,
            rows=len(tested),
            tokens=sum(len(one.completions[0]) for one in scored),
        ),
        experts=tuple(figures),
    )


@torch.inference_mode()
def gate_means(model: Any, questions: Sequence[TokenQuestion], batch_size: int) -> Means:
    """Take the mean gates of every expert over the real tokens of prompts and their answers.

    Args:
        model: A mixture in PEFT's wrapper, in evaluation mode.
        questions: Prompts with one completion each.
        batch_size: Most rows in a forward pass; one where official instance gates count padding in.

    Returns:
        Sums, by tuner layer and expert. Where an expert has copies, their gates are multiplied by the block's token by
        token, as the mixture does.
    """
    layers = mixture_layers(model)
    means: Means = {}
    mask: list[Tensor] = []  # of the batch that is running
    for name, layer in layers:
        layer.observer = _observer(name, layer, means, mask)
    lengths = [one.num_tokens for one in questions]
    batches = plan_batches(
        lengths,
        [1] * len(lengths),
        batch_size=rows_at_once(model, batch_size),
        token_budget=TOKEN_BUDGET,
        logit_budget=TOKEN_BUDGET,
    )
    device = next(model.parameters()).device
    try:
        for batch in _shown(batches, "gates", len(questions)):
            chosen = [questions[place] for place in batch]
            ids, real = pad_left([[*one.prompt, *one.completions[0]] for one in chosen], device)
            mask[:] = [real.double()]
            model(
                input_ids=ids,
                attention_mask=real,
                position_ids=positions(real),
                use_cache=False,
                logits_to_keep=1,
                **prompt_lengths(model, [len(one.prompt) for one in chosen]),
            )
    finally:
        for _, layer in layers:
            layer.observer = None
    for name, layer in layers:  # no router: every gate is 1
        for mixture in layer.mixtures().values():
            for place in mixture.places:
                if (name, place.name) not in means:
                    means[name, place.name] = GateMeans(
                        total=torch.ones(1, dtype=torch.float64), of_all=1.0, of_squares=1.0, tokens=1.0
                    )
    return means


def _observer(name: str, layer: MoALayer, means: Means, mask: list[Tensor]) -> Callable[[GateRecord], None]:
    """Add up the gates of one block. In each pass the block's router comes before those of copies."""
    latest: dict[str, Tensor] = {}

    def add(record: GateRecord) -> None:
        mixture = layer.mixtures()[record.adapter]
        if not record.router:
            latest[""] = record.gates
            for place in mixture.places:
                if place.name not in mixture.copy_routers:
                    column = record.gates[..., place.column : place.column + 1]
                    _add_up(means, (name, place.name), column, mask[0])
            return
        place = next(one for one in mixture.places if one.name == record.router)
        gates = record.gates
        if mixture.router is not None:
            gates = latest[""][..., place.column : place.column + 1] * gates
        _add_up(means, (name, place.name), gates, mask[0])

    return add


def _add_up(means: Means, key: tuple[str, str], gates: Tensor, mask: Tensor) -> None:
    """Add gates [B, T or 1, N] of the tokens that count in the mask [B, T]."""
    gates = gates.double().expand(-1, mask.shape[1], -1)
    weighted = gates * mask.unsqueeze(-1)
    sums = means.setdefault(key, GateMeans(total=torch.zeros(gates.shape[-1], dtype=torch.float64)))
    together = gates.sum(dim=-1)
    sums.total += weighted.sum(dim=(0, 1)).cpu()
    sums.of_all += float((together * mask).sum())
    sums.of_squares += float((together.square() * mask).sum())
    sums.tokens += float(mask.sum())


def plain_lora(model: Any, means: Mapping[tuple[str, str], GateMeans]) -> dict[str, tuple[Tensor, Tensor]]:
    """Make the LoRA of each module from those of the mixture.

    Args:
        model: A mixture in PEFT's wrapper.
        means: From `gate_means`.

    Returns:
        By the module's path in the base model: A [r, D_in] and B [D_out, r], with gates and scale in B, of one rank r
        for all, float32. A projection inside a fused layer has its rows there.
    """
    low: dict[str, _Low] = defaultdict(_Low)
    for name, layer in mixture_layers(model):
        for mixture in layer.mixtures().values():
            for place in mixture.places:
                expert = mixture.experts[place.name]
                if (
                    isinstance(expert, LowRankChange)
                    and is_lora(expert)
                    and isinstance(place.site, LinearSite)
                ):
                    gates = means[name, place.name].mean().to(expert.B.device)
                    low[place.site.path].downs.append(_down(expert))
                    low[place.site.path].ups.append(_up(expert, place.site, gates))
    rank = max(sum(one.shape[0] for one in joined.downs) for joined in low.values())
    return {path: _padded(torch.cat(one.downs), torch.cat(one.ups, dim=1), rank) for path, one in low.items()}


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
            for letter, tensor in zip("AB", lora.get(path) or _zeros(path, lora), strict=True):
                tensors[f"base_model.model.{path}.lora_{letter}.weight"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return config, sum(one.numel() for one in tensors.values())


def is_lora(expert: nn.Module) -> bool:
    """Whether an expert is a plain LoRA, whose change a LoRA of PEFT can hold."""
    return type(expert) is LowRankChange


def expert_figures(model: Any, means: Mapping[tuple[str, str], GateMeans]) -> list[ExpertFigures]:
    """Sum up the gates of each expert over the blocks.

    Args:
        model: A mixture in PEFT's wrapper.
        means: From `gate_means`.

    Returns:
        One entry for each expert, in the order of the mixtures.
    """
    found: dict[str, list[GateMeans]] = {}
    kept: dict[str, bool] = {}
    for name, layer in mixture_layers(model):
        for mixture in layer.mixtures().values():
            for place in mixture.places:
                found.setdefault(place.name, []).append(means[name, place.name])
                kept[place.name] = is_lora(mixture.experts[place.name])
    return [
        ExpertFigures(
            name=name,
            mean_gate=sum(one.of_all / one.tokens for one in sums) / len(sums),
            gate_deviation=sum(one.deviation() for one in sums) / len(sums),
            blocks=len(sums),
            kept=kept[name],
        )
        for name, sums in found.items()
    ]


def _down(expert: LowRankChange) -> Tensor:
    """The rows [r, D_in] that read the input: of all copies, or the one that they share."""
    return expert.A.detach().double()


def _up(expert: LowRankChange, site: LinearSite, gates: Tensor) -> Tensor:
    """The columns [D_out, r] that write, weighed by gates [N], in their place of a fused layer."""
    copies = expert.B.detach().double().unflatten(1, (-1, expert.rank))  # [D_out, N, r]
    weighed = copies * (expert.scale * gates.expand(copies.shape[1])).view(1, -1, 1)
    shared = expert.A.shape[0] != copies.shape[1] * expert.rank
    up = weighed.sum(dim=1) if shared else weighed.flatten(1)
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
        parts = path.split(".")
        alike = {_in_block(one) for one in modules if one == parts[-1] or one.endswith(f".{parts[-1]}")}
        targets.add(parts[-1] if alike == {_in_block(path)} else _in_block(path))
    return targets


def _in_block(path: str) -> str:
    """What follows the last number in a module's path, as "self_attn.q_proj"."""
    parts = path.split(".")
    numbers = [place for place, one in enumerate(parts) if one.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _zeros(path: str, lora: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A LoRA that changes nothing, of the sizes of the same module in another block."""
    like = next(pair for other, pair in lora.items() if _in_block(other) == _in_block(path))
    return torch.zeros_like(like[0]), torch.zeros_like(like[1])


def _rows(data: str, held_out: str | None, limit: int | None, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows for the gates' means, and rows for the losses."""
    rows = load_rows(data, limit=limit)
    if held_out is not None:
        return rows, load_rows(held_out, split="validation", limit=limit)
    if len(rows) < 2:
        raise UsageError(
            f"data {data!r} holds one row, which cannot be both measured and held out: give more, or --held-out FILE"
        )
    count = max(1, round(HELD_OUT_SHARE * len(rows)))
    chosen = set(random.Random(seed).sample(range(len(rows)), count))  # not for secrets
    return (
        [row for place, row in enumerate(rows) if place not in chosen],
        [row for place, row in enumerate(rows) if place in chosen],
    )


def _answer_loss(model: Any, questions: Sequence[TokenQuestion], batch_size: int, what: str) -> float:
    """The mean loss over all answer tokens, nats."""
    total, tokens = 0.0, 0
    for batch in _shown(plan(questions, rows_at_once(model, batch_size)), f"loss, {what}", len(questions)):
        for one in score_batch(model, [questions[place] for place in batch]):
            total -= sum(one[0])
            tokens += len(one[0])
    return total / tokens


def _shown(batches: Sequence[list[int]], what: str, rows: int) -> Any:
    """Go through batches with a bar on standard error, where that takes over two seconds."""
    with tqdm(total=rows, desc=what, unit="row", delay=2, file=sys.stderr) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
