"""What stands out is said of routers and experts whose answer is known."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moa_peft.inspection.findings import sentences
from moa_peft.inspection.gate_statistics import gate_sums
from moa_peft.inspection.results import GroupStatistics, RouterStatistics, router_statistics
from moa_peft.inspection.similarity import ChangeStatistics

LIVELY = torch.tensor([[0.2, 0.8], [0.8, 0.3]])


def router(layer: int, gates: Tensor = LIVELY, **more: object) -> RouterStatistics:
    settings = {"granularity": "token", "trained": None, "router": ""} | more
    threshold = settings.pop("threshold", None)
    sums = gate_sums(gates, threshold=threshold)
    return router_statistics(layer, settings.pop("router"), ("a", "b"), sums, **settings)


def group(layer: int, cka: float | None, name: str = "") -> GroupStatistics:
    changes = ChangeStatistics(
        names=("a", "b"),
        cka=((1.0, cka), (cka, 1.0)),
        cosine=((1.0, None), (None, 1.0)),
        effective_rank=(1.0, 1.0),
        norm=(1.0, 1.0),
        norm_share=(0.5, 0.5),
        captured=(1.0, 1.0),
    )
    return GroupStatistics(layer=layer, router=name, changes=changes)


@pytest.mark.parametrize(
    ("routers", "expected"),
    [
        ([], "This mixture has no router: every expert is always fully on."),
        (
            [router(layer, torch.tensor([[0.0, 0.7], [0.001, 0.2]])) for layer in (0, 1, 2, 7)] + [router(3)],
            "Never used: a in 4 layers: 0-2, 7 (mean gate below 0.01).",
        ),
        (
            [router(0), router(4, torch.tensor([[0.3, 1.0], [0.8, 0.99]]))],
            "Always on, whatever the token: b in layer 4 (mean gate at least 0.95).",
        ),
        (
            [
                router(0, torch.tensor([[0.5, 0.6], [0.51, 0.6]])),
                router(1, torch.tensor([[0.5, 0.1], [0.5, 0.9]])),
            ],
            "The routers hardly tell tokens apart: 3 of 4 gates vary by less than 0.02; the gate of b in layer 1 varies most, by 0.40 (standard deviation over the tokens).",
        ),
        (
            [router(0), router(1, torch.tensor([[0.1, 0.9], [0.2, 0.4]]), granularity="instance")],
            "Every expert is used: the mean gates lie between 0.15 (a in layer 1) and 0.65 (b in layer 1); the gate of a in layer 0 varies most, by 0.30 (standard deviation over the tokens).",
        ),
        (
            [router(0, torch.tensor([[0.4, 0.6]]), granularity="instance")],
            "One prompt does not say how gates vary: give more prompts.",
        ),
        (
            [router(0, torch.tensor([[0.0, 1.0], [0.0, 0.3]]), router="lora_q_proj")],
            "Never used: copy a of lora_q_proj in layer 0 (mean gate below 0.01).",
        ),
    ],
)
def test_the_first_sentence_says_how_the_experts_are_used(
    routers: list[RouterStatistics], expected: str
) -> None:
    assert sentences(routers, [])[0] == expected


@pytest.mark.parametrize(
    ("routers", "groups", "expected"),
    [
        (
            [router(0, threshold=torch.tensor([0.25, 0.25]), trained=False), router(1, threshold=torch.ones(2), trained=True)],
            [group(0, 0.99)],
            "The thresholds did not move in training in 1 of 2 routers: their bias is exactly 0, as at the start.",
        ),
        (
            [router(0, threshold=torch.tensor([0.1, 0.15]), trained=True)],
            [group(0, 0.99)],
            "The threshold switches no expert off, for any token.",
        ),
        (
            [router(0, threshold=torch.tensor([0.1, 0.15]), trained=True), router(1, torch.tensor([[0.0, 0.6], [0.4, 0.9]]))],
            [group(0, 0.2), group(1, 0.95)],
            "Nearly the same is done by a and b in layer 1 (CKA 0.95).",
        ),
        (
            [router(0, router="q"), router(0, router="k")],
            [group(0, 0.99), group(0, 0.2, "q"), group(0, 0.4, "k")],
            "No two experts do the same: the mean CKA of a pair is 0.30, the most alike are copy a of k and copy b of k in layer 0 (0.40).",
        ),
        ([], [], "There are no two experts to compare, or they add nothing yet."),
        ([], [group(0, None)], "There are no two experts to compare, or they add nothing yet."),
        (
            [],
            [group(0, 0.91), group(5, 0.97), group(6, 0.1)],
            "Nearly the same is done by a and b in layer 5 (CKA 0.97) and 1 more pair.",
        ),
        (
            [],
            [group(0, 0.3), group(5, 0.5, "q")],
            "No two experts do the same: the mean CKA of a pair is 0.40, the most alike are copy a of q and copy b of q in layer 5 (0.50).",
        ),
    ],
)  # fmt: skip
def test_the_second_sentence_says_how_different_they_are(
    routers: list[RouterStatistics], groups: list[GroupStatistics], expected: str
) -> None:
    assert sentences(routers, groups)[1] == expected


def test_statistics_of_a_router_are_plain_numbers_and_none_where_there_is_none() -> None:
    found = router(
        0, torch.tensor([[0.0, 0.0], [0.0, 0.0]]), threshold=torch.tensor([0.2, 0.4]), trained=True
    )
    assert found.load == (None, None)
    assert found.entropy is None
    assert found.threshold is not None
    assert (found.threshold.mean, found.threshold.deviation) == pytest.approx((0.3, 0.1))
    assert sum(found.threshold.bins) == pytest.approx(1)
    assert found.active_counts == (1, 0, 0)
    assert found.by_class == ((None, None),) * 5
    lively = router(1)
    assert lively.mean_gate == pytest.approx((0.5, 0.55))
    assert lively.deviation == pytest.approx((0.3, 0.25))
    assert all(type(value) is not Tensor for value in dataclasses.asdict(lively).values())
