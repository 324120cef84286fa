"""What decoding uses again at each step: stacked weights, and the keys and values of prompts."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class KeptWeights:
    """Keeps what was made of weights for calls of one token.

    A call with several tokens in a row makes it anew and leaves it for the calls of one token that follow: weights that
    were changed, by whatever means, are never used beyond the next prompt. A change that torch counts is noticed at once.
    """

    def __init__(self) -> None:
        self._kept: dict[object, tuple[tuple[Tensor, ...], tuple[object, ...], Any]] = {}

    def find(
        self,
        key: object,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        decoding: bool,
        make: Callable[[], Made],
    ) -> Made:
        """Give what was made of weights, or make it.

        Args:
            key: What it is for.
            weights: What it is made of; without gradients.
            dtype: Its dtype.
            decoding: Whether the call has one token in each row.
            make: Makes it.
        """
        state = (dtype, *(0 if one.is_inference() else one._version for one in weights))
        found = self._kept.get(key)
        if decoding and found is not None and found[1] == state and all(map(operator.is_, found[0], weights)):
            return found[2]
        made = make()
        self._kept[key] = (tuple(weights), state, made)
        return made

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}
