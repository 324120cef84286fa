"""Router arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa_peft import RouterConfig, ThresholdConfig
from moa_peft.router import Router
from moa_peft.routing import active_experts, learned_threshold, sigmoid_gates, sparse_gates


def test_soft_gates_are_sigmoids_in_float32() -> None:
    logits = torch.tensor([[[0.0, 2.0, -3.0]]], dtype=torch.bfloat16)
    gates = sigmoid_gates(logits)
    assert gates.dtype == torch.float32
    expected = [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3))]
    torch.testing.assert_close(gates[0, 0], torch.tensor(expected))


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
    plain, threshold = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_threshold = router(x)
    assert plain.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert threshold is not None
    assert torch.equal(threshold, cast_threshold)


def test_a_constant_threshold_adds_no_parameters_and_is_kept_exactly() -> None:
    router = Router(
        8, 3, RouterConfig(kind="linear", threshold=ThresholdConfig(constant=0.5, at_least_one=False))
    )
    assert [name for name, _ in router.named_parameters()] == ["logits.linear.weight", "logits.linear.bias"]
    with torch.no_grad():
        router.logits.linear.weight.zero_()
    gates, threshold = router(torch.randn(1, 4, 8))
    assert threshold is not None
    assert threshold.item() == 0.5
    assert (gates == 0.5).all()  # a score of exactly 0.5 reaches it
