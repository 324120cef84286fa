"""Which block of a model gets which experts: the config's targets, met with what each block has."""

import re
from dataclasses import dataclass

from torch import nn

from moa_peft.errors import UsageError, unknown
from moa_peft.mixture.adapter_file import is_saved_whole
from moa_peft.mixture.architecture import find_blocks
from moa_peft.mixture.config import ExpertConfig
from moa_peft.mixture.mixture import PlacedExpert
from moa_peft.mixture.peft_config import MoAConfig
from moa_peft.mixture.router import needs_tokens
from moa_peft.mixture.sites import Block


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What blocks of one kind get."""

    kind: str
    """As in "attention, MLP"."""
    blocks: tuple[int, ...]
    experts: tuple[str, ...]
    """A kind and a site each, as in "lora q_proj"."""
    left_out: tuple[str, ...]
    """The same for what has no place there, with the reason."""

    def text(self) -> str:
        """One line for a person."""
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        blocks = f"{len(self.blocks)} block{'s' if len(self.blocks) > 1 else ''}"
        return f"{', '.join(self.experts) or 'none'} in {blocks} of {self.kind}{left_out}"


def find_placements(model: nn.Module, config: MoAConfig) -> list[Placement]:
    """Say which kinds of blocks of a model get which experts, and what has no place in them.

    Args:
        model: The base model.
        config: As for `get_peft_model`.

    Returns:
        One for each kind of block, in the order of their first block.

    Raises:
        UsageError: As `get_peft_model` raises it.
    """
    blocks = chosen_blocks(find_blocks(model, config.architecture), config)
    check_targets(list(blocks.values()), config)
    groups: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for block in blocks.values():
        placed = tuple(f"{expert.kind} {site.name}" for expert, site in placed_experts(block, config))
        left_out = tuple(
            f"{expert.kind} {target} ({block.missing.get(target, 'it has none')})"
            for expert in _experts_of(block, config)
            for target in expert.site_names()
            if not block.places(target)
        )
        groups.setdefault((block.kind, placed, left_out), []).append(block.index)
    return [
        Placement(kind=kind, blocks=tuple(indices), experts=placed, left_out=left_out)
        for (kind, placed, left_out), indices in groups.items()
    ]


def chosen_blocks(blocks: list[Block], config: MoAConfig) -> dict[str, Block]:
    """The blocks of ``layers_to_transform``, by path."""
    known = {block.index for block in blocks}
    wanted = known if config.layers_to_transform is None else config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    layers = {index for expert in config.experts for index in expert.layers or ()}
    beyond = sorted((indices | layers) - known)
    if beyond:
        last = max(known)
        unknown_kind = sorted(set(range(last)) - known)
        but = f", of which {unknown_kind} have no place for an expert" if unknown_kind else ""
        raise UsageError(f"layers {beyond} do not exist: the model has blocks 0 to {last}{but}")
    return {block.path: block for block in blocks if block.index in indices}


def placed_experts(block: Block, config: MoAConfig) -> list[PlacedExpert]:
    """The experts of one block with their sites, without those of other layers and of excluded modules."""
    if _is_excluded(block.path, config):
        return []
    placed: list[PlacedExpert] = []
    for expert in _experts_of(block, config):
        sites = {site.name: site for target in expert.site_names() for site in block.places(target)}
        placed += [(expert, site) for site in sites.values() if not _is_excluded(site.path, config)]
    return placed


def _experts_of(block: Block, config: MoAConfig) -> list[ExpertConfig]:
    """The experts whose layers include a block."""
    return [one for one in config.experts if one.layers is None or block.index in one.layers]


def check_targets(blocks: list[Block], config: MoAConfig) -> None:
    """Refuse a target that no block knows, and an expert that no block has a place for.

    Raises:
        UsageError: With the nearest target, or with what the blocks lack.
    """
    for expert in config.experts:
        own = [one for one in blocks if expert.layers is None or one.index in expert.layers]
        if not own:
            raise UsageError(
                f"expert {expert.kind!r} is in no block: its layers {list(expert.layers or ())} are not among those of "
                "layers_to_transform"
            )
        reasons: list[str] = []
        for target in expert.site_names():
            if any(one.places(target) for one in own):
                continue
            missing = [one.missing[target] for one in own if target in one.missing]
            if not missing:
                known = {name for one in own for name in (*one.sites, *one.stand_ins)}
                raise UsageError(
                    f"expert {expert.kind!r}: {unknown(f'target of {own[0].family}', target, known)}; for a family that names "
                    "its layers otherwise give MoAConfig(architecture=ArchitectureConfig(projections={...}))"
                )
            reasons += missing[:1]
        if not any(one.places(target) for one in own for target in expert.site_names()):
            raise UsageError(
                f"expert {expert.kind!r} cannot work on {own[0].family}: {'; '.join(dict.fromkeys(reasons))}"
            )


def check_tokens(block: Block, config: MoAConfig) -> None:
    """Refuse routing that depends on which tokens are real where nothing in a block is told of them.

    Raises:
        UsageError: For a balance loss or instance gates in a block without attention.
    """
    routers = [config.router, *(one.copies()[1] for one in _experts_of(block, config))]
    if block.attention is None and any(one is not None and needs_tokens(one) for one in routers):
        raise UsageError(
            f"{block.path} ({block.kind}) has no softmax attention, which is told which tokens are real: there can be no balance "
            "loss (RouterConfig(balance=0) leaves it out) and no instance gates"
        )


def _is_excluded(path: str, config: MoAConfig) -> bool:
    """Whether PEFT's rules keep adapters away from a module."""
    if is_saved_whole(path, config.modules_to_save):
        return True
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        return re.fullmatch(excluded, path) is not None
    return any(path == one or path.endswith(f".{one}") for one in excluded)
