"""The gates of single tokens that a page shows: of the first prompts, as many as there is room for.

Sizes: T tokens of a prompt, E experts.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_peft.inspection.forward_pass import TokenText
from moa_peft.inspection.observer import Observed, Where

VALUES = 1_600_000
"""Most gates that are kept, so that a page with them stays under five megabytes."""
LEVELS = 4095
"""Steps that a gate in [0, 1] is told apart in: two letters of base 64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPrompt:
    """A prompt with the gates of its tokens."""

    number: int
    """Its place among all prompts, from 1."""
    text: TokenText
    gates: dict[Where, Tensor]
    """Float32, [T, E]; [1, E] where the whole instance has the same."""


class ShownTokens:
    """Keeps the gates of the first prompts while a model reads; what does not fit is left out.

    Args:
        texts: All prompts.
        gates_a_token: Gates that one token has in all layers, of all adapters.
        values: Most gates kept.
    """

    def __init__(self, texts: Sequence[TokenText], gates_a_token: int, values: int = VALUES) -> None:
        self._texts = texts
        room = values // gates_a_token if gates_a_token else 0  # without gates there is nothing to show
        self._tokens: dict[int, int] = {}
        for place, text in enumerate(texts):
            if room <= 0:
                break
            self._tokens[place] = min(len(text.ids), room)
            room -= len(text.ids)
        self._gates: dict[int, dict[Where, Tensor]] = {place: {} for place in self._tokens}

    def keep(self, places: Sequence[int], observed: Observed) -> None:
        """Keep what is wanted of a batch; ``places`` are its texts, in the order of the rows."""
        ends = torch.tensor([len(self._texts[place].ids) for place in places]).cumsum(0).tolist()
        for where, gates in observed.gates.items():
            whole = len(gates) == len(places) != ends[-1]  # the same for all tokens of an instance
            for row, place in enumerate(places):
                if place not in self._gates:
                    continue
                start = ends[row] - len(self._texts[place].ids)
                rows = gates[row : row + 1] if whole else gates[start : start + self._tokens[place]]
                self._gates[place][where] = rows.float().cpu().clone()

    def prompts(self) -> list[ShownPrompt]:
        """The prompts that are shown, cut to what fits."""
        shown: list[ShownPrompt] = []
        for place, tokens in self._tokens.items():
            text = self._texts[place]
            cut = TokenText(ids=text.ids[:tokens], pieces=text.pieces[:tokens], classes=text.classes[:tokens])
            shown.append(ShownPrompt(number=place + 1, text=cut, gates=self._gates[place]))
        return shown


def encode_gates(gates: Tensor) -> str:
    """Write gates as text: two letters of base 64 each, row by row, the nearest of 4,096 levels.

    Args:
        gates: Float32, [T, E]; what lies outside [0, 1] is written as the nearest end.
    """
    levels = (gates.double().clamp(0, 1) * LEVELS).round().long().flatten().tolist()
    three = b"".join(
        ((one << 12) | other).to_bytes(3, "big")
        for one, other in zip(levels[::2], [*levels[1::2], *([0] * (len(levels) % 2))], strict=True)
    )
    return base64.b64encode(three).decode("ascii")[: 2 * len(levels)]
