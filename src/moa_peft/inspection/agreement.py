"""Whether two adapters, or two seeds of one, do the same on the same tokens.

Sizes: T tokens of a batch, E experts that both have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_peft.inspection.observer import Observed, Where
from moa_peft.inspection.similarity import Change, joint_cka
from moa_peft.inspection.streaming_moments import JointMoments, Moments


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreementStatistics:
    """How two adapters agree in one router, or group of experts, of one block."""

    layer: int
    """The block, from 0."""
    router: str
    """"" for the block's; an expert's name for that of its copies."""
    names: tuple[str, ...]
    """The experts that both have."""
    gate_correlation: tuple[float | None, ...]
    """Pearson's correlation of each expert's two gates over the tokens; None where one does not vary."""
    gate_difference: tuple[float | None, ...]
    """Mean of the absolute difference of each expert's two gates; None where the router is not in both."""
    change_cka: tuple[float | None, ...]
    """Linear CKA between each expert's two changes; None where one does not vary."""


class AgreementSums:
    """Streaming sums over what two adapters said of the same tokens."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, str], tuple[str, ...]] = {}
        self._gates: dict[tuple[int, str], Moments] = {}
        self._apart: dict[tuple[int, str], Tensor] = {}
        self._changes: dict[tuple[int, str], dict[str, JointMoments]] = {}

    def add(self, one: Observed, other: Observed, names: dict[Where, tuple[str, ...]]) -> None:
        """Sum up a batch that both adapters have read; ``names`` are what each router weights."""
        others = {where[1:]: where for where in (*other.gates, *other.changes)}  # by layer and router
        for where, gates in one.gates.items():
            twin = others.get(where[1:], where)
            if twin in other.gates and len(gates) == len(other.gates[twin]):
                self._add_gates(where[1:], gates, other.gates[twin], names[where], names[twin])
        for where, changes in one.changes.items():
            twin = others.get(where[1:], where)
            if twin in other.changes:
                self._add_changes(where[1:], changes, other.changes[twin])

    def statistics(self) -> list[AgreementStatistics]:
        """How they agree so far, by layer."""
        found: list[AgreementStatistics] = []
        for key in sorted(self._changes.keys() | self._gates.keys()):
            joint = self._changes.get(key, {})
            correlation, difference = self._of_gates(key)
            names = tuple(dict.fromkeys([*self._names.get(key, ()), *joint]))
            found.append(
                AgreementStatistics(
                    layer=key[0],
                    router=key[1],
                    names=names,
                    gate_correlation=tuple(correlation.get(one) for one in names),
                    gate_difference=tuple(difference.get(one) for one in names),
                    change_cka=tuple(
                        joint_cka(joint[one], "one", "other") if one in joint else None for one in names
                    ),
                )
            )
        return found

    def _add_gates(
        self, key: tuple[int, str], a: Tensor, b: Tensor, a_names: Sequence[str], b_names: Sequence[str]
    ) -> None:
        common = tuple(name for name in a_names if name in b_names)
        if not common:
            return
        a = a[:, [list(a_names).index(name) for name in common]].double()  # [T, E]
        b = b[:, [list(b_names).index(name) for name in common]].double()
        if key not in self._gates:
            self._names[key] = common
            self._gates[key] = Moments(2 * len(common), a.device)
            self._apart[key] = a.new_zeros(len(common))
        self._gates[key].add(torch.cat([a, b], dim=1))
        self._apart[key] += (a - b).abs().sum(0)

    def _add_changes(self, key: tuple[int, str], one: dict[str, Change], other: dict[str, Change]) -> None:
        joint = self._changes.setdefault(key, {})
        for name in one:
            if name in other:
                both = {"one": one[name].coordinates, "other": other[name].coordinates}
                joint.setdefault(name, JointMoments()).add(both)

    def _of_gates(self, key: tuple[int, str]) -> tuple[dict[str, float | None], dict[str, float]]:
        if key not in self._gates:
            return {}, {}
        moments, names = self._gates[key], self._names[key]
        number, products = len(names), moments.products
        spread = products.diagonal().sqrt()
        correlation: dict[str, float | None] = {}
        for place, name in enumerate(names):
            scale = float(spread[place] * spread[number + place])
            correlation[name] = float(products[place, number + place]) / scale if scale > 0 else None
        apart = (self._apart[key] / moments.count).tolist()
        return correlation, dict(zip(names, apart, strict=True))
