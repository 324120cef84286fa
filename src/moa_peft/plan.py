"""What of a mixture runs where: which experts change which module's output, and who reads which input.

It is made once, when the block's modules are hooked, so that a pass has little to find out.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import getitem
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from moa_peft.architecture import AttentionSite, Block, LinearSite, Slot
from moa_peft.experts.base import AttentionExpert, LinearExpert
from moa_peft.router import Router

if TYPE_CHECKING:
    from moa_peft.layer import Mixture, Place

PROJECTION_INPUT, MLP_INPUT = "projections", "mlp"
"""Names of inputs: what q, k and v read, and what the MLP reads. Others have their site's name."""

_INPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attention"), PROJECTION_INPUT),
    **dict.fromkeys(("gate_proj", "up_proj", "mlp"), MLP_INPUT),
}

Columns = tuple[int, int] | None
"""The columns of a fused layer's output that one projection has; None for all."""


Source = Callable[[], Tensor]
"""Gives a weight as it is now."""


class Group(NamedTuple):
    """Experts that read one input and are gated by one multiplication; see `Bottleneck`."""

    names: tuple[str, ...]
    part: int
    """Which part of the block's gates is theirs, a row for each of them; see `Plan.gate_parts`."""
    scale: float
    activation: Callable[[Tensor], Tensor] | None
    width: int
    """N * r, how many rows each of its experts has after gating."""
    has_up_bias: bool


class Sources(NamedTuple):
    """Where the weights of everything that reads one input are, so that a pass need not look for them."""

    weights: tuple[Source, ...]
    biases: tuple[Source | int, ...] | None
    """In the order of the rows: a bias, or how many rows have none; None where nobody has one."""
    sizes: list[int]
    """How many rows each group of experts and each layer of a router has."""
    routers: tuple[tuple[str, Router, int], ...]
    """Names, routers, and the number of layers of each."""

    def tensors(self) -> list[Tensor] | None:
        """Give the weights, then the biases, as they are now; None where one is a parameter no more, as of a pruned layer."""
        try:
            found = [source() for source in self.weights]
            return found + [source() for source in self.biases or () if not isinstance(source, int)]
        except KeyError:
            return None


@dataclass(frozen=True, slots=True)
class Readers:
    """Who multiplies one input by weights of its own; the product has their rows in this order."""

    groups: tuple[Group, ...] = ()
    routers: tuple[tuple[str, Router], ...] = ()
    """By name: "" for the block's, the expert's for that of its copies."""


@dataclass(frozen=True, slots=True)
class Work:
    """One expert's part in changing a module's output."""

    place: "Place"
    input_name: str
    columns: Columns
    reads_own_input: bool
    """Whether it reads what the module reads; else what the MLP around the module reads."""
    ups: tuple[Source, ...] = ()
    """What multiplies its gated rows, [D_out, K] each, if it is joined with others at a linear layer."""


@dataclass(frozen=True, slots=True)
class SiteWork:
    """What happens to one module's output."""

    single: tuple[Work, ...]
    """Experts whose own ``change`` is called."""
    joint: tuple[tuple[Columns, tuple[Work, ...]], ...]
    """Experts that are added together (`moa_peft.fused`), by the columns that they change."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What of one mixture runs where."""

    adapter: str
    mixture: "Mixture"
    key: str
    """Names the block and the adapter; under it instance gates are kept for the calls that follow."""
    work: Mapping[str, SiteWork]
    """By the path of the module whose output is changed."""
    readers: Mapping[str, Readers]
    """By the name of an input: who reads it on the fused path."""
    gate_parts: tuple[int, ...]
    """How many of the block's gates each part of them has."""
    gate_rows: Mapping[str, tuple[int, int]]
    """By an expert's name: which part its gate is in, and which row of it."""
    router: Router | None
    """The block's."""
    copied: frozenset[str]
    """The names of the experts that have several copies, and a router for them."""
    copied_at_attention: tuple["Place", ...]
    """Those of them that are at the attention."""
    uses: int
    """How many modules' outputs are changed."""
    sources: dict[tuple[str, tuple[bool, ...]], Sources] = field(
        default_factory=dict, compare=False, kw_only=True
    )
    """By the name of an input and which of its routers' gates are training; found by the first such pass."""
    is_straight: bool
    """Whether all is joined and all gates come of what q, k and v read, so that `moa_peft.decoding` can follow it."""

    def sources_of(self, name: str) -> Sources:
        """Where the weights of everything that reads an input are: those that lie side by side, if it is they."""
        readers = self.readers[name]
        key = name, tuple([router.gate.training for _, router in readers.routers])
        found = self.sources.get(key)
        if found is None:
            found = _sources(self.mixture, readers)
            beside = self.mixture.side_by_side.get(name)
            if beside is not None and beside.is_of(found):
                found = beside.sources
            self.sources[key] = found
        return found


