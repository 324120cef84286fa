"""Where each weight of an official checkpoint goes in a mixture, and where a mixture's goes in a checkpoint.

Two layouts: "native" (the official LLaMA code: ``layers.0.attention...``) and "fork" (the official transformers fork:
``model.layers.0.self_attn...``). The native code rotates interleaved pairs, transformers rotates halves, so the rows
of B of its LoRA on q and k come in another order. Where it keeps the copies of an expert apart, ours are stacked.

Sizes: H heads of size D, r rank, N copies of an expert.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moa_peft.errors import UsageError

Layout = Literal["native", "fork"]
Transform = Callable[[Tensor], Tensor]

KIND_GATES = {"lora_gate": "lora", "prompt_gate": "prompt", "p_adapter_gate": "parallel_adapter"}
"""UniPEFT's three gates, in the order in which a mixture of the paper's experts has their kinds."""

_LORA_MODULES = {
    "lora_q_proj": {"native": "attention.lora_Q", "fork": "self_attn.lora_Q"},
    "lora_k_proj": {"native": "attention.lora_K", "fork": "self_attn.lora_K"},
    "lora_v_proj": {"native": "attention.lora_V", "fork": "self_attn.lora_V"},
    "lora_o_proj": {"native": "attention.lora_O", "fork": "self_attn.lora_O"},
    "lora_gate_proj": {"native": "feed_forward.lora_GATE", "fork": "mlp.lora_gate"},
    "lora_up_proj": {"native": "feed_forward.lora_UP", "fork": "mlp.lora_up"},
    "lora_down_proj": {"native": "feed_forward.lora_DOWN", "fork": "mlp.lora_down"},
}
_LORA_EXPERTS = {module: expert for expert, modules in _LORA_MODULES.items() for module in modules.values()}
_ATTENTION = {"native": "attention", "fork": "self_attn"}

_RULES: Sequence[tuple[str, str, Collection[str]]] = (
    ("{lora}.lora_{side}.weight", "experts.{expert}.{side}", ("one",)),
    ("{lora}.lora_{side}_l.{copy}.weight", "experts.{expert}.{side}", ("softmax",)),
    ("{lora}.experts.{copy}.lora_{side}.weight", "experts.{expert}.{side}", ("top-k", "threshold")),
    ("{lora}.router.{leaf}", "copy_routers.{expert}.logits.linear_{leaf}", ("softmax", "threshold")),
    ("{lora}.router.topkroute_linear.{leaf}", "copy_routers.{expert}.logits.linear_{leaf}", ("top-k",)),
    ("{lora}.router.noise_linear.{leaf}", "copy_routers.{expert}.gate.noise_{leaf}", ("top-k",)),
    ("{lora}.threshold_fn.{leaf}", "copy_routers.{expert}.gate.threshold_{leaf}", ("threshold",)),
    ("p_adapter.{part}_proj.{leaf}", "experts.parallel_adapter.{part}_{leaf}", ("one",)),
    ("p_adapter.{part}_proj_l.{copy}.{leaf}", "experts.parallel_adapter.{part}_{leaf}", ("softmax",)),
    ("p_adapter.router.{leaf}", "copy_routers.parallel_adapter.logits.linear_{leaf}", ("softmax",)),
    ("{attention}.prompt.weight", "experts.prompt.vectors", ("one", "softmax")),
    ("{attention}.prompt_gate", "experts.prompt.head_scale", ("one", "softmax")),
    ("{attention}.prompt_router.{leaf}", "copy_routers.prompt.logits.linear_{leaf}", ("softmax",)),
    ("adapter_type_router.{layer}.{leaf}", "router.logits.{layer}_{leaf}", ("expert",)),
    ("adapter_type_router.{leaf}", "router.logits.linear_{leaf}", ("expert",)),
    ("adapter_threshold_fn.{leaf}", "router.gate.threshold_{leaf}", ("expert",)),
    ("{kind_gate}.{leaf}", "router.logits.linear_{leaf}", ("kind",)),
)
"""A weight's name in a block: the official one, ours in the block's `Mixture`, and for which forms; see `official_names`."""

_FIELDS = {
    "lora": "|".join(map(re.escape, _LORA_EXPERTS)),
    "expert": "|".join(_LORA_MODULES),
    "attention": "self_attn|attention",
    "side": "[AB]",
    "part": "down|up",
    "layer": "w[123]",
    "leaf": "weight|bias",
    "kind_gate": "|".join(KIND_GATES),
    "copy": r"\d+",
}
_BLOCK = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


def _pattern(form: str) -> re.Pattern[str]:
    return re.compile(
        re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", re.escape(form))
    )


_READERS = [(_pattern(official), ours) for official, ours, _ in _RULES]
_WRITERS = [(_pattern(ours), official, forms) for official, ours, forms in _RULES]


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """One weight's place in a mixture."""

    block: int
    parameter: str
    """Its name in the block's `Mixture`."""
    transform: Transform
    """From the official layout to ours; gradients take the same way."""
    inverse: Transform
    """From ours back to the official layout."""
    part: int = 0
    """Which of ``parts`` of the parameter it is."""
    parts: int = 1

    def official_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The shape that the official weight of a parameter of ours has; None where it cannot have so many parts."""
        if parameter.shape[1 if self._stacks_columns else 0] % self.parts:
            return None
        return tuple(self.inverse(self.view(parameter)).shape)

    def view(self, parameter: Tensor) -> Tensor:
        """Cut the weight's part out of a parameter of ours, or of its gradient."""
        if self.parts == 1:
            return parameter
        if self.parameter.endswith(".up_bias"):
            return parameter.unflatten(0, (-1, self.parts))[:, self.part]
        return parameter.chunk(self.parts, dim=1 if self._stacks_columns else 0)[self.part]

    @property
    def _stacks_columns(self) -> bool:
        return self.parameter.endswith((".B", ".up_weight"))


