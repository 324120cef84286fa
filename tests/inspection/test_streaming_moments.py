"""One pass over batches gives what two passes over everything give."""

import pytest
import torch
from torch import Tensor

from moa_peft.inspection.streaming_moments import GrowingBasis, JointMoments, Moments


def rows(number: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(number, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[37], [1, 36], [1] * 37, [0, 20, 0, 17]])
def test_batches_give_the_mean_and_the_products_of_all_rows(sizes: list[int]) -> None:
    x = rows(37, 5) * 1e-3 + 1e5  # a sum of squares would lose 16 of the 16 digits of such a spread
    moments = Moments(5)
    for part in x.split(sizes):
        moments.add(part)
    centred = x - x.mean(0)
    assert moments.count == 37
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.products, centred.T @ centred, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(moments.second(), x.T @ x)


def test_a_vector_that_gains_numbers_had_zeros_there_before() -> None:
    a, b = rows(20, 4), rows(20, 3, seed=1)
    a[:12, 2:] = 0
    b[:6, 1:] = 0
    joint = JointMoments()
    joint.add({"a": a[:6, :2], "b": b[:6, :1]})
    joint.add({"a": a[6:12, :2], "b": b[6:12]})
    joint.add({"a": a[12:], "b": b[12:]})
    centred = {"a": a - a.mean(0), "b": b - b.mean(0)}
    plain = {"a": a, "b": b}
    assert joint.count == 20
    for one in "ab":
        for other in "ab":
            torch.testing.assert_close(joint.products(one, other), centred[one].T @ centred[other])
            torch.testing.assert_close(joint.second(one, other), plain[one].T @ plain[other])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "rank", "most"), [(50, 6, 50), (50, 50, 50), (300, 90, 200), (7, 1, 99)])
def test_a_basis_keeps_lengths_and_angles_and_no_more_directions_than_there_are(
    size: int, rank: int, most: int, dtype: torch.dtype
) -> None:
    x = (rows(200, rank) @ rows(rank, size, seed=1)).to(dtype)
    basis = GrowingBasis(size, most)
    parts = [basis.coordinates(part) for part in x.split([1, 2, 40, 157])]
    width = basis.vectors.shape[1]
    assert width == rank
    assert basis.captured == pytest.approx(1, abs=1e-10)
    together = torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in parts])
    limit = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        together @ together.T, x.double() @ x.double().T, rtol=limit, atol=limit * size
    )
    identity = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(basis.vectors.T @ basis.vectors, identity, atol=1e-10, rtol=0)


def test_a_basis_that_is_full_says_how_much_it_captures() -> None:
    basis = GrowingBasis(40, 10)
    x = rows(500, 40)
    for part in x.split(50):
        basis.coordinates(part)
    assert basis.vectors.shape[1] == 10
    kept = (x @ basis.vectors).square().sum() / x.square().sum()
    assert basis.captured == pytest.approx(float(kept), abs=0.02)
    assert 0.1 < basis.captured < 0.5


def test_rounding_of_half_precision_brings_no_directions() -> None:
    x = rows(100, 3) @ rows(3, 64, seed=1)
    basis = GrowingBasis(64, 64)
    for part in x.to(torch.bfloat16).split(25):
        basis.coordinates(part)
    assert basis.vectors.shape[1] == 3


def test_small_directions_of_half_precision_are_kept_whatever_the_batches() -> None:
    """They were taken for rounding up to 1.6 % of the energy, so that ranks depended on the size of a batch."""
    x = (rows(96, 24) * torch.logspace(0, -1.3, 24) @ rows(24, 64, seed=1)).to(torch.bfloat16)
    for parts in (1, 8, 96):
        basis = GrowingBasis(64, 64)
        for part in x.chunk(parts):
            basis.coordinates(part)
        assert basis.captured > 1 - 1e-3


def test_vectors_of_zeros_have_no_directions() -> None:
    basis = GrowingBasis(8, 8)
    assert basis.coordinates(torch.zeros(5, 8)).shape == (5, 0)
    assert basis.captured == 1
