"""Router arithmetic."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moa_peft import RouterConfig, ThresholdConfig
from moa_peft.mixture.gate_functions import (
    active_experts,
    learned_threshold,
    load_balancing_loss,
    sigmoid_gates,
    sparse_gates,
    sparsegen_gates,
    sparsity_penalty,
    threshold_gates,
    top_k_gates,
)
from moa_peft.mixture.router import Router, linear


def test_soft_gates_are_sigmoids_in_float32() -> None:
    logits = torch.tensor([[[0.0, 2.0, -3.0]]], dtype=torch.bfloat16)
    gates = sigmoid_gates(logits)
    assert gates.dtype == torch.float32
    expected = [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3))]
    torch.testing.assert_close(gates[0, 0], torch.tensor(expected))


def test_gates_above_a_threshold_are_finite_where_its_sigmoid_rounds_to_one() -> None:
    """With one expert, or equal ones, nothing lay above the threshold: 0 / 0."""
    for experts in (1, 3):
        router = Router(2, experts, RouterConfig(kind="linear", gate="threshold"))
        nn.init.zeros_(router.get_parameter("logits.linear_weight"))
        nn.init.constant_(router.get_parameter("gate.threshold_bias"), 30.0)
        gates = router(torch.ones(1, 1, 2)).gates
        torch.testing.assert_close(gates, torch.full_like(gates, 1 / experts))


def test_a_learned_threshold_stays_between_zero_and_its_maximum() -> None:
    thresholds = learned_threshold(torch.tensor([[[-1e4], [0.0], [1e4]]]), 0.5)
    assert thresholds.flatten().tolist() == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("at_least_one", [False, True])
def test_a_score_equal_to_the_threshold_is_on(at_least_one: bool) -> None:
    scores = torch.tensor([[[0.5, 0.25, 0.7]]])
    assert active_experts(scores, torch.tensor(0.5), at_least_one).tolist() == [[[True, False, True]]]


def test_the_best_expert_stays_on_below_the_threshold_only_when_asked() -> None:
    scores = torch.tensor([[[0.1, 0.3, 0.3], [0.2, 0.1, 0.0]]])
    kept = active_experts(scores, torch.tensor(0.9), at_least_one=True)
    assert kept.tolist() == [[[False, True, True], [True, False, False]]]
    assert not active_experts(scores, torch.tensor(0.9), at_least_one=False).any()


def scalar_gate(score: float, threshold: float, best: bool) -> float:
    return score if score >= threshold or best else 0.0


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5),
    threshold=st.floats(0, 1, width=32),
    at_least_one=st.booleans(),
)
def test_sparse_gates_equal_the_scalar_definition(
    scores: list[float], threshold: float, at_least_one: bool
) -> None:
    s = torch.tensor(scores).view(1, 1, -1)
    gates = sparse_gates(s, torch.tensor([[[threshold]]]), bandwidth=0.1, at_least_one=at_least_one)
    expected = [scalar_gate(x, threshold, at_least_one and x == max(scores)) for x in scores]
    assert gates.flatten().tolist() == expected


def gradients(at_least_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.tensor([[[0.30, 0.45, 0.90]]], requires_grad=True)
    threshold = torch.tensor([[[0.40]]], requires_grad=True)
    gates = sparse_gates(scores, threshold, bandwidth=0.1, at_least_one=at_least_one)
    gates.backward(torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert scores.grad is not None
    assert threshold.grad is not None
    return gates.detach(), scores.grad, threshold.grad


@pytest.mark.parametrize("at_least_one", [False, True])
def test_the_straight_through_estimate_is_the_published_one_with_a_logistic_kernel(
    at_least_one: bool,
) -> None:
    gates, to_scores, to_threshold = gradients(at_least_one)
    assert gates.flatten().tolist() == pytest.approx([0.0, 0.45, 0.90])
    assert to_scores.flatten().tolist() == [0.0, 2.0, 3.0]  # exact: the gradient of s where the expert is on

    def slope(score: float) -> float:
        k = 1 / (1 + math.exp(-(score - 0.40) / 0.1))
        return -score / 0.1 * k * (1 - k)

    expected = 1.0 * slope(0.30) + 2.0 * slope(0.45) + (0.0 if at_least_one else 3.0 * slope(0.90))
    assert to_threshold.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_gives_float32_gates_also_under_autocast(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    router = Router(8, 3, RouterConfig(kind=kind, threshold=ThresholdConfig(maximum=0.5)))
    x = torch.randn(2, 5, 8).to(dtype)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert plain.gates.dtype == torch.float32
    assert torch.equal(plain.gates, cast.gates)
    assert torch.equal(plain.threshold, cast.threshold)


@pytest.mark.parametrize("initial", [None, 0.05, 0.5, 0.9])
@pytest.mark.parametrize(
    ("kind", "threshold"), [("linear", None), ("swiglu", None), ("swiglu", ThresholdConfig(maximum=0.5))]
)
def test_every_gate_of_a_fresh_router_is_the_initial_one_on_a_zero_input(
    kind: str, threshold: ThresholdConfig | None, initial: float | None
) -> None:
    router = Router(8, 3, RouterConfig(kind=kind, initial_gate=initial, threshold=threshold))
    wanted = 0.5 if initial is None else initial
    gates = router(torch.zeros(2, 4, 8)).gates
    assert (gates - wanted).abs().max() <= 1e-6  # also below a threshold: the best experts stay on
    biases = [
        one for name, one in router.logits.named_parameters() if name.endswith(("w2_bias", "linear_bias"))
    ]
    assert len(biases) == 1
    torch.testing.assert_close(biases[0], torch.full((3,), math.log(wanted / (1 - wanted))))


def test_a_constant_threshold_adds_no_parameters_and_is_kept_exactly() -> None:
    router = Router(
        8, 3, RouterConfig(kind="linear", threshold=ThresholdConfig(constant=0.5, at_least_one=False))
    )
    assert [name for name, _ in router.named_parameters()] == ["logits.linear_weight", "logits.linear_bias"]
    with torch.no_grad():
        router.logits.linear_weight.zero_()
    routing = router(torch.randn(1, 4, 8))
    assert routing.threshold.item() == 0.5
    assert (routing.gates == 0.5).all()  # a score of exactly 0.5 reaches it


def projection(logits: list[float], concentration: float) -> list[float]:
    """The weights of the closed form, with tau found by bisection: their sum falls as tau grows, and must be 1."""
    spread = 1 - concentration

    def weights(tau: float) -> list[float]:
        return [max(0.0, (one - tau) / spread) for one in logits]

    low, high = min(logits) - spread - 1, max(logits)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) > 1 else (low, middle)
    return weights(high)


def nearest_of_the_simplex(logits: list[float], concentration: float) -> list[float]:
    """The point that costs least, ``|p - u|^2 - lambda |p|^2``, among the stationary ones of every face of the simplex."""
    best, least = [0.0], math.inf
    for size in range(1, len(logits) + 1):
        for on in itertools.combinations(range(len(logits)), size):
            tau = (sum(logits[i] for i in on) - 1 + concentration) / size
            point = [(u - tau) / (1 - concentration) if i in on else 0.0 for i, u in enumerate(logits)]
            cost = sum((p - u) ** 2 - concentration * p * p for p, u in zip(point, logits, strict=True))
            if min(point) >= 0 and cost < least:
                best, least = point, cost
    return best


some_logits = st.lists(st.floats(-5, 5), min_size=1, max_size=7)


def sparsegen(logits: list[float], concentration: float) -> Tensor:
    u, c = (torch.tensor(one, dtype=torch.float64).view(1, 1, -1) for one in (logits, [concentration]))
    return sparsegen_gates(u, c)[0, 0]


@settings(max_examples=100, deadline=None)
@given(logits=some_logits, concentration=st.floats(-50, 0.99))
def test_sparsegen_gates_equal_a_projection_found_by_bisection(
    logits: list[float], concentration: float
) -> None:
    gates = sparsegen(logits, concentration)
    assert gates.tolist() == pytest.approx(projection(logits, concentration), abs=1e-9)
    assert gates.sum().item() == pytest.approx(1, abs=1e-9)
    assert gates.min() >= 0


@settings(max_examples=30, deadline=None)
@given(logits=st.lists(st.floats(-2, 2), min_size=1, max_size=5), concentration=st.floats(-3, 0.9))
def test_sparsegen_gates_are_the_nearest_point_of_the_simplex(
    logits: list[float], concentration: float
) -> None:
    nearest = nearest_of_the_simplex(logits, concentration)
    assert sparsegen(logits, concentration).tolist() == pytest.approx(nearest, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=16))
def test_sparsegen_gates_sum_to_one_in_float32_whatever_the_logits(logits: list[float]) -> None:
    gates = sparsegen_gates(torch.tensor(logits).view(1, 1, -1), torch.tensor([[[0.9]]]))
    assert gates.sum().item() == pytest.approx(1, abs=1e-4)


def test_sparsegen_gates_are_sparsemax_at_zero_one_expert_near_one_and_uniform_far_below() -> None:
    logits = [0.3, -0.2, 0.7, 0.69]
    assert sparsegen(logits, 0.0).tolist() == pytest.approx([0.07, 0.0, 0.47, 0.46])  # u - (1.69 - 1) / 3
    assert sparsegen(logits, 0.999).tolist() == [0.0, 0.0, 1.0, 0.0]
    assert sparsegen(logits, -1e7).tolist() == pytest.approx([0.25] * 4, abs=1e-6)
    assert sparsegen([0.5, 0.5], 0.9).tolist() == [0.5, 0.5]


def test_the_gradients_of_sparsegen_gates_are_exact_for_both_arguments() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    concentration = 0.9 - 6 * torch.rand(4, 6, 1, generator=generator, dtype=torch.float64)
    on = (sparsegen_gates(logits, concentration) > 0).sum(dim=-1)
    assert set(on.flatten().tolist()) >= {1, 2, 3, 4}
    assert torch.autograd.gradcheck(
        sparsegen_gates, (logits.requires_grad_(), concentration.requires_grad_())
    )


def sparsegen_draws() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 50, 6, generator=generator, dtype=torch.float64)
    return logits, 1 - 4 * torch.rand(40, 50, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("target", [1, 2, 3, 5, 6])
def test_the_sparsity_penalty_is_what_the_concentration_lacks_for_the_target(target: int) -> None:
    logits, concentration = sparsegen_draws()

    def too_many(more: Tensor) -> Tensor:
        return (sparsegen_gates(logits, concentration + more) > 0).sum(dim=-1, keepdim=True) > target

    penalty = sparsity_penalty(logits, concentration, target)
    assert penalty.shape == concentration.shape
    assert (penalty >= 0).all()
    assert torch.equal(penalty > 0, too_many(torch.zeros_like(penalty)))
    assert (penalty > 0).any() == (target < 6)
    assert not too_many(penalty + 1e-9).any()
    assert torch.equal(too_many(penalty - 1e-6) & (penalty > 0), penalty > 0)


@pytest.mark.parametrize("target", [1, 3])
def test_descending_the_sparsity_penalty_leaves_at_most_the_target_on_and_no_logit_moved(target: int) -> None:
    logits, concentration = sparsegen_draws()
    logits.requires_grad_()
    concentration.requires_grad_()
    optimiser = torch.optim.SGD([logits, concentration], lr=0.05)
    before = logits.detach().clone()
    for _ in range(120):
        optimiser.zero_grad()
        sparsity_penalty(logits, concentration, target).sum().backward()
        optimiser.step()
    assert ((sparsegen_gates(logits, concentration.clamp(max=1 - 1e-9)) > 0).sum(dim=-1) <= target).all()
    assert torch.equal(logits, before)


def test_a_sparsegen_routers_concentration_is_zero_at_no_input_and_stays_below_its_bound() -> None:
    router = Router(8, 4, RouterConfig(kind="linear", gate="sparsegen"))
    logits = torch.randn(1, 3, 4)
    x = torch.zeros(1, 3, 8)
    [layer] = router.gate.projections()
    at_rest = router.gate(logits, linear(x, layer)).gates
    torch.testing.assert_close(at_rest, sparsegen_gates(logits, torch.zeros(1, 3, 1)))
    with torch.no_grad():
        router.gate.concentration_bias.fill_(-1e6)
    bound = router.gate(logits, linear(x, layer)).gates
    torch.testing.assert_close(bound, sparsegen_gates(logits, torch.full((1, 3, 1), 0.9)))


@settings(max_examples=60, deadline=None)
@given(logits=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6, unique=True), data=st.data())
def test_top_k_gates_equal_the_softmax_over_the_best_in_a_plain_loop(
    logits: list[float], data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, len(logits)))
    gates = top_k_gates(torch.tensor(logits).view(1, 1, -1), keep)
    limit = sorted(logits, reverse=True)[keep - 1]
    powers = [math.exp(one) if one >= limit else 0.0 for one in logits]
    assert gates.flatten().tolist() == pytest.approx([one / sum(powers) for one in powers], rel=1e-5)
    assert int((gates > 0).sum()) == keep


def test_top_k_gates_keep_exactly_so_many_on_a_tie() -> None:
    gates = top_k_gates(torch.zeros(1, 1, 4), 2)
    assert sorted(gates.flatten().tolist()) == [0.0, 0.0, 0.5, 0.5]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6), share=st.floats(0, 0.875, width=32)
)
def test_threshold_gates_equal_the_plain_loop_over_what_lies_above(logits: list[float], share: float) -> None:
    probability = torch.tensor(logits).softmax(dim=-1)
    threshold = share / len(logits)
    gates = threshold_gates((probability - threshold).view(1, 1, -1))
    above = [max(0.0, one - threshold) for one in probability.tolist()]
    assert gates.flatten().tolist() == pytest.approx([one / sum(above) for one in above], rel=1e-3, abs=1e-6)


def balance_by_hand(load: Tensor, probability: Tensor, counted: Tensor) -> float:
    """E * sum_e (mean load of e) * (mean probability of e), over the tokens that count."""
    tokens = [(b, t) for b in range(load.shape[0]) for t in range(load.shape[1]) if counted[b, t]]
    total = 0.0
    for e in range(load.shape[2]):
        f = sum(load[b, t, e].item() for b, t in tokens) / len(tokens)
        p = sum(probability[b, t, e].item() for b, t in tokens) / len(tokens)
        total += f * p
    return load.shape[2] * total


@pytest.mark.parametrize(("rows", "length", "experts"), [(1, 1, 1), (2, 5, 3), (3, 7, 8)])
def test_the_balance_loss_equals_the_plain_loop_over_the_tokens_that_count(
    rows: int, length: int, experts: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    probability = torch.randn(rows, length, experts, generator=generator, dtype=torch.float64).softmax(dim=-1)
    load = (probability > 1 / experts).double()
    everything = torch.ones(rows, length, dtype=torch.bool)
    some = torch.rand(rows, length, generator=generator) > 0.4
    some[0, 0] = True
    assert load_balancing_loss(load, probability).item() == pytest.approx(
        balance_by_hand(load, probability, everything)
    )
    for counted in (everything, some):
        ours = load_balancing_loss(load, probability, counted).item()
        assert ours == pytest.approx(balance_by_hand(load, probability, counted))


def test_a_flat_load_costs_one_a_collapsed_one_costs_the_number_of_experts_and_no_token_costs_nothing() -> (
    None
):
    flat = torch.full((1, 4, 4), 0.25)
    assert load_balancing_loss(torch.eye(4).unsqueeze(0), flat).item() == 1
    collapsed = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 4, 4)
    assert load_balancing_loss(collapsed, collapsed).item() == 4
    assert load_balancing_loss(collapsed, collapsed, torch.zeros(1, 4, dtype=torch.bool)).item() == 0