def input_of(site: LinearSite | AttentionSite) -> str:
    """The name of what a site reads, the same for sites that read the same tensor."""
    return _INPUTS.get(site.name, site.name)


def _joins(expert: nn.Module, slot: Slot | None) -> bool:
    """Whether the fused path computes an expert."""
    if isinstance(expert, AttentionExpert):
        return expert.is_prompt
    return isinstance(expert, LinearExpert) and expert.is_bottleneck and (slot is None or slot.groups == 1)


def reads_mlp_output(mixture: "Mixture") -> bool:
    """Whether an expert beside the MLP is computed by its own ``change``, which may read what the MLP gives."""
    return any(
        place.site.name == "mlp" and not _joins(mixture.experts[place.name], None) for place in mixture.places
    )


def plan(adapter: str, mixture: "Mixture", block: Block, *, fused: bool) -> Plan:
    """Plan the passes of a mixture.

    Args:
        adapter: Its name.
        mixture: The mixture.
        block: Its block.
        fused: Whether what can be joined is.

    Returns:
        The plan. Where the MLP returns its last layer's output as it is, a fused expert beside the MLP is added there,
        together with those of that layer.
    """
    single: dict[str, list[Work]] = {}
    joint: dict[str, dict[Columns, tuple[Work, ...]]] = {}
    experts: dict[str, list[Place]] = {}  # that read an input together
    routers: dict[str, list[tuple[str, Router]]] = {}
    for place in mixture.places:
        site, expert, path = place.site, mixture.experts[place.name], place.site.path
        slot = site.slot if isinstance(site, LinearSite) else None
        joins = fused and _joins(expert, slot)
        if joins and site.name == "mlp" and block.mlp_output_path is not None:
            path = block.mlp_output_path
        one = Work(
            place=place,
            input_name=input_of(site),
            columns=None if slot is None else (slot.start, slot.start + slot.size),
            reads_own_input=path == site.path,
            ups=_ups(expert) if joins and isinstance(expert, LinearExpert) else (),
        )
        if joins:
            together = joint.setdefault(path, {})
            together[one.columns] = (*together.get(one.columns, ()), one)
        else:
            single.setdefault(path, []).append(one)
        if fused and place.name in mixture.copy_routers:
            routers.setdefault(one.input_name, []).append((place.name, mixture.copy_router(place)))
        if joins and isinstance(expert, LinearExpert):
            experts.setdefault(one.input_name, []).append(place)
    if fused and mixture.router is not None and mixture.router.reads_projection_input:
        routers.setdefault(PROJECTION_INPUT, []).append(("", mixture.router))
    neighbours = {name: _neighbours(mixture, places) for name, places in experts.items()}
    gate_parts, part_of = _gate_parts(mixture, [one for found in neighbours.values() for one in found])
    paths = {**single, **joint}
    copied = [place for place in mixture.places if place.name in mixture.copy_routers]
    return Plan(
        adapter=adapter,
        mixture=mixture,
        key=f"{block.path}.{adapter}",
        work={
            path: SiteWork(tuple(single.get(path, ())), tuple(joint.get(path, {}).items())) for path in paths
        },
        readers={
            name: Readers(
                groups=tuple(
                    _group(mixture, places, part_of[places[0].column][0])
                    for places in neighbours.get(name, ())
                ),
                routers=tuple(routers.get(name, ())),
            )
            for name in {**neighbours, **routers}
        },
        gate_parts=gate_parts,
        gate_rows={place.name: part_of[place.column] for place in mixture.places},
        router=mixture.router,
        copied=frozenset(place.name for place in copied),
        copied_at_attention=tuple(one for one in copied if isinstance(one.site, AttentionSite)),
        uses=len(paths),
        is_straight=not single and not copied and (mixture.router is None or _is_straight(mixture.router)),
    )


def _is_straight(router: Router) -> bool:
    return router.reads_projection_input and router.gate.of_rows() is not None


