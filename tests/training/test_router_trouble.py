"""Training warns of routers whose trouble is known, once, and says what to try."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from moa_peft.training.router_health import FEWEST, RouterFigures, TroubleWatch, find_trouble, trouble_sums

LIVELY = torch.tensor([0.5, 0.4, 0.6]).expand(2, 20, 3)


def sums(gates: Tensor, real: Tensor | None = None) -> dict[tuple[int, str], list[float]]:
    real = torch.ones(gates.shape[:2]) if real is None else real
    return {(4, ""): trouble_sums(gates, real).tolist()}


NAMES = {(4, ""): ("a", "b", "c")}


def gates_with(column: int, values: float | Tensor) -> Tensor:
    gates = LIVELY.clone()
    gates[..., column] = values
    return gates


@pytest.mark.parametrize(
    ("gates", "dead", "saturated"),
    [
        (LIVELY, [], []),
        (gates_with(1, 0.0), ["b in layer 4"], []),
        (gates_with(1, 0.009), ["b in layer 4"], []),
        (gates_with(1, 0.011), [], []),
        (gates_with(2, 0.995), [], ["c in layer 4"]),
        (gates_with(2, 0.985), [], []),
        (gates_with(2, torch.tensor([1.0] * 11 + [0.2] * 9)), [], ["c in layer 4"]),
        (gates_with(2, torch.tensor([1.0] * 10 + [0.2] * 10)), [], []),
        (torch.eye(3)[[0] * 40].view(2, 20, 3), ["b in layer 4", "c in layer 4"], ["a in layer 4"]),
    ],
)
def test_dead_experts_and_saturated_gates_are_found(
    gates: Tensor, dead: list[str], saturated: list[str]
) -> None:
    assert find_trouble(sums(gates), NAMES) == {"dead": dead, "saturated": saturated}


def test_of_many_copies_that_share_the_weight_none_is_dead_for_its_fair_share() -> None:
    fair = torch.full((2, 20, 128), 1 / 128)
    fair[..., 7] = 1e-4
    names = {(4, ""): [str(one) for one in range(128)]}
    assert find_trouble(sums(fair), names) == {"dead": ["7 in layer 4"], "saturated": []}


def test_padding_says_nothing_of_an_expert() -> None:
    real = torch.ones(2, 20)
    real[:, :3] = 0
    alive_in_padding = gates_with(1, torch.tensor([0.9] * 3 + [0.0] * 17))
    assert find_trouble(sums(alive_in_padding, real), NAMES)["dead"] == ["b in layer 4"]
    stuck_in_padding = gates_with(1, torch.tensor([1.0] * 3 + [1.0] * 8 + [0.5] * 9))
    assert find_trouble(sums(stuck_in_padding), NAMES)["saturated"] == ["b in layer 4"]
    assert find_trouble(sums(stuck_in_padding, real), NAMES)["saturated"] == []


def test_few_tokens_and_lone_experts_are_not_judged() -> None:
    dead = torch.zeros(1, FEWEST - 1, 3)
    assert find_trouble(sums(dead), NAMES) == {"dead": [], "saturated": []}
    lone = {(0, ""): trouble_sums(torch.ones(1, 64, 1), torch.ones(1, 64)).tolist()}
    assert find_trouble(lone, {(0, ""): ("a",)}) == {"dead": [], "saturated": []}


def test_each_kind_is_said_once_with_what_to_try(capfd: pytest.CaptureFixture[str]) -> None:
    watch = TroubleWatch()
    copies = {(7, "lora_q_proj"): trouble_sums(torch.zeros(1, 64, 5), torch.ones(1, 64)).tolist()}
    names = {(7, "lora_q_proj"): tuple("01234")}
    watch.look(copies, names, 5)
    watch.look(copies, names, 10)
    watch.look(sums(gates_with(0, 1.0)), NAMES, 15)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("moa: warning: step 5: never used: copy 0 of lora_q_proj in layer 7, copy 1 of")
    assert "and 2 more (mean gate below 0.01); try a lower learning_rate, fewer experts, or" in said[0]
    assert said[1].startswith(
        "moa: warning: step 15: saturated: the gate of a in layer 4 is above 0.99 for most tokens"
    )
    assert (
        "try a lower learning_rate, a longer warm-up, or --mixture.router.router_input projection" in said[1]
    )


class Layer:
    block = SimpleNamespace(index=4)

    def __init__(self) -> None:
        self.observer: Any = None


class Record:
    router = ""
    names = ("a", "b", "c")
    threshold = None
    balance_loss = None

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates


@pytest.mark.parametrize("main", [True, False])
def test_the_figures_of_a_logged_step_are_looked_at_by_the_main_process_alone(
    main: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    layer, model = Layer(), torch.nn.Identity()
    figures = RouterFigures(model, [("0", layer)])
    arguments = TrainingArguments(output_dir="unused", logging_steps=2, use_cpu=True)
    for step in (1, 3):
        state = TrainerState(global_step=step, logging_steps=2, is_world_process_zero=main)
        figures.on_step_begin(arguments, state, TrainerControl())
        layer.observer(Record(gates_with(1, 0.0)))
        figures.on_step_end(arguments, state, TrainerControl())
        assert figures.collect()["router/gate_mean/b"] == 0
    said = capfd.readouterr().err
    assert said.count("never used: b in layer 4") == (1 if main else 0)
    assert said.count("step 2") == (1 if main else 0)
