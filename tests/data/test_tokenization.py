"""Text and tokens of an example: what the model sees, what it learns, and what is cut."""

from collections.abc import Callable
from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerFast

from moa_peft.data.row import Row
from moa_peft.data.templates import Template, render_completion, render_prompt
from moa_peft.data.tokenization import completion_ids, encode, encode_rows, end_token_id, prompt_ids
from moa_peft.errors import UsageError

END = 999
"""An end token that no text has."""

both_templates = pytest.mark.parametrize("template", ["paper", "chat"])


def row(instruction: str = "Add.", output: str = "4!", given: str = "") -> Row:
    return Row(instruction=instruction, input=given, output=output, answer="")


def test_the_paper_template_is_the_instruction_form_with_and_without_input() -> None:
    plain, with_input = row("Say {x}."), row("Add {input}.", given="2 and 2")
    assert render_prompt(plain, "paper", None) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay {x}.\n\n### Response:\n"
    )
    assert render_prompt(with_input, "paper", None) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {input}.\n\n### Input:\n2 and 2\n\n### Response:\n"
    )


def test_the_chat_template_opens_the_assistants_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_prompt(row(), "chat", tokenizer) == "<s>user:Add.</s><s>assistant:"
    assert render_prompt(row(given="2, 2"), "chat", tokenizer) == "<s>user:Add.\n\n2, 2</s><s>assistant:"
    assert render_completion(row()) == "4!"


GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Ends a turn with another token than the tokenizer's end token, and knows no system turn."""


