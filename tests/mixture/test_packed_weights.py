"""Packed weights: what decoding and serving reuse. The numbers are those of calls that join everything anew."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from moa_peft import GateRecord, MoAConfig, mixture_layers, packed_weights
from moa_peft.bench.subjects import one_by_one
from moa_peft.mixture.mixture import Mixture
from moa_peft.mixture.token_watch import prompt_lengths
from tiny import METHODS, awaken, base_model, cached, mixture_model, tokens

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


def generated(model: Any, prompt: Tensor, act: Callable[[], None] = lambda: None) -> Tensor:
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


def test_contexts_that_overlap_leave_nothing_packed() -> None:
    """Two generators that ended in turn, the first first, left the weights of the first packed for good."""
    model = mixture_model("llama", "soft-moa").eval()
    first, second = packed_weights(model), packed_weights(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with torch.no_grad():
        model(tokens())
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.1)
        assert torch.equal(model(tokens()).logits, copy.deepcopy(model)(tokens()).logits)


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was made of weights, by mixture and key, each time it was made."""
    made: list[str] = []
    reused = Mixture._reused

    def noting(self: Mixture, key: object, make: Callable[[], Any]) -> Any:
        def note() -> Any:
            made.append(f"{id(self)} {key}")
            return make()

        return reused(self, key, note)

    monkeypatch.setattr(Mixture, "_reused", noting)
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_calls_of_any_number_of_tokens_equal_those_without_packed_weights(family: str, method: str) -> None:
    model = mixture_model(family, method)
    found: list[Tensor] = []
    for context in (nullcontext(), packed_weights(model)):
        with torch.no_grad(), context:
            cache = cached(model(tokens(), use_cache=True, **prompt_lengths(model, [tokens().shape[1]])))
            steps = [model(tokens(length=n, seed=n), **cache).logits for n in (1, 3, 1)]
        found.append(torch.cat(steps, dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["soft-moa", "copies"])
def test_a_generation_makes_everything_once(method: str, joins: list[str]) -> None:
    model = mixture_model("llama", method)
    generated(model, tokens())
    assert len(joins) == len(set(joins)) > 0
    before = len(joins)
    generated(model, tokens())
    assert len(joins) == 2 * before  # another generation may have other weights


def test_a_generation_of_a_model_that_transformers_loaded_equals_pefts(
    tmp_path: Path, joins: list[str]
) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), _saved(tmp_path), adapter_name="other"
    )
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "adapter"))
    expected = generated(model.eval(), tokens())
    assert torch.equal(generated(native.eval(), tokens()), expected)
    joins.clear()
    with packed_weights(native):
        assert torch.equal(generated(native, tokens()), expected)
    assert len(joins) == len(set(joins)) > 0


def _saved(folder: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, MoAConfig.preset("soft-moa"))
    awaken(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def scaled(model: PeftModel) -> dict[str, Tensor]:
    """The model's adapter with weights half as large."""
    return {name: one * 0.5 for name, one in get_peft_model_state_dict(model).items()}


def load(model: PeftModel) -> None:
    set_peft_model_state_dict(model, scaled(model))


def load_whole(model: PeftModel) -> None:
    model.load_state_dict(
        {name: one * 0.5 if "moa_" in name else one for name, one in model.state_dict().items()}
    )


def train(model: PeftModel) -> None:
    model.train()
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.mul_(0.5)
    model.eval()


def cast(model: PeftModel) -> None:
    for _, layer in mixture_layers(model):
        layer.moa_mixture.bfloat16()


@pytest.mark.parametrize("change", [load, load_whole, train, cast])
def test_weights_that_change_hands_within_the_context_are_packed_anew(
    change: Callable[[PeftModel], None],
) -> None:
    model, other = mixture_model("llama", "soft-moa"), mixture_model("llama", "soft-moa")
    with torch.no_grad(), packed_weights(model):
        before = model(tokens()).logits
        change(model)
        found = model(tokens()).logits
    change(other)
    with torch.no_grad():
        assert torch.equal(found, other(tokens()).logits)
    assert not torch.equal(found, before)


def test_nothing_is_packed_outside_of_the_context_or_with_gradients_or_in_a_copy() -> None:
    model = mixture_model("llama", "soft-moa")
    mixture = mixture_layers(model)[0][1].mixtures()["default"]
    with torch.no_grad():
        model(tokens())
    assert mixture._packed is None
    with packed_weights(model):
        model(tokens())
        assert mixture._packed == {}
        with torch.no_grad(), packed_weights(model):
            model(tokens())
        assert mixture._packed  # the inner context leaves the outer one as it is
        assert copy.deepcopy(mixture)._packed is None
    assert mixture._packed is None


def test_a_training_step_between_two_generations_is_seen_also_without_train() -> None:
    model = mixture_model("llama", "soft-moa")
    first = generated(model, tokens()[:, :1])
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.mul_(1.5)
    assert not torch.equal(first, generated(model, tokens()[:, :1]))


@pytest.mark.parametrize("method", ["soft-moa", "sparse-moa"])
def test_half_precision_is_rounded_as_by_experts_asked_one_by_one(method: str) -> None:
    """Both lie equally far from float32: what is added late, or in too low a precision, would lie further."""
    prompt = tokens(rows=64)

    def last(model: PeftModel) -> Tensor:
        with torch.no_grad(), packed_weights(model):
            past = cached(model(prompt[:, :-1], use_cache=True))
            return model(prompt[:, -1:], **past).logits.float()

    exact = last(mixture_model("llama", method))
    model = mixture_model("llama", method, dtype=torch.bfloat16)
    joined = float((last(model) - exact).norm())
    with one_by_one(model):
        apart = float((last(model) - exact).norm())
    assert joined <= 1.1 * apart


def test_adapters_are_switched_in_the_middle_of_a_generation() -> None:
    model = mixture_model("llama", "soft-moa")
    model.add_adapter("other", MoAConfig.preset("sparse-moa"))
    awaken(model)
    model.eval()
    prompt = tokens()
    default = generated(model, prompt)
    switched = generated(model, prompt, lambda: model.set_adapter("other"))
    assert torch.equal(switched[:3], default[:3])
    assert not torch.allclose(switched[3], default[3], atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(generated(model, prompt), default)


def test_another_call_within_a_generation_may_go_without_the_adapter() -> None:
    """As contrastive decoding does: the call inside must neither have the adapter nor disturb the generation."""
    model = mixture_model("llama", "soft-moa")
    prompt = tokens()
    inner: list[Tensor] = []

    def without() -> None:
        with model.disable_adapter():
            inner.append(model(prompt[:, :1]).logits)

    assert torch.equal(generated(model, prompt, without), generated(model, prompt))
    with torch.no_grad():
        assert torch.equal(inner[0], base_model("llama")(prompt[:, :1]).logits)


def test_an_observer_that_comes_in_the_middle_sees_every_token_that_follows() -> None:
    model = mixture_model("llama", "soft-moa")
    layer = mixture_layers(model)[0][1]
    records: list[GateRecord] = []
    generated(model, tokens(), lambda: setattr(layer, "observer", records.append))
    assert [tuple(one.gates.shape[:2]) for one in records] == [(3, 1)] * (NEW_TOKENS - 3)


def test_observers_do_not_change_the_numbers() -> None:
    model = mixture_model("llama", "copies")
    with torch.no_grad():
        expected = model(tokens()).logits
        for _, layer in mixture_layers(model):
            layer.observer = layer.change_observer = lambda record: None
        assert torch.equal(model(tokens()).logits, expected)
