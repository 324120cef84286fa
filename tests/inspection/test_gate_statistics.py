"""Statistics of routers whose answers are known."""

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from moa_peft.inspection.gate_statistics import (
    BINS,
    CLASSES,
    POSITIONS,
    GateSums,
    gate_sums,
    load_share,
    load_variation,
    position_range,
    token_class,
    token_entropy,
)

UNIFORM = torch.full((12, 4), 0.25)
ONE_HOT = torch.eye(4)[[2] * 12]
ALTERNATING = torch.eye(4)[[0, 1, 2, 3] * 3]
DEAD = torch.tensor([[0.5, 0.5, 0.0, 0.5]] * 12)
NOTHING = torch.zeros(12, 4)


@pytest.mark.parametrize(
    ("gates", "share", "variation", "entropy", "active"),
    [
        (UNIFORM, [0.25] * 4, 0.0, 1.0, 4),
        (ONE_HOT, [0, 0, 1, 0], math.sqrt(3), 0.0, 1),
        (ALTERNATING, [0.25] * 4, 0.0, 0.0, 1),
        (DEAD, [1 / 3, 1 / 3, 0, 1 / 3], math.sqrt(1 / 3), math.log(3) / math.log(4), 3),
    ],
)
def test_load_variation_and_entropy_of_known_routers(
    gates: Tensor, share: list[float], variation: float, entropy: float, active: int
) -> None:
    sums = gate_sums(gates)
    torch.testing.assert_close(load_share(sums.gate), torch.tensor(share, dtype=torch.float64))
    assert load_variation(sums.gate) == pytest.approx(variation, abs=1e-7)
    assert float(sums.entropy[0] / sums.entropy[1]) == pytest.approx(entropy, abs=1e-7)
    assert sums.num_active.tolist() == [12.0 if number == active else 0.0 for number in range(5)]


def test_where_nothing_is_used_there_is_neither_load_nor_entropy() -> None:
    sums = gate_sums(NOTHING)
    assert load_variation(sums.gate) is None
    assert sums.entropy.tolist() == [0.0, 0.0]
    assert load_variation(torch.tensor([3.0], dtype=torch.float64)) is None
    assert token_entropy(torch.ones(2, 1, dtype=torch.float64)).isnan().all()


def test_gates_are_counted_above_zero_and_above_half() -> None:
    sums = gate_sums(torch.tensor([[0.0, 0.5, 0.51], [0.2, 0.5, 0.0], [0.9, 0.0, 0.0]]))
    assert sums.active.tolist() == [2, 2, 1]
    assert sums.above_half.tolist() == [1, 0, 1]
    assert sums.num_active.tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(
        sums.gate, torch.tensor([1.1, 1.0, 0.51], dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        sums.square, torch.tensor([0.85, 0.5, 0.2601], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_gates_are_averaged_by_the_range_of_their_position_and_by_the_class_of_their_token() -> None:
    positions = torch.tensor([0, 1, 2, 3, 4, 7, 8, 2**14 - 1, 2**14, 2**20])
    ranges = [0, 1, 2, 2, 3, 3, 4, 14, 15, 15]
    assert position_range(positions).tolist() == ranges
    gates = torch.rand(10, 2, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, 3, 4, 0, 1, 1, 1, 1])
    sums = gate_sums(gates, positions=positions, classes=classes)
    for groups, number, total, tokens in (
        (torch.tensor(ranges), POSITIONS, sums.position, sums.position_tokens),
        (classes, len(CLASSES), sums.token_class, sums.token_class_tokens),
    ):
        for group in range(number):
            chosen = gates[groups == group].double()
            assert tokens[group] == len(chosen)
            torch.testing.assert_close(total[group], chosen.sum(0))


def test_thresholds_are_counted_by_size() -> None:
    threshold = torch.tensor([0.0, 0.1251, 0.1249, 0.5, 1.0])
    sums = gate_sums(UNIFORM[:5], threshold=threshold)
    assert {place: int(n) for place, n in enumerate(sums.threshold_bins) if n} == {
        0: 1, 24: 1, 25: 1, BINS // 2: 1, BINS - 1: 1
    }  # fmt: skip
    assert sums.threshold.tolist() == pytest.approx([5, 1.75, 0.1251**2 + 0.1249**2 + 0.25 + 1])


@pytest.mark.parametrize("gates", [UNIFORM, ONE_HOT, ALTERNATING, DEAD, NOTHING])
def test_the_sums_of_batches_add_up_to_those_of_all_tokens_in_any_order(gates: Tensor) -> None:
    noisy = (gates + 0.1 * torch.rand(12, 4, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    more = {"threshold": noisy[:, 0], "positions": torch.arange(12), "classes": torch.arange(12) % 5}

    def sums(chosen: list[int]) -> GateSums:
        return gate_sums(noisy[chosen], **{name: one[chosen] for name, one in more.items()})

    whole = sums(list(range(12)))
    parts = sums([11, 3, 4]) + sums([]) + sums([0, 1, 2, 5, 6, 7, 8, 9, 10])
    for one in fields(GateSums):
        torch.testing.assert_close(getattr(parts, one.name), getattr(whole, one.name))


@pytest.mark.parametrize(
    ("piece", "flags", "expected"),
    [
        (" seven", {}, "word"),
        ("é", {}, "word"),
        (" 42", {}, "number"),
        ("x2", {}, "number"),
        ("?\n", {}, "punctuation"),
        ("  ", {}, "punctuation"),
        ("", {}, "punctuation"),
        (" 42", {"template": True}, "template"),
        ("<|im_end|>", {"special": True, "template": True}, "special"),
    ],
)
def test_a_token_belongs_to_the_first_class_that_holds(
    piece: str, flags: dict[str, bool], expected: str
) -> None:
    found = token_class(piece, **{"special": False, "template": False, **flags})
    assert CLASSES[found] == expected
