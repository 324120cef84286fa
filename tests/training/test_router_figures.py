import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from moa_peft.training.router_health import RouterFigures


@dataclass
class Record:
    names: tuple[str, ...]
    gates: Tensor
    threshold: Tensor | None
    router: str = ""
    balance_loss: Tensor | None = None


class FakeLayer:
    """Tells the records it is given, one router's a forward pass unless there are several routers."""

    def __init__(self, *records: Record, routers: int = 1) -> None:
        self.observer: Any = None
        self.block: Any = None
        self.records = list(records)
        self.routers = routers

    def forward(self) -> None:
        told, self.records = self.records[: self.routers], self.records[self.routers :]
        for record in told:
            if self.observer is not None:
                self.observer(record)


class FakeModel(nn.Module):
    def __init__(self, *layers: FakeLayer) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, attention_mask: Tensor | None = None) -> None:
        for layer in self.layers:
            layer.forward()


def step(
    figures: RouterFigures, model: FakeModel, number: int, *masks: Tensor | None, **arguments: Any
) -> None:
    args = TrainingArguments(output_dir="unused", logging_steps=2, use_cpu=True, **arguments)
    state, control = TrainerState(global_step=number - 1, logging_steps=2), TrainerControl()
    figures.on_step_begin(args, state, control)
    for mask in masks:
        model(attention_mask=mask)
    figures.on_step_end(args, state, control)


def watched(*layers: FakeLayer) -> tuple[FakeModel, RouterFigures]:
    model = FakeModel(*layers)
    for number, layer in enumerate(layers):
        layer.block = SimpleNamespace(index=number)
    return model, RouterFigures(model, [(str(number), layer) for number, layer in enumerate(layers)])


def test_soft_gates_are_averaged_over_real_tokens_batches_and_blocks() -> None:
    torch.manual_seed(0)
    names = ("q", "v", "mlp")
    gates = [[torch.rand(2, 5, 3), torch.rand(3, 4, 3)] for _ in range(2)]  # by block, by batch
    masks = [torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1]] * 3)]
    layers = [FakeLayer(*(Record(names, one, None) for one in block)) for block in gates]
    model, figures = watched(*layers)
    step(figures, model, 2, *masks)
    logged = figures.collect()

    expected, above = torch.zeros(3), torch.zeros(3)
    for block in gates:
        real = [
            one[row, token]
            for one, mask in zip(block, masks, strict=True)
            for row in range(one.shape[0])
            for token in range(one.shape[1])
            if mask[row, token]
        ]
        expected += torch.stack(real).mean(0) / 2
        above += (torch.stack(real) > 0.5).float().mean(0) / 2
    for place, name in enumerate(names):
        assert logged[f"router/gate_mean/{name}"] == pytest.approx(expected[place].item(), abs=1e-6)
        assert logged[f"router/above_half_rate/{name}"] == pytest.approx(above[place].item(), abs=1e-6)
    assert logged["router/above_half_experts"] == pytest.approx(above.sum().item(), abs=1e-6)
    assert len(logged) == 7
    assert figures.collect() == {}


def test_sparse_gates_count_as_active_above_zero_and_thresholds_are_averaged() -> None:
    gates = torch.tensor([[[0.0, 0.7], [0.2, 0.9], [0.8, 0.8]]])
    threshold = torch.tensor([[[0.1], [0.3], [9.0]]])
    model, figures = watched(FakeLayer(Record(("a", "b"), gates, threshold)))
    step(figures, model, 2, torch.tensor([[1, 1, 0]]))
    logged = figures.collect()
    assert logged == {
        "router/gate_mean/a": pytest.approx(0.1),
        "router/active_rate/a": pytest.approx(0.5),
        "router/gate_mean/b": pytest.approx(0.8),
        "router/active_rate/b": pytest.approx(1.0),
        "router/active_experts": pytest.approx(1.5),
        "router/threshold_mean": pytest.approx(0.2),
    }


def test_a_threshold_that_is_one_number_counts_for_every_token_and_without_a_mask_all_tokens_count() -> None:
    gates = torch.tensor([[[0.0], [0.6], [0.6]]])
    model, figures = watched(FakeLayer(Record(("a",), gates, torch.tensor(0.25))))
    step(figures, model, 2, None)
    logged = figures.collect()
    assert logged["router/threshold_mean"] == pytest.approx(0.25)
    assert logged["router/active_rate/a"] == pytest.approx(2 / 3)


