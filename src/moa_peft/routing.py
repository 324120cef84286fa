"""Router arithmetic: pure functions of tensors, no module state.

Sizes: B rows, T tokens of a row, E experts. Everything here is float32.
"""

import torch
from torch import Tensor


def sigmoid_gates(logits: Tensor) -> Tensor:
    """Weigh each expert for itself: Soft MoA.

    Args:
        logits: Float, [B, T, E], the router's output.

    Returns:
        Float32, [B, T, E], each in (0, 1); they need not sum to 1.

    Source: MoA, arXiv 2506.05928, Soft MoA; no departure.
    """
    return torch.sigmoid(logits.float())


def learned_threshold(logits: Tensor, maximum: float) -> Tensor:
    """Turn the threshold function's output into a threshold for each token.

    Args:
        logits: Float, [B, T, 1].
        maximum: Gamma_max, the upper bound.

    Returns:
        Float32, [B, T, 1], in (0, maximum).

    Source: MoA, arXiv 2506.05928, Sparse MoA; no departure.
    """
    return maximum * torch.sigmoid(logits.float())


def active_experts(scores: Tensor, threshold: Tensor, at_least_one: bool) -> Tensor:
    """Say which experts are on: those whose score reaches the threshold.

    Args:
        scores: Float32, [B, T, E].
        threshold: Float32, broadcastable to [B, T, 1].
        at_least_one: Also keep the best expert of a token (all of them on a tie).

    Returns:
        Bool, [B, T, E].
    """
    active = scores >= threshold
    return active | (scores == scores.amax(dim=-1, keepdim=True)) if at_least_one else active


def sparse_gates(scores: Tensor, threshold: Tensor, *, bandwidth: float, at_least_one: bool) -> Tensor:
    """Switch off the experts below the threshold, with a gradient for a learned threshold.

    Args:
        scores: Float32, [B, T, E], from `sigmoid_gates`.
        threshold: Float32, [B, T, 1]; one without a gradient (constant, or the official dead one) stays as it is.
        bandwidth: Width of the estimate, in units of the score; above 0.
        at_least_one: Keep the best expert of a token on even below the threshold.

    Returns:
        Float32, [B, T, E]: the score where an expert is on, 0 where it is off. The scores get the exact gradient of
        that (``gradient * active``), as in the official code.

    Source: MoA, arXiv 2506.05928, Sparse MoA: ``g = s * [s >= Gamma]``. There the hard mask gives Gamma no gradient at
    all. Here ``s * [s >= Gamma]`` is taken for what it is, a JumpReLU with a learned threshold, and gets the
    straight-through estimate of Rajamanoharan et al., arXiv 2407.14435, section 4:
    ``d g / d Gamma = -(s / bandwidth) K((s - Gamma) / bandwidth)``. Departures: K is the logistic density, not a
    rectangle, so that no threshold is ever too far away to learn; the factor is the score s, which equals Gamma at
    the jump.
    """
    gates = scores * active_experts(scores, threshold, at_least_one)
    if not threshold.requires_grad:
        return gates
    fixed = scores.detach()
    estimate = fixed * torch.sigmoid((fixed - threshold) / bandwidth)  # its slope in Gamma is the one above
    if at_least_one:  # the best expert is on whatever the threshold, so it tells nothing about it
        estimate = estimate * (fixed < fixed.amax(dim=-1, keepdim=True))
    return gates + (estimate - estimate.detach())  # adds exactly 0, and the estimate's gradient
