"""Instance gates in continuous batching, where many requests share a call and their keys live in pages.

A request's first token stands at the start of its first block of pages for as long as it runs, so that block's number is
the request's name: gates found in the first call are kept under it, and looked up by it in later calls.

Sizes: T tokens of a call, C gates, S requests of a call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moa_peft.errors import UsageError

LAYERS = "full_attention"


@dataclass(frozen=True, kw_only=True)
class PagedRequests:
    """The requests of one call of continuous batching."""

    kept: dict[str, Tensor]
    """Float32, [blocks of pages, C], by decoder block and adapter: the gates of running requests."""
    num_blocks: int
    first_block: Tensor
    """Int64, [T]: the name of each token's request."""
    is_first: Tensor
    """Bool, [T]: whether this is the first call of a token's request."""
    is_split: Tensor
    """Bool, a scalar: whether a request begins here whose prompt goes on in a later call."""
    checked: list[str] = field(default_factory=list)
    """Keys already checked against ``is_split``; one check a call is enough."""

    def keep(self, key: str, gates: Tensor) -> Tensor:
        """Keep the gates of new requests, and give running ones those of their first call.

        Args:
            key: Decoder block and adapter.
            gates: Float32, [1, T, C], made from this call's tokens.

        Returns:
            Float32, [1, T, C].

        Raises:
            UsageError: If a prompt is split over calls.
        """
        self._check_whole(key)
        if key not in self.kept:
            self.kept[key] = gates.new_zeros(self.num_blocks, gates.shape[-1])
        table = self.kept[key]
        chosen = torch.where(self.is_first.unsqueeze(-1), gates[0], table[self.first_block])
        table[self.first_block] = chosen
        return chosen.unsqueeze(0)

    def _check_whole(self, key: str) -> None:
        """Refuse a split prompt."""
        if self.checked:
            return
        self.checked.append(key)
        if holds(self.is_split):
            raise UsageError(
                "continuous batching splits a prompt over several calls, but instance gates are made of the whole "
                "prompt in one: give ContinuousBatchingConfig(max_batch_tokens=...) more than the prompts that run at "
                "once have together, and num_return_sequences 1"
            )


def holds(condition: bool | Tensor) -> bool:
    """Whether a condition holds and can be looked at, for which the host waits; a graph or a tensor without data tells nothing."""
    if not isinstance(condition, Tensor):
        return condition
    if torch.compiler.is_compiling() or (condition.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    try:
        return bool(condition)
    except RuntimeError:  # a fake tensor, one on the meta device or under vmap
        return False


def paged_requests(kwargs: Mapping[str, Any]) -> tuple[Tensor, PagedRequests] | None:
    """Read the arguments of a call of continuous batching.

    Args:
        kwargs: The model's keyword arguments.

    Returns:
        The number of each token's request in the call, int64 [1, T], and the requests; None for any other call.

    Raises:
        UsageError: If requests share blocks of pages, or blocks are not found by index.
    """
    cache = kwargs.get("cache")
    allocators = getattr(cache, "cache_allocators", None)
    if cache is None or allocators is None:
        return None
    if cache.use_prefix_sharing:
        raise UsageError(
            "continuous batching shares the keys of equal prefixes, but with instance gates keys depend on the whole "
            "prompt: give generate_batch(continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False))"
        )
    if LAYERS not in allocators or kwargs.get("block_table") is not None:
        raise UsageError(
            "instance gates in continuous batching need full attention and no block table: this model or attention "
            "implementation uses another; use generate() instead, or attn_implementation='sdpa'"
        )
    allocator = allocators[LAYERS]
    ends = kwargs["cu_seq_lens_q"][1:].long()
    positions = kwargs["position_ids"][0]
    requests = torch.searchsorted(ends, torch.arange(len(positions), device=ends.device), right=True)
    requests = requests.clamp(max=len(ends) - 1)  # padding at the end belongs to no request
    starts = kwargs["cu_seq_lens_q"][:-1].long()
    is_first = positions[starts.clamp(max=len(positions) - 1)] == 0  # [S]
    stride = allocator.block_physical_stride
    written = kwargs["write_index"][allocator.index]
    slots = written[starts.clamp(max=len(written) - 1)]
    read = kwargs["read_index"][allocator.index]
    if read.numel():
        past = read[kwargs["cu_seq_lens_k"][LAYERS][:-1].long().clamp(max=len(read) - 1)]
        slots = torch.where(is_first, slots, past)
    # a sequence whose last token gives no logits has more of its prompt to come
    is_whole = torch.isin(ends - 1, kwargs["logits_indices"].long()) | (ends == starts)
    if not hasattr(cache, "moa_instance_gates"):
        cache.moa_instance_gates = {}
    found = PagedRequests(
        kept=cache.moa_instance_gates,
        num_blocks=2 * allocator.cache_tensor.shape[0] // stride + 1,
        first_block=(slots // stride)[requests],
        is_first=is_first[requests],
        is_split=(is_first & ~is_whole).any(),
    )
    return requests.unsqueeze(0), found
