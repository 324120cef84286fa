"""How alike the changes of experts are, how many directions they take, and how large they are.

Sizes: T tokens, K_a and K_b numbers of the changes of two experts a and b.
"""

import torch
from torch import Tensor

FLAT = 1e-10
"""A change whose spread is below this part of its energy is the same for every token, up to rounding."""


def linear_cka(cross: Tensor, own_a: Tensor, own_b: Tensor) -> float | None:
    """Compare two experts' changes: ``|C_ab|^2 / (|C_aa| |C_bb|)``, with ``C_ab = sum_t (a_t - m_a)(b_t - m_b)^T``.

    The sites may have different sizes. Turning a change, or making all of it larger, alters nothing.

    Args:
        cross: Float64, [K_a, K_b], C_ab; the norms are Frobenius'.
        own_a: Float64, [K_a, K_a], C_aa.
        own_b: Float64, [K_b, K_b], C_bb.

    Returns:
        In [0, 1]: 1 where b is a turned and scaled, 0 where no part of one goes with a part of the other. None where one
        of them does not change.

    Source: Kornblith et al., arXiv 1905.00414, equation 5; no departure.
    """
    scale = float(own_a.norm() * own_b.norm())
    return min(float(cross.square().sum()) / scale, 1.0) if scale > 0 else None


def is_flat(products: Tensor, second: Tensor) -> bool:
    """Tell whether a change is the same for every token, so that it can go with nothing.

    Args:
        products: Float64, [K, K], centred.
        second: Float64, [K, K], not centred.
    """
    return float(products.trace()) <= FLAT * float(second.trace())


def effective_rank(second: Tensor) -> float | None:
    """Count the directions that a change really uses: ``exp(-sum_i p_i log p_i)`` with ``p_i = s_i / sum_j s_j``.

    Args:
        second: Float64, [K, K], ``sum_t x_t x_t^T`` of the changes x_t; the s_i are the roots of its eigenvalues, the
            singular values of the changes stacked as rows.

    Returns:
        In [1, K]: 1 where all changes lie on one line, K where all directions are used alike. None where there is no
        change.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1; no departure.
    """
    if second.numel() == 0:
        return None
    sizes = torch.linalg.eigvalsh(second).clamp(min=0).sqrt()
    if not float(sizes.sum()) > 0:
        return None
    share = sizes / sizes.sum()
    return float((-torch.xlogy(share, share).sum()).exp())


def cosines(a: Tensor, b: Tensor, between: Tensor, length_a: Tensor, length_b: Tensor) -> Tensor:
    """Compare the directions of two changes of the same output: ``a_t . b_t / (|a_t| |b_t|)`` for each token.

    Args:
        a: Float64, [T, K_a], coordinates in a's basis.
        b: Float64, [T, K_b], likewise.
        between: Float64, [K_a, K_b], the products of the two bases' directions.
        length_a: Float64, [T], the lengths of a's changes.
        length_b: Float64, [T].

    Returns:
        Float64, one for each token at which neither is 0, in [-1, 1].
    """
    both = (length_a > 0) & (length_b > 0)
    return ((a @ between * b).sum(-1)[both] / (length_a[both] * length_b[both])).clamp(-1, 1)