def test_an_expert_that_only_some_blocks_carry_is_averaged_over_those() -> None:
    one = FakeLayer(Record(("a", "b"), torch.tensor([[[0.2, 0.9]]]), None))
    two = FakeLayer(Record(("a",), torch.tensor([[[0.6]]]), None))
    model, figures = watched(one, two)
    step(figures, model, 2, None)
    logged = figures.collect()
    assert logged["router/gate_mean/a"] == pytest.approx(0.4)
    assert logged["router/gate_mean/b"] == pytest.approx(0.9)
    assert logged["router/above_half_experts"] == pytest.approx(1.0)  # a in block two, b in block one


@pytest.mark.parametrize(
    ("number", "arguments", "observed"),
    [
        (1, {"logging_first_step": True}, True),
        (1, {"logging_first_step": False}, False),
        (2, {}, True),
        (3, {}, False),
        (4, {"logging_strategy": "epoch"}, False),
    ],
)
def test_only_the_steps_that_are_logged_are_observed(
    number: int, arguments: dict[str, Any], observed: bool
) -> None:
    layer = FakeLayer(Record(("a",), torch.ones(1, 1, 1), None))
    model, figures = watched(layer)
    step(figures, model, number, None, **arguments)
    assert bool(figures.collect()) is observed
    assert layer.observer is None
    assert not model._forward_pre_hooks


def test_gates_of_a_whole_instance_count_once_a_row_whatever_the_padding() -> None:
    gates = torch.tensor([[[0.2, 0.9]], [[0.6, 0.7]]])  # [B, 1, E]
    model, figures = watched(FakeLayer(Record(("a", "b"), gates, None)))
    step(figures, model, 2, torch.tensor([[1, 0, 0], [1, 1, 1]]))
    assert figures.collect() == {
        "router/gate_mean/a": pytest.approx(0.4),
        "router/above_half_rate/a": pytest.approx(0.5),
        "router/gate_mean/b": pytest.approx(0.8),
        "router/above_half_rate/b": pytest.approx(1.0),
        "router/above_half_experts": pytest.approx(1.5),
    }


def test_the_copies_of_an_expert_give_three_figures_that_do_not_mix_with_the_blocks_experts() -> None:
    names = ("0", "1", "2", "3")
    one_hot = torch.eye(4)[[1, 1, 2, 3]].unsqueeze(0)  # the last token is padding
    halves = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0], [0.0] * 4]])
    threshold = torch.full((1, 4, 1), 0.25)
    layers = [
        FakeLayer(Record(names, copies, limit, "lora_q_proj"), Record(("a",), block, None), routers=2)
        for copies, limit, block in (
            (one_hot, threshold, torch.full((1, 4, 1), 0.2)),
            (halves, None, torch.full((1, 4, 1), 0.8)),
        )
    ]
    model, figures = watched(*layers)
    step(figures, model, 2, torch.tensor([[1, 1, 1, 0]]))
    logged = figures.collect()
    first, second = [2 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 6, 1 / 6]
    entropies = [-sum(p * math.log(p) for p in shares) / math.log(4) for shares in (first, second)]
    assert logged == {
        "router/gate_mean/a": pytest.approx(0.5),
        "router/above_half_rate/a": pytest.approx(0.5),
        "router/above_half_experts": pytest.approx(0.5),
        "router/active_copies/lora_q_proj": pytest.approx((1 + 2) / 2),
        "router/largest_share/lora_q_proj": pytest.approx((2 / 3 + 1 / 3) / 2),
        "router/load_entropy/lora_q_proj": pytest.approx(sum(entropies) / 2),
    }


def test_the_balance_loss_is_the_sum_over_all_routers_and_the_mean_over_passes() -> None:
    def record(router: str, loss: float) -> Record:
        return Record(("0", "1"), torch.full((1, 1, 2), 0.5), None, router, torch.tensor(loss))

    one = FakeLayer(
        record("lora_q_proj", 1.0), record("", 2.0), record("lora_q_proj", 3.0), record("", 6.0), routers=2
    )
    two = FakeLayer(record("lora_q_proj", 10.0), record("lora_q_proj", 30.0))
    model, figures = watched(one, two)
    step(figures, model, 2, None, None)
    assert figures.collect()["router/balance_loss"] == pytest.approx((1 + 2 + 10 + 3 + 6 + 30) / 2)
    assert figures.collect() == {}


def test_a_router_without_a_balance_loss_and_a_mixture_without_a_router_log_none() -> None:
    model, figures = watched(FakeLayer(Record(("a",), torch.ones(1, 1, 1), None)), FakeLayer())
    step(figures, model, 2, None)
    assert "router/balance_loss" not in figures.collect()
    model, figures = watched(FakeLayer())
    step(figures, model, 2, None)
    assert figures.collect() == {}
