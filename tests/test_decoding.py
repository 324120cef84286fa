"""Decoding token after token: the same as the plain path, whatever happens between the tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from moa_peft import MoAConfig, RouterConfig, ThresholdConfig, mixture_layers
from moa_peft.decoding import Decoding
from moa_peft.errors import RunError
from moa_peft.kept_weights import KeptWeights
from moa_peft.tuner import GateRecord, MoALayer
from tiny import awaken, base_model, mixture_model, tokens

NEW_TOKENS = 6


class Between(LogitsProcessor):
    """Does something between two tokens of a generation, and leaves the scores as they are."""

    def __init__(self, act: Callable[[], None], after: int) -> None:
        self.act, self.after, self.calls = act, after, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # transformers' signature
        self.calls += 1
        if self.calls == self.after:
            self.act()
        return scores


def generated(model: PeftModel, prompt: Tensor, act: Callable[[], None] = lambda: None) -> Tensor:
    """The scores of a greedy continuation, with something done before its fourth token."""
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Between(act, 3)]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.logits)


def both_ways(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> tuple[Any, Any]:
    found: list[Any] = []
    for fused in (True, False):
        monkeypatch.setattr(MoALayer, "fused", fused)
        found.append(work())
    return found[0], found[1]


def close(found: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens that `Decoding` routed."""
    seen: list[Tensor] = []
    routing = Decoding._routing

    def noting(self: Decoding, *given: Any) -> Callable[[Tensor], None]:
        route = routing(self, *given)

        def note(x: Tensor) -> None:
            seen.append(x)
            route(x)

        return note

    monkeypatch.setattr(Decoding, "_routing", noting)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gemma2"])
@pytest.mark.parametrize("method", ["soft-moa", "sparse-moa", "lora", "prompt-tuning", "parallel-adapter"])
def test_a_generation_equals_that_of_the_plain_path(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch, decoded: list[Tensor]
) -> None:
    model = mixture_model(family, method)
    close(both_ways(monkeypatch, lambda: generated(model, tokens())))
    assert len(decoded) == (NEW_TOKENS - 1) * len(mixture_layers(model))


@pytest.mark.parametrize(
    "threshold", [{"maximum": 0.5}, {"maximum": 1.0, "at_least_one": False}, {"constant": 0.5}]
)
def test_every_kind_of_threshold_is_decoded(
    threshold: dict[str, Any], monkeypatch: pytest.MonkeyPatch, decoded: list[Tensor]
) -> None:
    config = MoAConfig.preset(
        "sparse-moa", router=RouterConfig(kind="swiglu", threshold=ThresholdConfig(**threshold))
    )
    model = get_peft_model(base_model("llama"), config)
    awaken(model)
    close(both_ways(monkeypatch, lambda: generated(model.eval(), tokens())))
    assert decoded
    gates: list[Tensor] = []
    [(_, layer), *_] = mixture_layers(model)
    layer.observer = lambda record: gates.append(record.gates)
    model(tokens())
    assert 0 < (gates[0] == 0).sum() < gates[0].numel()  # some are off


@pytest.mark.parametrize("method", ["soft-moa", "sparse-moa"])
def test_half_precision_is_rounded_as_on_the_plain_path(
    method: str, monkeypatch: pytest.MonkeyPatch, decoded: list[Tensor]
) -> None:
    """Both paths lie equally far from float32: what is added late, or in too low a precision, would lie further."""
    prompt = tokens(rows=64)

    def last(model: PeftModel) -> Tensor:
        with torch.no_grad():
            past = model(prompt[:, :-1], use_cache=True).past_key_values
            return model(prompt[:, -1:], past_key_values=past).logits.float()

    exact = last(mixture_model("llama", method))
    model = mixture_model("llama", method, dtype=torch.bfloat16)
    errors = [float((one - exact).norm()) for one in both_ways(monkeypatch, lambda: last(model))]
    assert decoded
    assert errors[0] <= 1.1 * errors[1], errors


def test_a_softmax_router_of_a_block_is_decoded(
    monkeypatch: pytest.MonkeyPatch, decoded: list[Tensor]
) -> None:
    config = MoAConfig.preset("soft-moa", router=RouterConfig(gate="softmax"))
    model = get_peft_model(base_model("llama"), config)
    awaken(model)
    close(both_ways(monkeypatch, lambda: generated(model.eval(), tokens())))
    assert decoded


