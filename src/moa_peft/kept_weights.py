"""What decoding uses again at each step: stacked weights, and the keys and values of prompts."""

import operator
from typing import Any

from torch import Tensor, nn


class KeptWeights:
    """Keeps what was made of a module's weights for calls of one token.

    A call with several tokens in a row makes it anew and leaves it for the calls of one token that follow: weights that
    were changed, by whatever means, are never used beyond the next such call. A change that torch counts is noticed by the
    next `begin`; one it does not count (of ``.data``), or one of the frozen model's, is not before a call of several tokens.
    """

    def __init__(self) -> None:
        self._kept: dict[object, Any] = {}
        self._slots: list[tuple[dict[str, Any], str]] = []  # where the module has its parameters
        self._weights: list[Tensor] = []
        self._versions: list[int] = []

    def begin(self, module: nn.Module, *, decoding: bool) -> bool:
        """Begin a call without gradients; forget what was made of weights that are no longer the module's.

        Args:
            module: Whose weights everything is made of; always the same.
            decoding: Whether the call has one token in each row.

        Returns:
            Whether what was kept still holds.
        """
        if not decoding or not self._slots:
            self._slots = [
                (one._parameters, name)
                for one in module.modules()
                for name, weight in one._parameters.items()
                if weight is not None
            ]
        weights = [parameters[name] for parameters, name in self._slots]
        try:
            versions = [one._version for one in weights]
        except RuntimeError:  # tensors made in inference mode have none
            versions = [0 if one.is_inference() else one._version for one in weights]
        if decoding and versions == self._versions and all(map(operator.is_, weights, self._weights)):
            return True
        self._kept.clear()
        self._weights, self._versions = weights, versions
        return False

    def find(self, key: object) -> Any:
        """What was kept under a key, which says what it is for and its dtype; None where there is nothing."""
        return self._kept.get(key)

    def made(self, key: object) -> Any:
        """What was kept under a key.

        Raises:
            KeyError: If there is nothing.
        """
        return self._kept[key]

    def keep(self, key: object, made: object) -> None:
        """Keep what was made of the weights."""
        self._kept[key] = made

    def clear(self) -> None:
        """Forget everything."""
        self._kept, self._slots, self._weights, self._versions = {}, [], [], []

    def __getstate__(self) -> dict[str, Any]:
        return KeptWeights().__dict__
