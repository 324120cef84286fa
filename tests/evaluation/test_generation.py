import pytest
import torch
from transformers import GenerationConfig

from moa_peft.evaluation.generation import as_generation, end_ids, generate_batch
from oracles import generate
from tiny_lm import byte_tokenizer, tiny_llama, with_mixture

TOKENIZER = byte_tokenizer()
PROMPTS = [[*f"{'so ' * (place * 5 % 7)}what is {place}?".encode()] for place in range(9)]


def ends_that_occur() -> frozenset[int]:
    """Tokens that a few of the prompts reach soon, so that rows end at different steps."""
    replies = generate_batch(tiny_llama(), PROMPTS, max_new_tokens=12, ends=())
    return frozenset({replies[0][3], replies[1][6]})


def test_greedy_tokens_equal_those_of_transformers_one_prompt_at_a_time() -> None:
    model, ends = tiny_llama(), ends_that_occur()
    found = generate_batch(model, PROMPTS, max_new_tokens=12, ends=ends)
    assert len({len(one) for one in found}) > 2, "rows should end at different steps"
    for prompt, reply in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        settings = GenerationConfig(
            max_new_tokens=12, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0
        )
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert isinstance(whole, torch.Tensor)
        assert reply == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [2, 8, 9])
def test_texts_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    model = with_mixture(tiny_llama())
    alone = generate(model, TOKENIZER, PROMPTS, max_new_tokens=10, batch_size=1)
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=10, batch_size=batch_size) == alone


def test_the_models_own_penalties_and_sampling_are_not_used() -> None:
    model = tiny_llama()
    plain = generate_batch(model, PROMPTS, max_new_tokens=12, ends=())
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    assert generate_batch(model, PROMPTS, max_new_tokens=12, ends=()) == plain


def test_a_row_stops_at_its_end_token_and_one_cut_off_says_so() -> None:
    ends = frozenset({256})
    ended = as_generation([*b"yes", 256], ends, TOKENIZER)
    assert (ended.text, ended.num_tokens, ended.stopped) == (TOKENIZER.decode([*b"yes"]), 4, "end")
    cut = as_generation([*b"yes"], ends, TOKENIZER)
    assert (cut.num_tokens, cut.stopped) == (3, "length")
    assert as_generation([*b"yes!"], [ord("!")], TOKENIZER).text == ended.text
    assert as_generation([256], ends, TOKENIZER).text == ""
    for reply in generate_batch(tiny_llama(), PROMPTS, max_new_tokens=4, ends=()):
        assert len(reply) == 4


def test_the_end_tokens_are_the_tokenizers_and_the_models_together() -> None:
    model = tiny_llama()
    assert end_ids(model, TOKENIZER) == {256}
    model.generation_config.eos_token_id = [7, 8]
    assert end_ids(model, TOKENIZER) == {7, 8, 256}
    assert end_ids(with_mixture(model), TOKENIZER) == {7, 8, 256}


def test_with_a_chat_template_the_token_that_ends_its_turns_ends_an_answer_too() -> None:
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"
    model = tiny_llama()
    assert end_ids(model, tokenizer, "chat") == {256, 257}
    assert end_ids(model, tokenizer, "paper") == {256}


def test_a_row_that_needs_no_more_stops_and_leaves_the_others_as_they_are() -> None:
    whole = generate_batch(tiny_llama(), PROMPTS, max_new_tokens=12, ends=())
    asked: list[int] = []

    def has_ended(row: int, tokens: list[int]) -> bool:
        asked.append(row)
        return row % 2 == 0 and len(tokens) == 3 + row

    found = generate_batch(tiny_llama(), PROMPTS, max_new_tokens=12, ends=(), has_ended=has_ended)
    assert [len(one) for one in found] == [3, 12, 5, 12, 7, 12, 9, 12, 11]
    assert all(one == other[: len(one)] for one, other in zip(found, whole, strict=True))
    assert set(asked) == set(range(9))
