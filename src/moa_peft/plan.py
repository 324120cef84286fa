"""What of a mixture runs where: which experts change which module's output, and who reads which input.

It is made once, when the block's modules are hooked, so that a pass has little to find out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

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


@dataclass(frozen=True, slots=True)
class Reader:
    """A router or an expert that multiplies an input by weights of its own."""

    name: str
    """The expert's name, or that of the router: "" for the block's, the expert's for that of its copies."""
    module: Router | LinearExpert


@dataclass(frozen=True, slots=True)
class Work:
    """One expert's part in changing a module's output."""

    place: "Place"
    input_name: str
    columns: Columns
    reads_own_input: bool
    """Whether it reads what the module reads; else what the MLP around the module reads."""


@dataclass(frozen=True, slots=True)
class SiteWork:
    """What happens to one module's output."""

    single: tuple[Work, ...]
    """Experts whose own ``change`` is called."""
    joint: Mapping[Columns, tuple[Work, ...]]
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
    readers: Mapping[str, tuple[Reader, ...]]
    """By the name of an input: who reads it on the fused path."""
    router: Router | None
    """The block's."""
    copied: frozenset[str]
    """The names of the experts that have several copies, and a router for them."""
    copied_at_attention: tuple["Place", ...]
    """Those of them that are at the attention."""
    uses: int
    """How many modules' outputs are changed."""


def input_of(site: LinearSite | AttentionSite) -> str:
    """The name of what a site reads, the same for sites that read the same tensor."""
    return _INPUTS.get(site.name, site.name)


def _joins(expert: nn.Module, slot: Slot | None) -> bool:
    """Whether the fused path computes an expert."""
    if isinstance(expert, AttentionExpert):
        return expert.is_prompt
    return isinstance(expert, LinearExpert) and expert.is_bottleneck and (slot is None or slot.groups == 1)


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
    readers: dict[str, tuple[Reader, ...]] = {}

    def reads(name: str, reader: Reader) -> None:
        readers[name] = (*readers.get(name, ()), reader)

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
        )
        if joins:
            together = joint.setdefault(path, {})
            together[one.columns] = (*together.get(one.columns, ()), one)
        else:
            single.setdefault(path, []).append(one)
        if fused and place.name in mixture.copy_routers:
            reads(one.input_name, Reader(place.name, mixture.copy_router(place)))
        if joins and isinstance(expert, LinearExpert):
            reads(one.input_name, Reader(place.name, expert))
    if fused and mixture.router is not None and mixture.router.reads_projection_input:
        reads(PROJECTION_INPUT, Reader("", mixture.router))
    paths = {**single, **joint}
    copied = [place for place in mixture.places if place.name in mixture.copy_routers]
    return Plan(
        adapter=adapter,
        mixture=mixture,
        key=f"{block.path}.{adapter}",
        work={path: SiteWork(tuple(single.get(path, ())), joint.get(path, {})) for path in paths},
        readers=readers,
        router=mixture.router,
        copied=frozenset(place.name for place in copied),
        copied_at_attention=tuple(one for one in copied if isinstance(one.site, AttentionSite)),
        uses=len(paths),
    )
