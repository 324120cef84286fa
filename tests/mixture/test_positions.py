"""Padding on the left, where a call names no positions: it moves no prompt, and a cache is gone on with as it was begun."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from moa_peft import MoAConfig
from pictures import model_of
from structures import shifted
from tiny import awaken, base_model, largest, mixture_model, tokens

IDS = tokens(2, 9)
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[0, :4] = 0


@torch.no_grad()
def in_steps(model: nn.Module, *, four: bool = False) -> Tensor:
    """Logits of the last two tokens, each in a call of its own on a cache."""
    past, found = DynamicCache(), []
    for first, last in ((0, 7), (7, 8), (8, 9)):
        mask: Tensor = MASK[:, :last]
        if four:
            causal = torch.ones(last, last, dtype=torch.bool).tril()[first:]
            mask = (causal & mask.bool().unsqueeze(1)).unsqueeze(1)
        given = model(input_ids=IDS[:, first:last], attention_mask=mask, past_key_values=past, use_cache=True)
        found.append(given.logits[:, -1:])
    return torch.cat(found[1:], dim=1)


@torch.no_grad()
def whole(model: nn.Module, **given: Any) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK, **given).logits


def test_calls_on_a_cache_give_what_one_call_gives() -> None:
    model = mixture_model("llama", "soft-moa")
    assert largest(in_steps(model), whole(model)[:, 7:]) < 1e-4


def test_positions_are_the_models_own_where_masks_say_nothing_of_what_a_cache_will_hold() -> None:
    """Gemma 3 with pictures gives its language model masks of four dimensions; without a cache they say enough."""
    model = get_peft_model(model_of("gemma3"), MoAConfig.preset("soft-moa")).eval()
    awaken(model)
    assert largest(in_steps(model), whole(model, use_cache=True)[:, 7:]) < 1e-4
    assert shifted(model) < 1e-4


def test_a_cache_begun_with_a_mask_of_four_dimensions_is_gone_on_with_as_it_was() -> None:
    model = mixture_model("llama", "soft-moa")
    seen = (torch.ones(9, 9, dtype=torch.bool).tril() & MASK.bool().unsqueeze(1)).unsqueeze(1)
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=seen, use_cache=True).logits[:, 7:]
    assert largest(in_steps(model, four=True), expected) < 1e-4


@pytest.mark.parametrize("first", ["with prompts", "without"])
def test_an_adapter_that_takes_over_a_cache_goes_on_with_its_positions(first: str) -> None:
    """The tokens of one text had two ways of counting."""
    model = mixture_model("llama", "soft-moa")
    model.add_adapter("plain", MoAConfig.preset("soft-lora"))
    order = ["default", "plain"] if first == "with prompts" else ["plain", "default"]
    found: dict[str, Tensor] = {}
    own = (MASK.cumsum(1) - 1).clamp(min=0) if first == "with prompts" else torch.arange(9).expand(2, -1)
    for kind in ("named", "not named"):
        past, last = DynamicCache(), torch.empty(0)
        for adapter, part in zip(order, (slice(0, 7), slice(7, 9)), strict=True):
            model.set_adapter(adapter)
            model.eval()
            named = {"position_ids": own[:, part]} if kind == "named" else {}
            with torch.no_grad():
                given = model(
                    input_ids=IDS[:, part], attention_mask=MASK[:, : part.stop], past_key_values=past, **named
                )
            last = given.logits
        found[kind] = last
    assert largest(found["named"], found["not named"]) < 1e-5


def test_a_copy_of_a_model_counts_for_itself() -> None:
    """It asked the layers of the model that it was copied from."""
    model = mixture_model("llama", "soft-moa")
    twin = copy.deepcopy(model)
    expected = whole(model)
    with model.disable_adapter():
        assert torch.equal(whole(twin), expected)
    base = base_model("llama")
    with twin.disable_adapter():
        assert torch.equal(whole(twin), whole(base))
        assert torch.equal(whole(model), expected)
    model.delete_adapter("default")
    assert torch.equal(whole(twin), expected)


@pytest.mark.parametrize("mask", [MASK.bool(), MASK.float(), MASK * 3])
def test_whatever_is_not_zero_in_a_mask_is_one_token(mask: Tensor) -> None:
    model = mixture_model("llama", "soft-moa")
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=mask).logits
    assert largest(found[MASK.bool()], whole(model)[MASK.bool()]) < 1e-5


def test_positions_may_be_named_by_their_place_and_are_taken_as_they_are() -> None:
    model = mixture_model("llama", "soft-moa").get_base_model().model
    own = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        named = model(input_ids=IDS, attention_mask=MASK, position_ids=own)[0]
        assert torch.equal(model(IDS, MASK, own)[0], named)
        assert torch.equal(model(IDS, MASK, None)[0], model(input_ids=IDS, attention_mask=MASK)[0])
    assert largest(named, model(IDS, MASK)[0]) > 1e-3
