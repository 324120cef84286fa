"""Coordinates of long vectors in the few directions that they really take.

An expert's change has as many numbers as its site has outputs, but a LoRA of rank 8 moves in 8 directions, a prompt in
the span of its values. Lengths and angles are the same in an orthonormal basis of those directions, so what is summed
up there is exact, in a small part of the memory.

Sizes: T vectors of a batch, D numbers of a vector, K directions.
"""

import torch
from torch import Tensor


class GrowingBasis:
    """An orthonormal basis of the vectors seen so far; it gains the directions that a batch brings.

    A direction is left out when its part of the energy (the sum of squared lengths so far) lies below
    ``(16 eps)^2``, eps that of the vectors' dtype: it is then rounding of the vectors themselves.

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
        noise = max((16 * eps) ** 2, 1e-13)  # float64 tells no smaller part of a difference of sums
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
        if (
            rest.shape[0] > tried
        ):  # a random mixture of the rows has their range: Halko et al., arXiv 0909.4061
            mixed = torch.randn((tried, rest.shape[0]), generator=self._sketch, dtype=torch.float64)
            rest = mixed.to(rest.device) @ rest / tried**0.5
        directions, sizes, _ = torch.linalg.svd(rest.T, full_matrices=False)
        room = self.most - self.vectors.shape[1]
        found = directions[:, sizes.square() > floor / len(sizes)][
            :, :room
        ]  # orthogonal to the rest as they are
        self.vectors = torch.cat([self.vectors, found], dim=1)
        return found.shape[1] > 0
