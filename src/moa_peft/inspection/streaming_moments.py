"""Means and cross products of vectors that come in batches, exact to rounding, in memory that no batch adds to.

Sizes: T vectors of a batch, K numbers of a vector, n vectors so far.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Moments:
    """Counts vectors and sums them up to their mean and their centred products ``sum_t (x_t - m)(x_t - m)^T``.

    Batches are joined by the update of Chan, Golub and LeVeque, ``M = M_a + M_b + d d^T n_a n_b / n`` with
    ``d = m_b - m_a``, which does not cancel where the mean is large beside the spread, as sums of squares would.

    Attributes:
        count: n.
        mean: Float64, [K].
        products: Float64, [K, K].

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983; no departure.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.products = torch.zeros((size, size), dtype=torch.float64, device=device)

    def grow(self, size: int) -> None:
        """Add numbers to the vectors; all vectors so far had 0 there."""
        more = size - len(self.mean)
        if more > 0:
            self.mean = torch.nn.functional.pad(self.mean, (0, more))
            self.products = torch.nn.functional.pad(self.products, (0, more, 0, more))

    def add(self, x: Tensor) -> None:
        """Take in a batch [T, K] of any float dtype; T may be 0."""
        number = x.shape[0]
        if number == 0:
            return
        x = x.to(torch.float64)
        mean = x.mean(dim=0)
        centred = x - mean
        total = self.count + number
        apart = mean - self.mean
        self.products += centred.T @ centred + torch.outer(apart, apart) * (self.count * number / total)
        self.mean = self.mean + apart * (number / total)
        self.count = total

    def second(self) -> Tensor:
        """The products that are not centred, ``sum_t x_t x_t^T``: float64, [K, K]."""
        return self.products + self.count * torch.outer(self.mean, self.mean)


class JointMoments:
    """The moments of several vectors of the same tokens, by label, each of which may gain numbers on the way."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._columns: dict[str, list[int]] = {}

    @property
    def count(self) -> int:
        """Tokens so far."""
        return 0 if self._moments is None else self._moments.count

    def add(self, vectors: Mapping[str, Tensor]) -> None:
        """Take in a batch.

        Args:
            vectors: Float, [T, K] each, by label; the same labels in every batch. One that has more numbers than in the
                batch before had 0 in them until now.
        """
        first = next(iter(vectors.values()))
        device, tokens = first.device, first.shape[0]
        self._moments = self._moments or Moments(0, device)
        size = len(self._moments.mean)
        for label, x in vectors.items():
            columns = self._columns.setdefault(label, [])
            new = x.shape[1] - len(columns)
            columns += range(size, size + new)
            size += new
        self._moments.grow(size)
        if size == 0:
            self._moments.count += tokens
            return
        order = torch.tensor([one for label in vectors for one in self._columns[label]], device=device)
        joined = torch.zeros((tokens, size), dtype=torch.float64, device=device)
        joined[:, order] = torch.cat([x.to(torch.float64) for x in vectors.values()], dim=1)
        self._moments.add(joined)

    def products(self, a: str, b: str) -> Tensor:
        """The centred cross products of two labels' vectors: float64, [K_a, K_b]."""
        return self._cut(self._known().products, a, b)

    def second(self, a: str, b: str) -> Tensor:
        """The same, not centred."""
        return self._cut(self._known().second(), a, b)

    def _cut(self, products: Tensor, a: str, b: str) -> Tensor:
        return products[self._columns[a]][:, self._columns[b]]

    def _known(self) -> Moments:
        assert self._moments is not None, "moments are asked for after the first batch"
        return self._moments


class GrowingBasis:
    """An orthonormal basis of the vectors seen so far; it gains the directions that a batch brings.

    A direction is left out when its part of the energy (the sum of squared lengths so far) lies below
    ``eps^2``, eps that of the vectors' dtype: it is then rounding of the vectors themselves.

    Args:
        size: D.
        most: Directions kept at most. Beyond them vectors are projected, and ``captured`` says how much that leaves.
        device: Where the vectors come from.
    """

    def __init__(self, size: int, most: int, device: torch.device | None = None) -> None:
        self.most = min(most, size)
        self.vectors = torch.zeros((size, 0), dtype=torch.float64, device=device)  # [D, K]
        self._energy = 0.0
        self._kept = 0.0
        self._sketch = torch.Generator().manual_seed(0)

    @property
    def captured(self) -> float:
        """The part of the energy that lies in the basis, in [0, 1]; 1 where nothing had to be left out."""
        return min(self._kept / self._energy, 1.0) if self._energy > 0 else 1.0

    def coordinates(self, x: Tensor) -> Tensor:
        """Express vectors in the basis, which grows first where they need it.

        Args:
            x: Float, [T, D].

        Returns:
            Float64, [T, K]; K may be larger than at the last call, the directions before keep their places.
        """
        eps = torch.finfo(x.dtype).eps
        noise = max(eps**2, 1e-13)  # float64 tells no smaller part of a difference of sums
        x = x.to(torch.float64)
        self._energy += float(x.square().sum())
        inside = x @ self.vectors  # [T, K]
        outside = float(x.square().sum() - inside.square().sum())
        tried = 32
        while outside > noise * self._energy and self.vectors.shape[1] < self.most:
            if not self._extend(x - inside @ self.vectors.T, tried, noise * self._energy):
                break
            inside = x @ self.vectors
            outside = float(x.square().sum() - inside.square().sum())
            tried *= 2
        self._kept += float(inside.square().sum())
        return inside

    def _extend(self, rest: Tensor, tried: int, floor: float) -> bool:
        """Add the main directions of what lies outside [T, D]; False where it has none above the floor."""
        # a random mixture of the rows has their range: Halko et al., arXiv 0909.4061
        if rest.shape[0] > tried:
            mixed = torch.randn((tried, rest.shape[0]), generator=self._sketch, dtype=torch.float64)
            rest = mixed.to(rest.device) @ rest / tried**0.5
        directions, sizes, _ = torch.linalg.svd(rest.T, full_matrices=False)
        room = self.most - self.vectors.shape[1]
        # orthogonal to the rest as they are
        found = directions[:, sizes.square() > floor / len(sizes)][:, :room]
        self.vectors = torch.cat([self.vectors, found], dim=1)
        return found.shape[1] > 0