def test_a_router_without_biases_is_decoded_in_half_precision(decoded: list[Tensor]) -> None:
    """Its logits are float32 all the same."""
    config = MoAConfig.preset("soft-moa", router=RouterConfig(kind="swiglu", bias=False))
    model = get_peft_model(base_model("llama", torch.bfloat16), config)
    awaken(model)
    assert generated(model.eval(), tokens()).isfinite().all()
    assert decoded


def test_copies_and_instance_gates_go_the_way_of_every_pass(decoded: list[Tensor]) -> None:
    for method in ("molora", "instance-moa"):
        generated(mixture_model("llama", method), tokens())
    assert not decoded


def test_weights_are_looked_at_once_in_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture_model("llama", "soft-moa")
    looks: list[bool] = []
    begin = KeptWeights.begin

    def noting(self: KeptWeights, module: torch.nn.Module, *, decoding: bool) -> bool:
        looks.append(decoding)
        return begin(self, module, decoding=decoding)

    monkeypatch.setattr(KeptWeights, "begin", noting)
    generated(model, tokens())
    assert looks.count(True) == looks.count(False) == len(mixture_layers(model))


def test_another_generation_sees_changed_weights_also_after_a_prompt_of_one_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mixture_model("llama", "soft-moa")

    def twice() -> Tensor:
        awaken(model)
        first = generated(model, tokens()[:, :1])
        with torch.no_grad():
            for one in model.parameters():
                if one.requires_grad:
                    one.mul_(1.5)
        second = generated(model, tokens()[:, :1])
        assert not torch.equal(first, second)
        return second

    close(both_ways(monkeypatch, twice))


def test_adapters_are_switched_in_the_middle_of_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture_model("llama", "soft-moa")
    model.add_adapter("other", MoAConfig.preset("sparse-moa"))
    awaken(model)
    model.eval()
    prompt = tokens()

    def switched() -> Tensor:
        model.set_adapter("default")
        generated(model, prompt)  # keeps the first's weights
        return generated(model, prompt, lambda: model.set_adapter("other"))

    found = both_ways(monkeypatch, switched)
    close(found)
    model.set_adapter("default")
    assert not torch.allclose(found[0], generated(model, prompt), atol=1e-3)


def test_another_call_within_a_generation_may_go_without_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As contrastive decoding does: the call inside must neither have the adapter nor disturb the generation."""
    model = mixture_model("llama", "soft-moa")
    prompt = tokens()
    inner: list[Tensor] = []

    def without() -> None:
        with model.disable_adapter():
            inner.append(model(prompt[:, :1]).logits)

    close(both_ways(monkeypatch, lambda: generated(model, prompt, without)))
    torch.testing.assert_close(inner[0], inner[1])
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(inner[0], model(prompt[:, :1]).logits)


def test_an_observer_that_comes_in_the_middle_sees_every_token_that_follows() -> None:
    model = mixture_model("llama", "soft-moa")
    layer = mixture_layers(model)[0][1]
    records: list[GateRecord] = []
    generated(model, tokens(), lambda: setattr(layer, "observer", records.append))
    assert [tuple(one.gates.shape[:2]) for one in records] == [(3, 1)] * (NEW_TOKENS - 3)


def test_a_module_that_runs_alone_after_a_generation_has_no_change_of_its_last_token() -> None:
    model = mixture_model("llama", "soft-moa")
    down = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    x = torch.randn(1, 1, 44)
    generated(model, tokens())
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(down(x), down.forward(x))
    with pytest.raises(RunError, match="ran before the router of its block"):
        down(x)
    attended, query = torch.randn(1, 1, 4, 8), torch.randn(1, 4, 1, 8)
    with model.disable_adapter(), torch.no_grad():
        assert mixture_layers(model)[0][1].attend(attended, query, 1.0) is attended


def test_training_drops_what_a_generation_has_kept() -> None:
    model = mixture_model("llama", "soft-moa")
    layer = mixture_layers(model)[0][1]
    generated(model, tokens())
    assert layer._now.decoding is not None
    model.train()
    assert layer._now.decoding is None