def _sources(mixture: "Mixture", readers: Readers) -> Sources:
    """Find the weights of everything that reads one input; routers may have other layers in training."""
    weights: list[Source] = []
    biases: list[Source | int] = []
    sizes: list[int] = []
    routers: list[tuple[str, Router, int]] = []
    for group in readers.groups:
        sizes.append(0)
        for name in group.names:
            expert: LinearExpert = mixture.experts[name]  # type: ignore[assignment]  # ModuleDict is untyped
            made = expert.bottleneck()
            weights.append(_source(expert, "down"))
            biases.append(len(made.down) if made.down_bias is None else _source(expert, "down_bias"))
            sizes[-1] += len(made.down)
    for name, router in readers.routers:
        linears = router.linears()
        weights += [_parameter(one, "weight") for one in linears]
        biases += [one.out_features if one.bias is None else _parameter(one, "bias") for one in linears]
        sizes += [one.out_features for one in linears]
        routers.append((name, router, len(linears)))
    return Sources(tuple(weights), _with_gaps_joined(biases), sizes, tuple(routers))


def _with_gaps_joined(biases: Sequence[Source | int]) -> tuple[Source | int, ...] | None:
    joined: list[Source | int] = []
    for one in biases:
        last = joined[-1] if joined else None
        if isinstance(one, int) and isinstance(last, int):
            joined[-1] = last + one
        else:
            joined.append(one)
    return tuple(joined) if any(not isinstance(one, int) for one in joined) else None


def _ups(expert: LinearExpert) -> tuple[Source, ...]:
    up, made = _source(expert, "up"), expert.bottleneck()
    if made.up_bias is None:
        return (up,)
    return up, partial(_columns, _source(expert, "up_bias"), len(made.up))


def _columns(bias: Source, outputs: int) -> Tensor:
    return bias().view(outputs, -1)


def _source(expert: LinearExpert, field: str) -> Source:
    """Say where a tensor of a bottleneck comes from: mostly a parameter, which a module's own way of asking is slow for."""
    tensor = getattr(expert.bottleneck(), field)
    for module in expert.modules():
        for name, parameter in module._parameters.items():
            if parameter is tensor:
                return _parameter(module, name)
    return partial(_made, expert, field)


def _parameter(module: nn.Module, name: str) -> Source:
    return partial(getitem, module._parameters, name)  # type: ignore[return-value]  # it is there


def _made(expert: LinearExpert, field: str) -> Tensor:
    return getattr(expert.bottleneck(), field)


def _group(mixture: "Mixture", places: Sequence["Place"], part: int) -> Group:
    expert: LinearExpert = mixture.experts[places[0].name]  # type: ignore[assignment]  # ModuleDict is untyped
    one = expert.bottleneck()
    return Group(
        names=tuple(place.name for place in places),
        part=part,
        scale=one.scale,
        activation=one.activation,
        width=one.up.shape[1],
        has_up_bias=one.up_bias is not None,
    )


def _neighbours(mixture: "Mixture", places: Sequence["Place"]) -> list[list["Place"]]:
    """Cut the experts of one input into runs that one multiplication gates: alike, with gates side by side."""
    columns = Counter(place.column for place in mixture.places)

    def kind(place: "Place") -> tuple[Any, ...]:
        expert: LinearExpert = mixture.experts[place.name]  # type: ignore[assignment]  # ModuleDict is untyped
        weights = expert.bottleneck()
        alone = place.name in mixture.copy_routers or columns[place.column] > 1 or weights.up_bias is not None
        return place.name if alone else "", len(weights.down), weights.scale, weights.activation

    runs: list[list[Place]] = []
    for place in places:
        if runs and kind(runs[-1][0]) == kind(place) and runs[-1][-1].column + 1 == place.column:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _gate_parts(
    mixture: "Mixture", runs: Sequence[Sequence["Place"]]
) -> tuple[tuple[int, ...], dict[int, tuple[int, int]]]:
    """Cut the block's gates so that each run has a part of its own.

    Returns:
        The number of gates of each part; and by its column, which part a gate is in, and which row of it.
    """
    lengths = {run[0].column: len(run) for run in runs}
    parts: list[int] = []
    part_of: dict[int, tuple[int, int]] = {}
    column = 0
    while column < len(mixture.gate_names):
        length = lengths.get(column, 1)
        part_of |= {column + row: (len(parts), row) for row in range(length)}
        parts.append(length)
        column += length
    return tuple(parts), part_of
