"""Instance gates in generation: what `generate` says of the prompt, and the gates that stay with a cache."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

from instance_gates import gates, same, watching
from moa_peft import MoAConfig, UsageError
from moa_peft.mixture.gate_cache import cache_of
from tiny import awaken, base_model, cached, mixture_model, tokens


@pytest.fixture
def model() -> PeftModel:
    return mixture_model("llama", "instance-moa")


def generated(model: Any, ids: Tensor, **more: Any) -> Tensor:
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    return model.generate(input_ids=ids, **settings | more)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_and_every_cache_give_the_tokens_of_no_cache(cache: str) -> None:
    model = mixture_model("llama", "instance-moa")
    ids = F.pad(tokens(2, 5), (2, 0))
    mask = F.pad(torch.ones(2, 5, dtype=torch.long), (2, 0))
    common = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cached = GenerationConfig(**common, cache_implementation=cache, disable_compile=True)
    plain = GenerationConfig(**common, use_cache=False)
    ours = model.generate(input_ids=ids, attention_mask=mask, generation_config=cached)
    assert torch.equal(ours, model.generate(input_ids=ids, attention_mask=mask, generation_config=plain))


def test_gates_follow_the_rows_of_their_cache() -> None:
    model = mixture_model("llama", "instance-moa")
    ids = tokens(3, 5)
    with torch.no_grad():
        _, cache = cache_of(model(input_ids=ids, use_cache=True))
    key, before = next(iter(cache.moa_record.gates.items()))
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.moa_record.gates[key], before[[2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.moa_record.gates[key], before[[2, 2, 0, 0]])
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert torch.equal(cache.moa_record.gates[key], before[[0, 2, 2, 0]])
    cache.reset()
    assert cache.moa_record is None


@pytest.mark.parametrize("method", ["instance-moa", "unipeft"])
@pytest.mark.parametrize("said", ["argument", "config", "model"])
def test_a_prompt_in_chunks_is_refused_with_instance_gates(method: str, said: str) -> None:
    """The gates were those of the first chunk, and the text another."""
    model = mixture_model("llama", method)
    given: dict[str, Any] = {"input_ids": tokens(1, 9), "max_new_tokens": 2, "do_sample": False}
    if said == "argument":
        given["prefill_chunk_size"] = 4
    elif said == "config":
        settings = GenerationConfig(max_new_tokens=2, prefill_chunk_size=4, pad_token_id=0)
        given = {"input_ids": given["input_ids"], "generation_config": settings}
    else:
        model.generation_config.prefill_chunk_size = 4
    with pytest.raises(UsageError, match="prefill_chunk_size reads the prompt in several calls"):
        model.generate(**given)


def test_a_prompt_in_chunks_gives_the_same_text_with_gates_for_each_token() -> None:
    model, ids = mixture_model("llama", "soft-moa"), tokens(1, 9)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    given |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": 96}
    assert torch.equal(model.generate(**given), model.generate(**given, prefill_chunk_size=4))


@pytest.fixture(params=["peft's", "the base model's", "transformers' own loading"])
def loaded(request: pytest.FixtureRequest, model: PeftModel, tmp_path: Path) -> Any:
    if request.param == "peft's":
        return model
    if request.param == "the base model's":
        return model.get_base_model()
    base_model("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    native.generation_config.eos_token_id = None
    return native


@pytest.mark.parametrize("training", [False, True])
def test_every_generate_gives_the_tokens_of_the_prompts_gates_without_a_cache_too(
    loaded: Any, model: PeftModel, training: bool
) -> None:
    ids = tokens(2, 7)
    expected = generated(model, ids)
    assert torch.equal(generated(loaded.train(training), ids, use_cache=False), expected)
    assert torch.equal(
        generated(loaded, ids, num_return_sequences=1, return_dict_in_generate=False), expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["prompt_lookup_num_tokens", "target", "draft", "both"])
def test_assisted_generation_gives_the_tokens_of_plain_generation(loaded: Any, form: str) -> None:
    """The first call of its target holds candidates beside the prompt."""
    ids, other = tokens(1, 7), mixture_model("llama", "instance-moa" if form == "both" else "soft-moa")
    awaken(other, seed=5)
    target, draft = (other, loaded) if form == "draft" else (loaded, other)
    expected = generated(target, ids, max_new_tokens=14)
    draft = draft.get_base_model() if isinstance(draft, PeftModel) else draft
    draft.generation_config.num_assistant_tokens = 1
    more = {form: 3} if form not in ("target", "draft", "both") else {"assistant_model": draft}
    assert torch.equal(generated(target, ids, max_new_tokens=14, **more), expected)


@pytest.mark.parametrize("told", [False, True])
def test_a_prompt_whose_beginning_is_in_the_cache_is_refused(loaded: Any, told: bool) -> None:
    """The gates were those of the beginning."""
    ids = tokens(1, 7)
    with torch.no_grad():
        past = cached(loaded(input_ids=ids[:, :4], **{"prompt_length": 4} if told else {}))
    with pytest.raises(UsageError, match="this call may go on with it"):
        generated(loaded, ids, **past)
    if not told:
        with pytest.raises(UsageError, match="this call may go on with it"):
            loaded(input_ids=ids[:, 4:], **past)


def test_a_conversation_on_its_cache_keeps_the_gates_of_its_first_prompt(loaded: Any) -> None:
    ids = tokens(1, 7)
    first = generated(loaded, ids, return_dict_in_generate=True)
    more = torch.cat([first.sequences, tokens(1, 4, seed=3)], dim=1)
    with torch.no_grad(), watching(loaded) as seen:
        found = generated(loaded, more, **cached(first))
        assert not seen.calls, "it makes no gates of its own"
        expected = more
        for _ in range(8):
            logits = loaded(input_ids=expected, prompt_length=7).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("length", [3, 12])
def test_a_second_prompt_inside_a_generation_has_gates_of_its_own(loaded: Any, length: int) -> None:
    """Of a longer one, as many tokens were taken as the first has."""
    ids, negative = tokens(1, 7), tokens(1, length, seed=9)
    with watching(loaded) as seen:
        generated(loaded, ids, guidance_scale=1.5, negative_prompt_ids=negative)
    own, other = seen.calls
    assert same(own, gates(loaded, input_ids=ids))
    assert same(other, gates(loaded, input_ids=negative))


def test_a_generation_leaves_the_model_as_it_was(model: PeftModel) -> None:
    base = model.get_base_model()
    before = set(vars(base))
    with pytest.raises(UsageError):
        generated(model, tokens(1, 5), prefill_chunk_size=2)
    generated(model, tokens(1, 5))
    assert set(vars(base)) == before
    plain = model.unload()
    assert "generate" not in vars(plain)
    assert torch.equal(generated(plain, tokens(1, 5)), generated(base_model("llama"), tokens(1, 5)))


def pickled(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, copy.copy])
@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_as_the_cache_does(model: PeftModel, copied: Callable[[Any], Any]) -> None:
    ids, token = tokens(2, 5), tokens(2, 1, seed=7)
    ((name, cache),) = cached(model(input_ids=ids)).items()
    one = copied(cache)
    again = copied(one)
    assert type(one) is type(cache)
    expected = model(input_ids=token, **{name: cache}).logits if copied is not copy.copy else None
    found = model(input_ids=token, **{name: one if copied is copy.copy else again}).logits
    whole = model(input_ids=torch.cat([ids, token], dim=1), prompt_length=5).logits[:, -1:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert expected is None or torch.equal(found, expected)
    one.reorder_cache(torch.tensor([1, 0]))
    assert not torch.equal(
        next(iter(one.moa_record.gates.values())), next(iter(cache.moa_record.gates.values()))
    )


@torch.no_grad()
def test_a_cache_cut_within_its_prompt_or_filled_by_another_adapter_is_refused(model: PeftModel) -> None:
    """The gates of the first prompt were taken, or new ones made of the tokens that came next."""
    token = tokens(2, 1, seed=7)
    cut = cached(model(input_ids=tokens(2, 5)))
    cache_of(cut)[1].crop(-2)
    with model.disable_adapter():
        plain = cached(model(input_ids=tokens(2, 5)))
    model.add_adapter("other", MoAConfig.preset("instance-moa"))
    model.set_adapter("other")
    model.eval()
    others = cached(model(input_ids=tokens(2, 5)))
    model.set_adapter("default")
    for past in (cut, plain, others):
        with pytest.raises(UsageError, match="no instance gates of this adapter"):
            model(input_ids=token, **past)


@torch.no_grad()
def test_a_prompt_length_on_a_cache_with_tokens_is_refused(model: PeftModel) -> None:
    past = cached(model(input_ids=tokens(2, 5), prompt_length=5))
    with pytest.raises(UsageError, match="prompt_length belongs into the first call on a cache"):
        model(input_ids=tokens(2, 3), **past, prompt_length=8)


@torch.no_grad()
def test_a_model_that_gives_a_tuple_leaves_its_gates_with_the_cache_too(model: PeftModel) -> None:
    ids, token = tokens(2, 5), tokens(2, 1, seed=7)
    _, cache = cache_of(model(input_ids=ids, return_dict=False))
    name = next(iter(cached(model(input_ids=ids))))
    found = model(input_ids=token, **{name: cache}).logits
    whole = model(input_ids=torch.cat([ids, token], dim=1), prompt_length=5).logits[:, -1:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
