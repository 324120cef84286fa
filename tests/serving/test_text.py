import pytest
from transformers import LlamaTokenizer

from moa_peft.serving.text import AnswerText
from tiny_lm import byte_tokenizer

END = 256


def told(
    text: str, *, size: int, stops: tuple[str, ...] = (), end: bool = True
) -> tuple[list[str], str | None]:
    """What an answer of some tokens at a time becomes, and why it ends."""
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(text)["input_ids"], *([END] if end else [])]
    answer, pieces = AnswerText(tokenizer, {END}, stops), []
    for start in range(0, len(ids), size):
        pieces.append(answer.add(ids[start : start + size]))
        if answer.reason is not None:
            return pieces, answer.reason
    return [*pieces, answer.finish("length")], answer.reason


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("text", ["plain", "größer 😀 ok", "  spaces  ", ""])
def test_the_pieces_are_the_text_and_no_half_characters(text: str, size: int) -> None:
    pieces, reason = told(text, size=size)
    assert ("".join(pieces), reason) == (text, "stop")
    assert not any("\ufffd" in one for one in pieces)


def test_what_is_cut_in_a_character_ends_with_the_mark_of_it() -> None:
    tokenizer = byte_tokenizer()
    answer = AnswerText(tokenizer, {END}, ())
    pieces = [answer.add(tokenizer("a😀")["input_ids"][:3]), answer.finish("length")]
    assert "".join(pieces) == "a\ufffd"
    assert (answer.reason, answer.count) == ("length", 3)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("stops", "expected", "reason"),
    [
        (("ENDS",), "a EN EN", "stop"),
        (("EN E",), "a ", "stop"),
        (("DS", "NDS"), "a EN EE", "stop"),
        (("ENDSX",), "a EN ENDS", "length"),
        (("never",), "a EN ENDS", "length"),
    ],
)
def test_a_stop_ends_the_text_before_it_and_nothing_of_it_is_told(
    stops: tuple[str, ...], expected: str, reason: str, size: int
) -> None:
    text = "a EN ENENDS" if stops == ("ENDS",) else "a EN EENDS" if stops[0] == "DS" else "a EN ENDS"
    pieces, found = told(text, size=size, stops=stops, end=False)
    assert ("".join(pieces), found) == (expected, reason)


def llama_tokenizer() -> LlamaTokenizer:
    """With a decoder that takes the space before the first word away, as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"Helowrdis", "\u2581H", "\u2581w", "\u2581i"]
    merges = [("\u2581", "H"), ("\u2581", "w"), ("\u2581", "i")]
    return LlamaTokenizer(vocab={one: place for place, one in enumerate(pieces)}, merges=merges)


def test_the_rest_of_a_text_keeps_the_space_before_it() -> None:
    tokenizer = llama_tokenizer()
    ids = tokenizer("Hello world is", add_special_tokens=False)["input_ids"]
    for cut in range(1, len(ids)):
        answer = AnswerText(tokenizer, {END}, (), ids[:cut])
        rest = "".join([*(answer.add([one]) for one in ids[cut:]), answer.finish("length")])
        assert tokenizer.decode(ids[:cut]) + rest == "Hello world is"
        assert answer.count == len(ids) - cut


def test_a_special_token_takes_no_space_away() -> None:
    tokenizer = llama_tokenizer()
    world, rest = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in ("world", "is"))
    answer = AnswerText(tokenizer, {END}, ())
    assert "".join(answer.add([one]) for one in [*world, tokenizer.unk_token_id, *rest]) == "world is"


def test_a_prompt_that_ends_within_a_character_is_gone_on_from() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("日本語ab")["input_ids"]
    answer = AnswerText(tokenizer, {END}, (), ids[:8])
    assert "".join([*(answer.add([one]) for one in ids[8:]), answer.finish("length")]) == "語ab"
