"""Router arithmetic: pure functions of tensors, no module state.

Sizes: B rows, T tokens of a row, E experts. Everything here is float32, or float64 for float64 input.
"""

import torch
from torch import Tensor

from moa_peft.mixture.precision import at_least_float32


def sigmoid_gates(logits: Tensor) -> Tensor:
    """Weigh each expert for itself: Soft MoA.

    Args:
        logits: Float, [B, T, E], the router's output.

    Returns:
        Float32, [B, T, E], each in (0, 1); they need not sum to 1.

    Source: MoA, arXiv 2506.05928, Soft MoA; no departure.
    """
    return torch.sigmoid(at_least_float32(logits))


def learned_threshold(logits: Tensor, maximum: float) -> Tensor:
    """Turn the threshold function's output into a threshold for each token.

    Args:
        logits: Float, [B, T, 1].
        maximum: Gamma_max, the upper bound.

    Returns:
        Float32, [B, T, 1], in (0, maximum).

    Source: MoA, arXiv 2506.05928, Sparse MoA; no departure.
    """
    return maximum * torch.sigmoid(at_least_float32(logits))


def active_experts(scores: Tensor, threshold: Tensor, at_least_one: bool) -> Tensor:
    """Say which experts are on: those whose score reaches the threshold.

    Args:
        scores: Float32, [B, T, E].
        threshold: Float32, broadcastable to [B, T, 1].
        at_least_one: Also keep the best expert of a token (all of them on a tie).

    Returns:
        Bool, [B, T, E].
    """
    if at_least_one:
        threshold = torch.minimum(threshold, scores.amax(dim=-1, keepdim=True))
    return scores >= threshold


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
    if not torch.is_grad_enabled():
        return gates
    fixed = scores.detach()
    reached = torch.sigmoid((fixed - threshold) / bandwidth)
    if at_least_one:  # the best expert is on whatever the threshold, so it says nothing about it
        fixed = fixed * (fixed < fixed.amax(dim=-1, keepdim=True))
    return gates + fixed * (reached - reached.detach())  # adds 0, with the gradient of the estimate


def top_k_gates(logits: Tensor, keep: int) -> Tensor:
    """Keep the best experts of each token and weigh them by the softmax over them alone.

    Args:
        logits: Float32, [B, T, E].
        keep: Experts kept, in 1..E.

    Returns:
        Float32, [B, T, E]; a token's weights sum to 1 and all but ``keep`` of them are 0.

    Source: Shazeer et al., arXiv 1701.06538, equations 3 and 5; no departure.
    """
    best = logits.topk(keep, dim=-1)
    return torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(dim=-1))


def threshold_gates(margin: Tensor) -> Tensor:
    """Weigh experts by how far their probability lies above the threshold.

    Args:
        margin: Float32, [B, T, E], softmax probability minus the token's threshold; at least one of a token's is
            above 0, since the threshold is below 1 / E.

    Returns:
        Float32, [B, T, E]; a token's weights sum to 1, those of experts below the threshold are 0.

    Source: AdaMoLE, arXiv 2405.00361; no departure.
    """
    above = margin.clamp(min=0)
    return above / above.sum(dim=-1, keepdim=True)


def sparsegen_gates(logits: Tensor, concentration: Tensor) -> Tensor:
    """Project logits onto the probability simplex, the more sparsely the nearer the concentration is to 1.

    The closest point ``p`` of the simplex in ``|p - u|^2 - lambda |p|^2`` has the closed form
    ``p_i = max(0, (u_i - tau) / (1 - lambda))``: with S the experts that stay on, ``tau = (sum_S u - 1 + lambda) / |S|``.

    Args:
        logits: Float32, [B, T, E], u.
        concentration: Float32, [B, T, 1], lambda, below 1; 0 is sparsemax, towards minus infinity all weights are equal.

    Returns:
        Float32, [B, T, E]; a token's weights sum to 1. Gradients flow to both arguments.

    Source: Laha et al., arXiv 1810.11975; as a router: LD-MoLE, arXiv 2509.25684; no departure.
    """
    spread = 1 - concentration
    # tau shifts by the same amount, and no large numbers cancel
    logits = logits - logits.amax(dim=-1, keepdim=True)
    descending = logits.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    sums = descending.cumsum(dim=-1)
    on = (spread + ranks * descending > sums).sum(dim=-1, keepdim=True).clamp(min=1)  # [B, T, 1], |S|
    tau = (sums.gather(-1, on - 1) - spread) / on
    return ((logits - tau) / spread).clamp(min=0)


def sparsity_penalty(logits: Tensor, concentration: Tensor, target: int) -> Tensor:
    """Say by how much the concentration would have to grow until at most ``target`` experts were on.

    With u in descending order, at most k experts are on exactly if ``lambda >= 1 - sum_{i<=k} (u_i - u_{k+1})``.

    Args:
        logits: Float32, [B, T, E]; no gradient flows to them.
        concentration: Float32, [B, T, 1].
        target: k, in 1..E; with k = E the penalty is 0.

    Returns:
        Float32, [B, T, 1], at least 0.

    Source: after the analytic sparsity control of LD-MoLE, arXiv 2509.25684; the bound is derived here from the closed
    form of `sparsegen_gates`, and only the concentration is moved by it.
    """
    if target >= logits.shape[-1]:
        return torch.zeros_like(concentration)
    best = logits.detach().topk(target + 1, dim=-1).values
    bound = 1 - (best[..., :target] - best[..., target:]).sum(dim=-1, keepdim=True)
    return (bound - concentration).clamp(min=0)


def load_balancing_loss(load: Tensor, probability: Tensor, counted: Tensor | None = None) -> Tensor:
    """Measure how unevenly a router spreads tokens: ``E * sum_e f_e P_e``.

    Args:
        load: Float32, [B, T, E], 1 where a token is given to an expert, 0 elsewhere; no gradient flows to it.
        probability: Float32, [B, T, E], the differentiable share.
        counted: Bool, [B, T]; tokens that count. None counts all.

    Returns:
        Float32, a scalar; f_e and P_e are means over the tokens that count. Without any it is 0.

    Source: Switch Transformers, arXiv 2101.03961, equations 4-6; with top-k, f_e counts token slots over tokens.
    """
    load, probability = load.flatten(0, -2), probability.flatten(0, -2)
    if counted is None:
        return load.shape[-1] * (load.mean(dim=0) * probability.mean(dim=0)).sum()
    weight = counted.flatten().to(load)
    number = weight.sum().clamp(min=1)
    return load.shape[-1] * ((weight @ load / number) * (weight @ probability / number)).sum()
