"""Batches of token sequences, padded on the left so that all end at the same place.

Sizes: B rows of a batch, T tokens of its longest row.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moa_peft.mixture.block_hooks import mixtures_of
from moa_peft.mixture.token_watch import prompt_lengths


def rows_at_once(model: nn.Module, batch_size: int) -> int:
    """How many rows a batch may have: one where a router pools officially, padding and all, and for MiniMax, whose cache keeps no part of its rows."""
    official = any(
        router.config.pooling == "official" for one in mixtures_of(model) for router in one.routers().values()
    )
    model_type = model.config.get_text_config().model_type  # type: ignore[operator, union-attr]  # a language model's
    return 1 if official or model_type == "minimax" else batch_size


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode inside the block, and back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def plan_batches(
    lengths: Sequence[int],
    kept: Sequence[int] = (),
    *,
    batch_size: int,
    token_budget: int,
    logit_budget: int = 0,
) -> list[list[int]]:
    """Put sequences of similar length together, the longest first.

    The plan depends on nothing but the arguments, so an interrupted run meets the same batches again.

    Args:
        lengths: Tokens of each sequence.
        kept: Positions of each sequence whose logits are needed; these cost memory times the vocabulary. Left out where they
            are few.
        batch_size: Most sequences in a batch.
        token_budget: Most tokens in a batch, padding included; one sequence alone may exceed it.
        logit_budget: Most positions with logits in a batch, padding included; one sequence alone may exceed it.

    Returns:
        The batches, each a list of places in ``lengths``; together they hold every place once.
    """
    kept = kept or [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batches: list[list[int]] = []
    longest = most_kept = 0
    for place in order:
        size = len(batches[-1]) + 1 if batches else 0
        most = max(most_kept, kept[place])
        if batches and size <= batch_size and size * longest <= token_budget and size * most <= logit_budget:
            batches[-1].append(place)
            most_kept = most
        else:
            batches.append([place])
            longest, most_kept = lengths[place], kept[place]
    return batches


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Put token sequences into one tensor, each at the right edge.

    Args:
        sequences: At least one, each with at least one token.
        device: Where the tensors go.

    Returns:
        Token ids [B, T], int64, zeros where padded, and the mask [B, T], int64, 1 for real tokens.
    """
    longest = max(len(one) for one in sequences)
    ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in sequences], device=device)  # [B, T]
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in sequences], device=device)
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0.

    Args:
        mask: Int64, [B, T], 1 for real tokens.

    Returns:
        Int64, [B, T]; 0 where padded.
    """
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def padded_call(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    keep: int = 1,
    prompts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The arguments of a call that reads sequences side by side.

    Args:
        model: The model that will be called.
        sequences: As for `pad_left`.
        keep: Last positions of each sequence whose logits are needed.
        prompts: Tokens of each that are the prompt; None where the model goes on from all of them with a cache.
    """
    ids, mask = pad_left(sequences, next(model.parameters()).device)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions(mask),
        "logits_to_keep": last_positions(keep, ids.device),
        **({} if prompts is None else prompt_lengths(model, prompts)),
    }


def rotary_switch(model: Any) -> int | None:
    """The length from which on a model turns all positions of a call by other frequencies, as Phi-3 and Phi-4-mini do (longrope).

    Beyond it a text's numbers depend on the longest of its batch, and a cache from before it is no longer right. None for none.
    """
    given: Mapping[str, Any] = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # of all layers, or by their kind
    kinds = [given, *(one for one in given.values() if isinstance(one, Mapping))]
    return next(
        (one["original_max_position_embeddings"] for one in kinds if one.get("rope_type") == "longrope"), None
    )


def last_positions(count: int, device: torch.device) -> int | Tensor:
    """The ``logits_to_keep`` that asks transformers for the logits of each row's last ``count`` positions.

    On a CPU these are indices, not their number: transformers slices for a number, and the product of a slice with the
    output layer's weight copies that weight for each row (torch 2.13: 300 times as slow for one position of 16 rows in
    bfloat16, 6 times in float32).
    """
    return torch.arange(-count, 0) if device.type == "cpu" else count
