"""Similarity of experts whose likeness is known, and of random ones against the definition in two passes."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from moa_peft.inspection.similarity import ChangeStatistics, ChangeSums, effective_rank


def rows(number: int, size: int, seed: int) -> Tensor:
    return torch.randn(number, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(
    changes: dict[str, Tensor], outputs: dict[str, str] | None = None, batch: int = 7
) -> ChangeStatistics:
    """The statistics after a pass in batches."""
    sums = ChangeSums(outputs or dict.fromkeys(changes, "one"))
    for start in range(0, len(next(iter(changes.values()))), batch):
        sums.add({name: sums.reduce(name, one[start : start + batch]) for name, one in changes.items()})
    return sums.statistics()


def two_pass_cka(a: Tensor, b: Tensor) -> float:
    """The definition: |A^T B|^2 / (|A^T A| |B^T B|) of the centred changes."""
    a, b = a - a.mean(0), b - b.mean(0)
    return float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))


def test_one_pass_equals_the_definition_in_two_passes() -> None:
    torch.manual_seed(0)
    low = rows(101, 4, 0)
    changes = {
        "a": low @ rows(4, 30, 1) + 3,
        "b": (low + 0.5 * rows(101, 4, 2)) @ rows(4, 30, 3),
        "wide": rows(101, 9, 4) @ rows(9, 55, 5) + low @ rows(4, 55, 6),
    }
    found = summed(changes, {"a": "x", "b": "x", "wide": "y"})
    lengths = {name: one.norm(dim=1).mean() for name, one in changes.items()}
    for (place, a), (other_place, b) in product(enumerate(changes.values()), repeat=2):
        assert found.cka[place][other_place] == pytest.approx(two_pass_cka(a, b), abs=1e-9)
        expected = (
            torch.cosine_similarity(a, b).mean().item() if a.shape == b.shape else None
        )  # other widths have no cosine
        assert found.cosine[place][other_place] == (
            None if expected is None else pytest.approx(expected, abs=1e-9)
        )
    for place, (name, change) in enumerate(changes.items()):
        sizes = torch.linalg.svdvals(change)
        share = sizes / sizes.sum()
        rank = math.exp(-float(torch.xlogy(share, share).sum()))
        assert found.effective_rank[place] == pytest.approx(rank, rel=1e-6)
        assert found.norm[place] == pytest.approx(float(lengths[name]))
        assert found.norm_share[place] == pytest.approx(float(lengths[name] / sum(lengths.values())))
    assert found.mean_cka == pytest.approx(
        sum(two_pass_cka(changes[a], changes[b]) for a, b in (("a", "b"), ("a", "wide"), ("b", "wide"))) / 3
    )


def test_identical_turned_and_opposite_experts_are_alike_and_orthogonal_ones_are_not() -> None:
    a = rows(60, 5, 0)
    turn = torch.linalg.qr(rows(5, 5, 1)).Q
    none = torch.zeros(60, 5, dtype=torch.float64)
    apart = torch.cat([none[:30, :1], rows(30, 1, 2)])  # speaks where the other is silent
    first = torch.cat([rows(30, 1, 3), none[:30, :1]])
    for one in (apart, first):  # a mean of zero, so that centring moves nothing
        one[one != 0] -= one[one != 0].mean()
    found = summed({"a": a, "same": a, "turned": 3 * a @ turn, "opposite": -a})
    assert [found.cka[0][other] for other in range(4)] == pytest.approx([1, 1, 1, 1])
    assert found.cosine[0][1] == pytest.approx(1)
    assert found.cosine[0][3] == pytest.approx(-1)
    assert found.mean_cka == pytest.approx(1)
    separate = summed({"first": first, "apart": apart})
    assert separate.cka[0][1] == pytest.approx(0, abs=1e-12)
    assert separate.cosine[0][1] is None  # no token is changed by both


def test_experts_that_change_nothing_or_always_the_same_are_like_none() -> None:
    a = rows(40, 6, 0)
    constant = torch.ones(40, 6) * torch.tensor([1e-3, 2, 3, 4, 5, 6e3])
    found = summed({"a": a.float(), "zero": torch.zeros(40, 6), "constant": constant})
    assert found.cka[0] == (pytest.approx(1), None, None)
    assert found.cka[1] == found.cka[2] == (None, None, None)
    assert found.mean_cka is None
    assert found.effective_rank[1] is None
    assert found.effective_rank[2] == pytest.approx(1, abs=1e-4)
    assert found.norm[1] == 0
    assert found.norm_share[1] == 0
    assert sum(one or 0 for one in found.norm_share) == pytest.approx(1)
    nothing = summed({"a": torch.zeros(5, 2), "b": torch.zeros(5, 2)})
    assert nothing.norm_share == (None, None)


@pytest.mark.parametrize(("sizes", "expected"), [([1, 1, 1, 1], 4), ([5, 0, 0], 1), ([2, 2, 0], 2)])
def test_the_effective_rank_counts_directions_that_are_used_alike(
    sizes: list[float], expected: float
) -> None:
    second = torch.diag(torch.tensor(sizes, dtype=torch.float64).square())
    assert effective_rank(second) == pytest.approx(expected)


def test_no_statistic_depends_on_the_batches_or_on_the_order_of_the_tokens() -> None:
    changes = {"a": rows(30, 8, 0).float(), "b": rows(30, 8, 1).float()}
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    first = summed(changes, batch=30)
    for other in (
        summed(changes, batch=1),
        summed({name: one[order] for name, one in changes.items()}, batch=11),
    ):
        assert other.cka[0][1] == pytest.approx(first.cka[0][1], abs=1e-9)
        assert other.cosine[0][1] == pytest.approx(first.cosine[0][1], abs=1e-9)
        assert other.effective_rank == pytest.approx(first.effective_rank, abs=1e-9)
        assert other.norm == pytest.approx(first.norm)
