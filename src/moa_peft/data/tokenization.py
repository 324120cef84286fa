"""Tokens of a prompt and its completion, and the labels that make the loss count the completion alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moa_peft.data.row import Row
from moa_peft.data.templates import PAPER, Template, render_chat, render_completion, render_prompt
from moa_peft.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position that the loss leaves out."""

_REPLY = "moareply"
"""Stands for a reply where only what follows it is looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One example as tokens."""

    input_ids: list[int]
    """Tokens of the prompt, the completion and the end token."""

    labels: list[int]
    """The same where the loss counts, -100 on the prompt."""

    @property
    def num_answer_tokens(self) -> int:
        """Positions that the loss counts."""
        return sum(label != IGNORED for label in self.labels)

    def cut(self, max_length: int) -> "Encoded":
        """Its first tokens; without the end token, it does not teach the model to stop early."""
        return Encoded(input_ids=self.input_ids[:max_length], labels=self.labels[:max_length])


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRows:
    """The examples of a data set as tokens."""

    examples: list[Encoded]
    """Those with at least one answer token, in the order of their rows."""

    dropped: int
    """Rows left out because cutting left no answer token."""

    cut: int
    """Kept examples whose answer lost its end."""


def end_token_id(tokenizer: "PreTrainedTokenizerBase", template: Template = "paper") -> int:
    """The token that ends a reply: what training appends and what generation stops at.

    Args:
        tokenizer: The base model's.
        template: How a row becomes text.

    Returns:
        The token that the chat template writes after a reply, with "chat" (Gemma: ``<end_of_turn>``). Its `eos_token_id`
        with "paper", and with a chat template that writes nothing there.

    Raises:
        UsageError: If there is no end token, or what the chat template writes is no token of the tokenizer.
    """
    if template == "chat":
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY}]
        _, reply, after = render_chat(turns, tokenizer, reply_follows=False).rpartition(_REPLY)
        ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"]
        if not reply or (ids and ids[0] not in tokenizer.added_tokens_decoder):
            raise UsageError(
                f"the tokenizer's chat template ends a reply with {after.strip()!r}, which is not one of its special tokens, or "
                "leaves replies out: use template 'paper'"
            )
        if ids:
            return ids[0]
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UsageError(
            "the tokenizer of this model has no eos_token, so a reply could not end: set one and save it"
        )
    return end


def prompt_ids(prompt: str, tokenizer: "PreTrainedTokenizerBase", template: Template) -> list[int]:
    """Tokenise a prompt as training and evaluation both see it.

    Args:
        prompt: Text from `render_prompt`.
        tokenizer: The base model's.
        template: What rendered the prompt. With "paper" the tokenizer adds its special tokens in front; a "chat" text
            already holds them.

    Returns:
        Token ids; an end token that the tokenizer adds of itself is taken off.
    """
    if template == "chat":
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = list(tokenizer(prompt)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def conversation_ids(
    turns: Sequence[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[int]:
    """Tokenise a conversation up to where the model's next turn begins.

    Args:
        turns: Each with a role and its content, the user's last.
        tokenizer: The base model's.
        template: "chat" reads every turn; "paper" is for single instructions, and reads system turns and the last one.

    Raises:
        UsageError: As `render_chat`.
    """
    if template == "chat":
        return prompt_ids(render_chat(turns, tokenizer), tokenizer, "chat")
    system = "\n\n".join(one["content"] for one in turns[:-1] if one["role"] == "system")
    row = Row(instruction=turns[-1]["content"], input="", output="", answer="", system=system)
    return prompt_ids(render_prompt(row, "paper", tokenizer), tokenizer, "paper")


_ONE_TURN = (
    "{%- if messages[-1].role != 'user' or messages[:-1] | rejectattr('role', 'equalto', 'system') | list -%}"
    "{{ raise_exception('this model was trained on single instructions: give one user message, after system messages') }}"
    "{%- endif -%}"
)


def paper_chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Write the paper's template as a chat template, for servers that know no other.

    Args:
        tokenizer: The base model's; what it puts in front of a text stands in front of the template.

    Returns:
        A template of one user's turn, after turns of the system, which are joined to it.
    """
    start = str(tokenizer.decode(prompt_ids("", tokenizer, "paper")))
    told = PAPER.format(instruction="{{ messages | map(attribute='content') | join('\\n\\n') }}")
    return _ONE_TURN + start + told.removesuffix("\n") + "{{ '\\n' }}"  # Jinja drops a newline at the end


def completion_ids(completion: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenise a completion by itself, without special tokens and without the end token."""
    return tokenizer(completion, add_special_tokens=False)["input_ids"]


def encode(
    prompt: str, completion: str, tokenizer: "PreTrainedTokenizerBase", *, template: Template, end: int
) -> Encoded:
    """Turn a prompt and its completion into tokens and labels.

    The two are tokenised by themselves and joined, so that no token spans the boundary.

    Args:
        prompt: Text from `render_prompt`.
        completion: The reply.
        tokenizer: The base model's. Any token id, 0 included, is an ordinary token.
        template: What rendered the prompt.
        end: The token after the reply, from `end_token_id`.

    Returns:
        The whole example.
    """
    asked = prompt_ids(prompt, tokenizer, template)
    reply = [*completion_ids(completion, tokenizer), end]
    return Encoded(input_ids=[*asked, *reply], labels=[*([IGNORED] * len(asked)), *reply])


def encode_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    max_length: int,
    what: str = "rows",
) -> EncodedRows:
    """Turn rows into examples to train on or to measure the answer loss on.

    Args:
        rows: At least one row.
        tokenizer: The base model's.
        template: How a row becomes text.
        max_length: Tokens kept of each example, counted from the start.
        what: What the rows are called in an error.

    Returns:
        The examples with at least one answer token, and how many rows had none left.

    Raises:
        UsageError: If no row has an answer token left; the message names a length that would do. Also if the
            template cannot be used with the tokenizer.
    """
    end = end_token_id(tokenizer, template)
    whole = [
        encode(
            render_prompt(row, template, tokenizer),
            render_completion(row),
            tokenizer,
            template=template,
            end=end,
        )
        for row in rows
    ]
    examples = [short for one in whole if (short := one.cut(max_length)).num_answer_tokens]
    if not examples:
        enough = sorted(len(one.input_ids) for one in whole)[(len(whole) - 1) // 2]
        raise UsageError(
            f"max_length {max_length} cuts away every answer of the {what} ({len(rows)}): give max_length {enough} or more; "
            f"{enough} is the shortest that keeps half of the rows whole"
        )
    dropped = len(whole) - len(examples)
    too_long = sum(len(one.input_ids) > max_length for one in whole)
    return EncodedRows(examples=examples, dropped=dropped, cut=too_long - dropped)
