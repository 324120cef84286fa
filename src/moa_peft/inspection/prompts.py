"""Prompts to look at: read from a file or from rows, and cut into the pieces that tokens stand for."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moa_peft.data.row import Row
from moa_peft.data.templates import Template, render_prompt
from moa_peft.data.tokenization import prompt_ids
from moa_peft.errors import UsageError
from moa_peft.inspection.forward_pass import TokenText
from moa_peft.inspection.gate_statistics import token_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MARKS = ("\ue000", "\ue001")
"""Characters of no text, which stand for a question and its input while their places are looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text for the model, and which parts of it are its own."""

    text: str
    """All that the model reads."""
    own: tuple[tuple[int, int], ...]
    """Where the question stands in it, as (start, end); the rest is template."""
    holds_special: bool = False
    """Whether special tokens stand in the text, so that the tokenizer must add none."""


def read_prompts(file: Path) -> list[str]:
    """Read a prompt from each line of a text file; lines without text count for nothing.

    Raises:
        UsageError: If the file is missing, is not text in UTF-8 or holds no prompt.
    """
    if not file.is_file():  # nor a pipe or a device, which may have no end
        what = "is a folder" if file.is_dir() else "is no file" if file.exists() else "does not exist"
        raise UsageError(f"--prompts {file} {what}: give a text file with a prompt a line")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--prompts {file} is not text in UTF-8: {error.reason} at byte {error.start}; give a file with a prompt a line"
        ) from error
    if "\0" in text:
        raise UsageError(
            f"--prompts {file} is not text: it holds zero bytes; give a file with a prompt a line"
        )
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {file} is empty: write a prompt on each line")
    return prompts


def as_prompt(row: Row, template: Template | None, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
    """Write a row as the model sees it before its reply; without a template, the question's own words alone.

    Raises:
        UsageError: As `render_prompt`.
    """
    if template is None:
        text = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
        return Prompt(text=text, own=((0, len(text)),))
    text = render_prompt(row, template, tokenizer)
    marked = dataclasses.replace(row, instruction=_MARKS[0], input=_MARKS[1] if row.input else "")
    places = render_prompt(marked, template, tokenizer)
    own: list[tuple[int, int]] = []
    longer = 0  # than the marks before
    for mark, whole in zip(_MARKS, (row.instruction, row.input), strict=True):
        start = places.find(mark) + longer
        part = next((one for one in (whole, whole.strip()) if one and text.startswith(one, start)), "")
        if part and mark in places:
            own.append((start, start + len(part)))
            longer += len(part) - len(mark)
    return Prompt(text=text, own=tuple(own), holds_special=template == "chat")


def token_ids(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Cut a prompt into the tokens that training and evaluation see; any tokenizer does that."""
    return tuple(prompt_ids(prompt.text, tokenizer, "chat" if prompt.holds_special else "paper"))


def tokenise(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> list[TokenText]:
    """Cut prompts into tokens, each with its piece of the text and its class.

    The pieces of a text, one after the other, are the text; those of special tokens that the tokenizer adds are their
    names.

    Raises:
        UsageError: If the tokenizer is not a fast one, which alone knows where in the text its tokens stand.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand: give a model with a fast tokenizer"
        )
    return [_tokenise(one, tokenizer) for one in prompts]


def _tokenise(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> TokenText:
    encoded = tokenizer(
        prompt.text,
        add_special_tokens=not prompt.holds_special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids = token_ids(prompt, tokenizer)  # without an end token that the tokenizer adds
    special = set(tokenizer.all_special_ids)
    pieces: list[str] = []
    classes: list[int] = []
    end = 0
    for token, (start, stop), added in zip(
        ids, encoded["offset_mapping"], encoded["special_tokens_mask"], strict=False
    ):
        is_special = bool(added) or token in special
        outside = not any(left < max(stop, start + 1) and start < right for left, right in prompt.own)
        piece = prompt.text[end : max(stop, end)]  # what a tokenizer trims stays with the token behind it
        end = max(stop, end)
        if not piece and stop == start:
            piece = str(tokenizer.convert_ids_to_tokens(token))
        pieces.append(piece)
        # one of a character's several tokens has no piece of its own
        classes.append(token_class(piece or prompt.text[start:stop], special=is_special, template=outside))
    return TokenText(ids=ids, pieces=tuple(pieces), classes=tuple(classes))
