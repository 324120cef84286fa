"""Where each weight of an official checkpoint goes in a mixture.

Two layouts: "native" (the official LLaMA code: ``layers.0.attention...``) and "fork" (the official transformers fork:
``model.layers.0.self_attn...``). The native code rotates interleaved pairs, transformers rotates halves, so the rows
of B of its LoRA on q and k come in another order. Where it keeps the copies of an expert apart, ours are stacked.

Sizes: H heads of size D, r rank, N copies of an expert.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moa_peft.errors import UsageError

Layout = Literal["native", "fork"]
Transform = Callable[[Tensor], Tensor]

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_MLP_PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
KIND_GATES = {"lora_gate": "lora", "prompt_gate": "prompt", "p_adapter_gate": "parallel_adapter"}
"""UniPEFT's three gates, in the order in which a mixture of the paper's experts has their kinds."""

_BLOCK = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_LORA = re.compile(
    r"(?:self_attn|attention)\.lora_(?P<attention>[QKVO])\.(?P<attention_part>.+)"
    r"|(?:mlp|feed_forward)\.lora_(?P<mlp>gate|up|down|GATE|UP|DOWN)\.(?P<mlp_part>.+)"
)
_PROMPT = re.compile(r"(?:self_attn|attention)\.prompt")
# Within the module of one LoRA: what a weight is, and which copy's.
_LORA_PARTS = (
    (re.compile(r"lora_([AB])\.weight"), lambda m: ("experts.{}." + m[1], None)),
    (re.compile(r"lora_([AB])_l\.(\d+)\.weight"), lambda m: ("experts.{}." + m[1], int(m[2]))),
    (re.compile(r"experts\.(\d+)\.lora_([AB])\.weight"), lambda m: ("experts.{}." + m[2], int(m[1]))),
    (
        re.compile(r"router\.(?:topkroute_linear\.)?(weight|bias)"),
        lambda m: ("copy_routers.{}.logits.linear_" + m[1], None),
    ),
    (
        re.compile(r"router\.noise_linear\.(weight|bias)"),
        lambda m: ("copy_routers.{}.gate.noise_" + m[1], None),
    ),
    (re.compile(r"threshold_fn\.(weight|bias)"), lambda m: ("copy_routers.{}.gate.threshold_" + m[1], None)),
)
# Elsewhere in a block.
_PARTS = (
    (
        re.compile(r"p_adapter\.(down|up)_proj\.(weight|bias)"),
        lambda m: (f"experts.parallel_adapter.{m[1]}_{m[2]}", None),
    ),
    (
        re.compile(r"p_adapter\.(down|up)_proj_l\.(\d+)\.(weight|bias)"),
        lambda m: (f"experts.parallel_adapter.{m[1]}_{m[3]}", int(m[2])),
    ),
    (
        re.compile(r"p_adapter\.router\.(weight|bias)"),
        lambda m: (f"copy_routers.parallel_adapter.logits.linear_{m[1]}", None),
    ),
    (re.compile(r"(?:self_attn|attention)\.prompt\.weight"), lambda _: ("experts.prompt.vectors", None)),
    (re.compile(r"(?:self_attn|attention)\.prompt_gate"), lambda _: ("experts.prompt.head_scale", None)),
    (
        re.compile(r"(?:self_attn|attention)\.prompt_router\.(weight|bias)"),
        lambda m: (f"copy_routers.prompt.logits.linear_{m[1]}", None),
    ),
    (
        re.compile(r"adapter_type_router\.(w[123])\.(weight|bias)"),
        lambda m: (f"router.logits.{m[1]}_{m[2]}", None),
    ),
    (re.compile(r"adapter_type_router\.(weight|bias)"), lambda m: (f"router.logits.linear_{m[1]}", None)),
    (re.compile(r"adapter_threshold_fn\.(weight|bias)"), lambda m: (f"router.gate.threshold_{m[1]}", None)),
    (
        re.compile(r"(lora_gate|prompt_gate|p_adapter_gate)\.(weight|bias)"),
        lambda m: (f"router.logits.linear_{m[2]}", list(KIND_GATES).index(m[1])),
    ),
)


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
        columns = self.parameter.endswith((".B", ".up_weight"))
        if parameter.shape[1 if columns else 0] % self.parts:
            return None
        return tuple(self.inverse(self.view(parameter)).shape)

    def view(self, parameter: Tensor) -> Tensor:
        """Cut the weight's part out of a parameter of ours, or of its gradient."""
        if self.parts == 1:
            return parameter
        if self.parameter.endswith(".up_bias"):
            return parameter.unflatten(0, (-1, self.parts))[:, self.part]
        stacked_columns = self.parameter.endswith((".B", ".up_weight"))
        return parameter.chunk(self.parts, dim=1 if stacked_columns else 0)[self.part]


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
    """Find the place of every official weight.

    Args:
        names: The checkpoint's names.
        head_size: D of the base model.

    Returns:
        A `Destination` for each name.

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


def idle_kind_gates(names: Iterable[str]) -> set[str]:
    """Name those of UniPEFT's gates in a checkpoint whose kind of expert their block lacks."""
    gates: list[tuple[str, str, str]] = []
    kinds: dict[str, set[str]] = defaultdict(set)
    for name in names:
        block = _BLOCK.fullmatch(name)
        if block is None:
            continue
        gate = block[2].partition(".")[0]
        if gate in KIND_GATES:
            gates.append((name, block[1], gate))
        elif _LORA.fullmatch(block[2]):
            kinds[block[1]].add("lora")
        elif gate == "p_adapter":
            kinds[block[1]].add("parallel_adapter")
        elif _PROMPT.match(block[2]):
            kinds[block[1]].add("prompt")
    return {name for name, block, gate in gates if gate not in kind_gates(kinds[block])}


def _place(name: str) -> tuple[int, str, int | None]:
    """Find a weight's block, the name of the parameter it belongs to, and which copy's it is."""
    block = _BLOCK.fullmatch(name)
    rest = block[2] if block else ""
    lora = _LORA.fullmatch(rest)
    if lora:
        letter, part = lora["attention"] or lora["mlp"], lora["attention_part"] or lora["mlp_part"]
        expert = "lora_" + {**_PROJECTIONS, **_MLP_PROJECTIONS}[letter.lower()]
        rules, rest = _LORA_PARTS, part
    else:
        rules, expert = _PARTS, ""
    for pattern, target in rules:
        found = pattern.fullmatch(rest)
        if found and block:
            parameter, copy = target(found)
            return int(block[1]), parameter.format(expert), copy
    raise UsageError(f"cannot place the weight {name!r}: no part of a mixture goes by that name")


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
