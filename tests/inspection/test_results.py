"""The three numbers of a model's routing, for every method."""

from typing import Any

import pytest
from peft import get_peft_model
from torch import nn

from moa_peft import LoraExpert, MoAConfig, RouterConfig
from moa_peft.errors import UsageError
from moa_peft.inspection.gate_statistics import load_variation
from moa_peft.inspection.results import routing_summary
from tiny import METHODS, awaken, base_model, mixture_model
from two_pass import cka, keep_everything, texts

ROUTERS = {"soft-moa-hydra": 8, "molora": 5, "hydralora": 5, "topk-moe-lora": 5, "adamole": 5, "copies": 10}
"""Routers of a block, where it is not the block's alone."""
WITHOUT = ("lora", "parallel-adapter", "prompt-tuning")


class Letters:
    """A tokenizer whose text is the number of one of the reference's texts."""

    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(texts()[int(text)].ids)}


def summary(model: nn.Module, **options: Any) -> dict[str, float | None]:
    return routing_summary(model, Letters(), ["0", "1", "2", "3", "4"], **options)


@pytest.mark.parametrize("method", [one for one in METHODS if one not in WITHOUT])
def test_the_numbers_are_means_over_the_routers_of_what_each_weighs(method: str) -> None:
    model = mixture_model("llama", method)
    kept = keep_everything(model, texts())
    assert len(kept.gates) == 2 * ROUTERS.get(method, 1)
    variations = [load_variation(gates.sum(0)) for gates in kept.gates.values()]
    active = [float((gates > 0).double().sum(1).mean()) for gates in kept.gates.values()]
    spread = [float(gates.double().std(0, correction=0).mean()) for gates in kept.gates.values()]
    similar: list[float] = []
    for where in kept.gates:
        changes = [one for key, one in kept.changes.items() if key[:3] == where and one.norm() > 0]
        pairs = [cka(a, b) for place, a in enumerate(changes) for b in changes[:place]]
        similar += [sum(pairs) / len(pairs)] if pairs else []
    assert summary(model, batch_size=2) == {
        "load_variation": pytest.approx(sum(one or 0 for one in variations) / len(variations), abs=1e-5),
        "mean_cka": pytest.approx(sum(similar) / len(similar), abs=1e-5),
        "active_experts": pytest.approx(sum(active) / len(active)),
        "gate_deviation": pytest.approx(sum(spread) / len(spread), abs=1e-5),
    }


@pytest.mark.parametrize("method", [*WITHOUT, None])
def test_without_a_router_there_is_nothing_to_say(method: str | None) -> None:
    model = base_model("llama") if method is None else mixture_model("llama", method)
    assert set(summary(model).values()) == {None}


def instance_model(pooling: str) -> nn.Module:
    """Gates for a whole instance."""
    router = RouterConfig(granularity="instance", pooling=pooling)
    model = get_peft_model(
        base_model("llama"),
        MoAConfig(experts=[LoraExpert(targets=("q_proj", "v_proj"))], router=router),
    )
    awaken(model)
    return model


@pytest.mark.parametrize("pooling", ["prompt", "official"])
def test_no_number_depends_on_the_batch_size(pooling: str) -> None:
    """Official pooling counts padding, so its texts are read one by one."""
    model = instance_model(pooling)
    alone = summary(model, batch_size=1)
    for name, one in summary(model, batch_size=4).items():
        assert one == pytest.approx(alone[name], abs=1e-5), name


def test_a_router_over_a_single_copy_is_always_on() -> None:
    expert = LoraExpert(targets=("q_proj", "v_proj"), num_experts=1, router=RouterConfig(kind="linear"))
    model = get_peft_model(base_model("llama"), MoAConfig(experts=[expert], router=None))
    awaken(model)
    found = summary(model)
    assert (found["load_variation"], found["mean_cka"], found["active_experts"]) == (None, None, 1)


def test_a_mixture_that_adds_nothing_yet_has_loads_but_no_similarity() -> None:
    found = summary(mixture_model("llama", "exact-start", awake=False))
    assert found["mean_cka"] is None
    assert found["load_variation"] is not None
    assert found["active_experts"] == 8


def test_texts_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="no text to look at"):
        routing_summary(mixture_model("llama", "soft-moa"), Letters(), [])