def layout_of(names: Iterable[str]) -> Layout:
    """Tell the layout by the names: the fork's begin with "model."."""
    return "fork" if any(name.startswith("model.layers.") for name in names) else "native"


def half_split(rows: Tensor, head_size: int) -> Tensor:
    """Reorder rows of interleaved rotary pairs into halves.

    Args:
        rows: Float, [H * D, ...], each head's rows as x0 y0 x1 y1 ...
        head_size: D, even.

    Returns:
        The same shape, each head's rows as x0 x1 ... y0 y1 ...
    """
    pairs = rows.reshape(-1, head_size // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def interleaved(rows: Tensor, head_size: int) -> Tensor:
    """Undo `half_split`."""
    halves = rows.reshape(-1, 2, head_size // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def destinations(names: Iterable[str], head_size: int) -> dict[str, Destination]:
    """Find the place of every official weight, by its name.

    Args:
        names: The checkpoint's names.
        head_size: D of the base model.

    Raises:
        UsageError: If a name belongs to nothing that a mixture has, or a copy of an expert is missing.
    """
    names = list(names)
    native = layout_of(names) == "native"
    found = {name: _place(name) for name in names}
    numbers: dict[tuple[int, str], set[int]] = defaultdict(set)
    for block, parameter, part in found.values():
        if part is not None:
            numbers[block, parameter].add(part)
    placed: dict[str, Destination] = {}
    for name, (block, parameter, part) in found.items():
        parts = sorted(numbers[block, parameter])
        if not parameter.startswith("router.") and parts != list(range(len(parts))):
            raise UsageError(
                f"{name!r} is one of the copies {parts}: the checkpoint lacks some before the last"
            )
        transform, inverse = _transforms(parameter, head_size, native)
        placed[name] = Destination(
            block=block,
            parameter=parameter,
            transform=transform,
            inverse=inverse,
            part=0 if part is None else parts.index(part),
            parts=max(len(parts), 1),
        )
    return placed


def official_names(
    block: int, parameter: str, layout: Layout, *, form: str, copies: int, kinds: Collection[str]
) -> list[str]:
    """The official names of a parameter of ours: one, or one for each copy of an expert, or for each kind's gate.

    Args:
        block: The block, from 0.
        parameter: Its name in the block's `Mixture`.
        layout: Which official code's names.
        form: Of an expert's parameter the gate over its copies, "one" where there is one; of the router's, "expert" or
            "kind", for what it has gates.
        copies: Copies of the expert.
        kinds: The kinds of experts in the block.

    Raises:
        UsageError: If the official code has no name for it.
    """
    for ours, official, forms in _WRITERS:
        found = ours.fullmatch(parameter)
        if found and form in forms:
            fields = {**found.groupdict(), "attention": _ATTENTION[layout]}
            if "expert" in fields:
                fields["lora"] = _LORA_MODULES[fields["expert"]][layout]
            gates = kind_gates(kinds) if "{kind_gate}" in official else [""]
            numbers = range(copies) if "{copy}" in official else [0]
            start = f"{'model.' if layout == 'fork' else ''}layers.{block}."
            return [start + official.format(**fields, kind_gate=g, copy=n) for g in gates for n in numbers]
    raise UsageError(f"the official code has no name for {parameter} of block {block}")


def kind_gates(kinds: Collection[str]) -> list[str]:
    """Name UniPEFT's gates that gate something in a block, in the order of a mixture's columns.

    The official code gives the prompt's gate to the parallel adapter too, whether the block has a prompt or not.

    Args:
        kinds: The kinds of experts in the block.
    """
    official = {kind: gate for gate, kind in KIND_GATES.items()}
    if "prompt" not in kinds:
        official["parallel_adapter"] = official["prompt"]
    return [gate for kind, gate in official.items() if kind in kinds]


def has_kind_gates(names: Iterable[str]) -> bool:
    """Whether a checkpoint, whose names all have a place, has UniPEFT's gates of kinds."""
    return any(name.split(".")[-2] in KIND_GATES for name in names)


def idle_routers(names: Iterable[str]) -> set[str]:
    """Name the router weights that gate nothing; the native code makes them all the same.

    They are the routers of blocks that carry no expert, and UniPEFT's gates of kinds that their block lacks.
    """
    routers: list[tuple[str, str, str]] = []
    kinds: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if block := _BLOCK.fullmatch(name):
            parameter, _ = _read(block[2])
            if parameter.startswith("router."):
                routers.append((name, block[1], block[2].partition(".")[0]))
            else:
                expert = parameter.partition(".")[2]
                kinds[block[1]].add("lora" if expert.startswith("lora_") else expert.partition(".")[0])
    return {
        name
        for name, block, gate in routers
        if block not in kinds or (gate in KIND_GATES and gate not in kind_gates(kinds[block]))
    }


def _read(official: str) -> tuple[str, int | None]:
    """The parameter of ours that an official name within a block stands for, and which copy's; "" for none."""
    for pattern, ours in _READERS:
        if found := pattern.fullmatch(official):
            fields = found.groupdict()
            part = (
                list(KIND_GATES).index(fields["kind_gate"]) if "kind_gate" in fields else fields.get("copy")
            )
            parameter = ours.format(**fields, expert=_LORA_EXPERTS.get(fields.get("lora", "")))
            return parameter, None if part is None else int(part)
    return "", None


def _place(name: str) -> tuple[int, str, int | None]:
    """Find a weight's block, the name of the parameter it belongs to, and which copy's it is."""
    block = _BLOCK.fullmatch(name)
    parameter, copy = _read(block[2]) if block else ("", None)
    if block is None or not parameter:
        raise UsageError(f"cannot place the weight {name!r}: no part of a mixture goes by that name")
    return int(block[1]), parameter, copy


def _transforms(parameter: str, head_size: int, native: bool) -> tuple[Transform, Transform]:
    if native and parameter in ("experts.lora_q_proj.B", "experts.lora_k_proj.B"):
        return lambda rows: half_split(rows, head_size), lambda rows: interleaved(rows, head_size)
    if parameter == "experts.prompt.head_scale":  # official: [1, H, 1, 1]
        return lambda scale: scale.reshape(-1), lambda scale: scale.reshape(1, -1, 1, 1)
    return lambda weight: weight, lambda weight: weight


def experts_of(placed: Mapping[str, Destination]) -> dict[str, set[int]]:
    """The experts in a checkpoint, as `lora_q_proj` or `prompt`, and the blocks that carry each."""
    found: dict[str, set[int]] = {}
    for one in placed.values():
        if one.parameter.startswith("experts."):
            found.setdefault(one.parameter.split(".")[1], set()).add(one.block)
    return found