def test_a_chat_reply_ends_as_the_template_ends_a_turn(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    """Gemma learned to end its replies with the tokenizer's <eos>, which ends no turn."""
    gemma = make_tokenizer(chat=GEMMA)
    gemma.add_special_tokens({"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    end = gemma.convert_tokens_to_ids("<end_of_turn>")
    (one,) = encode_rows([row()], gemma, "chat", 100).examples
    assert gemma.decode(one.input_ids).endswith("<start_of_turn>model\n4!<end_of_turn>")
    assert one.labels[-1] == end_token_id(gemma, "chat") == end
    assert encode_rows([row()], gemma, "paper", 999).examples[0].labels[-1] == gemma.eos_token_id
    endless = make_tokenizer(chat="{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert end_token_id(endless, "chat") == endless.eos_token_id


@pytest.mark.parametrize(
    "chat", ["{{ messages[0]['content'] }}", "{{ messages[-1]['content'] }} over and out"]
)
def test_a_template_whose_end_cannot_be_known_is_refused(
    chat: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    with pytest.raises(
        UsageError, match=r"ends a reply with .*which is not one of its special tokens, or leaves"
    ):
        end_token_id(make_tokenizer(chat=chat), "chat")


def test_a_system_turn_stays_one_in_a_chat_and_stands_first_in_the_papers_instruction(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], tokenizer: PreTrainedTokenizerFast
) -> None:
    told = Row(instruction="Add.", input="", output="4!", answer="", system="Be brief.")
    assert render_prompt(told, "chat", tokenizer) == "<s>system:Be brief.</s><s>user:Add.</s><s>assistant:"
    assert "### Instruction:\nBe brief.\n\nAdd.\n" in render_prompt(told, "paper", None)
    with pytest.raises(
        UsageError, match="refuses system, user: System role not supported: use template 'paper'"
    ):
        render_prompt(told, "chat", make_tokenizer(chat=GEMMA))


def test_a_chat_template_that_does_not_end_is_stopped(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moa_peft.data.templates._LONGEST_S", 0.1)
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
    with pytest.raises(UsageError, match=r"chat template has not ended after 0\.1 s: use another one"):
        render_prompt(row(), "chat", make_tokenizer(chat=loops))


def test_chat_without_a_chat_template_points_to_the_paper_template(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    with pytest.raises(UsageError, match="has no chat template: use template 'paper'"):
        render_prompt(row(), "chat", make_tokenizer(chat=None))


def test_an_unknown_template_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="unknown template 'papers': did you mean 'paper'"):
        render_prompt(row(), cast("Template", "papers"), tokenizer)


@both_templates
def test_no_token_spans_the_boundary_and_only_the_completion_counts(
    tokenizer: PreTrainedTokenizerFast, template: Template
) -> None:
    assert len(tokenizer("ab", add_special_tokens=False)["input_ids"]) == 1
    one = encode("a", "b!", tokenizer, template=template, end=END)
    letters = [tokenizer.convert_tokens_to_ids(token) for token in "ab!"]
    start = [tokenizer.bos_token_id] if template == "paper" else []
    assert one.input_ids == [*start, *letters, END]
    assert one.labels == [-100] * (len(start) + 1) + [*letters[1:], END]
    assert one.num_answer_tokens == 3


def test_token_zero_is_learned_like_any_other(tokenizer: PreTrainedTokenizerFast) -> None:
    one = encode("!", "!!", tokenizer, template="chat", end=END)
    assert one.input_ids == [0, 0, 0, END]
    assert one.labels == [-100, 0, 0, END]


def test_a_chat_text_gets_no_second_start_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_ids(render_prompt(row(), "chat", tokenizer), tokenizer, "chat")
    assert ids.count(cast("int", tokenizer.bos_token_id)) == 2  # the user's turn and the assistant's
    assert tokenizer.decode(ids) == "<s>user:Add.</s><s>assistant:"


def test_an_end_token_that_the_tokenizer_adds_does_not_close_the_prompt(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    closing = make_tokenizer(adds="<s> $A </s>")
    assert closing("c")["input_ids"][-1] == closing.eos_token_id
    assert prompt_ids("c", closing, "paper") == make_tokenizer()("c")["input_ids"]
    assert completion_ids("c", closing) == make_tokenizer()("c", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("max_length", range(1, 8))
def test_the_cut_takes_the_end_off_tokens_and_labels_alike(
    tokenizer: PreTrainedTokenizerFast, max_length: int
) -> None:
    whole = encode("cde", "fg", tokenizer, template="paper", end=END)
    assert len(whole.input_ids) == 7
    cut = whole.cut(max_length)
    assert cut.input_ids == whole.input_ids[:max_length]
    assert cut.labels == whole.labels[:max_length]
    assert (END in cut.input_ids) == (max_length == 7)


def test_a_tokenizer_without_an_end_token_is_an_error(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    assert end_token_id(make_tokenizer()) == make_tokenizer().convert_tokens_to_ids("</s>")
    with pytest.raises(UsageError, match="has no eos_token, so a reply could not end"):
        end_token_id(make_tokenizer(end=None))


@both_templates
def test_rows_are_encoded_as_one_by_one_and_those_without_answer_are_dropped(
    tokenizer: PreTrainedTokenizerFast, template: Template
) -> None:
    rows = [row("q" * n, "c" * m) for n, m in [(3, 2), (60, 2), (5, 0), (4, 9)]]
    texts = [render_prompt(one, template, tokenizer) for one in rows]
    end = end_token_id(tokenizer, template)
    whole = [
        encode(text, one.output, tokenizer, template=template, end=end)
        for text, one in zip(texts, rows, strict=True)
    ]
    limit = len(whole[3].input_ids) - 1  # cuts the end token of the last row, and the long prompt
    encoded = encode_rows(rows, tokenizer, template, limit)
    kept = [(0, 0), (2, 1), (3, 2)]
    for number, place in kept:
        assert encoded.examples[place] == whole[number].cut(limit)
    assert (len(encoded.examples), encoded.dropped, encoded.cut) == (3, 1, 1)


def test_when_every_answer_is_cut_away_the_error_names_a_length_that_keeps_half(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [row("q" * n, "cccc") for n in (50, 10, 40, 20, 30)]
    with pytest.raises(
        UsageError,
        match=r"max_length 5 cuts away every answer of the rows \(5\): give max_length \d+ or more",
    ) as told:
        encode_rows(rows, tokenizer, "paper", 5)
    named = int(str(told.value).split("give max_length ")[1].split()[0])

    def whole_at(length: int) -> int:
        found: Any = encode_rows(rows, tokenizer, "paper", length)
        return len(found.examples) - found.cut

    assert whole_at(named) == 3
    assert whole_at(named - 1) == 2
