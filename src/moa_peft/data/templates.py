"""How a row becomes text: the instruction template of the paper, or the tokenizer's own chat template."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from moa_peft.data.row import Row
from moa_peft.errors import UsageError, unknown
from moa_peft.time_limit import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["paper", "chat"]
"""How a row becomes text: "paper" for its instruction template, "chat" for the tokenizer's chat template."""

_LONGEST_S = 5.0
"""Seconds that a chat template may take for one conversation; milliseconds are usual."""

PAPER = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PAPER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def render_prompt(row: Row, template: Template, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """Write the text that the model sees before its reply.

    Args:
        row: The question; its output and answer are not used.
        template: "paper", or "chat" for the tokenizer's chat template with the opening of the assistant's turn. A
            chat prompt holds its special tokens as text, so it is tokenised without adding any.
        tokenizer: The base model's; "paper" does not need it.

    Returns:
        The prompt, up to the place where the reply begins. A row's system turn is one in "chat"; in "paper", which has
        no such thing, it stands before the instruction, a blank line between them.

    Raises:
        UsageError: If the template is unknown, or as `render_chat`.
    """
    if template == "paper":
        form = PAPER_WITH_INPUT if row.input else PAPER
        told = "\n\n".join(filter(None, (row.system, row.instruction)))
        return form.format(instruction=told, input=row.input)
    if template != "chat":
        raise UsageError(unknown("template", template, get_args(Template)))
    assert tokenizer is not None, "chat prompts are written by a tokenizer"
    question = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
    system = [{"role": "system", "content": row.system}] if row.system else []
    return render_chat([*system, {"role": "user", "content": question}], tokenizer)


def render_chat(
    turns: Sequence[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", *, reply_follows: bool = True
) -> str:
    """Write a conversation by the tokenizer's chat template.

    Args:
        turns: Each with a role and its content.
        tokenizer: The base model's.
        reply_follows: Whether the text goes on to where the assistant's next turn begins.

    Returns:
        The text, which holds its special tokens already.

    Raises:
        UsageError: If there is no template, or it refuses the conversation, is broken or does not end.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UsageError(
            "template 'chat': the tokenizer of this model has no chat template: use template 'paper'"
        )

    try:
        with time_limit(_LONGEST_S, "the tokenizer's chat template"):
            text = tokenizer.apply_chat_template(
                [dict(one) for one in turns], tokenize=False, add_generation_prompt=reply_follows
            )
    except TemplateError as error:
        raise UsageError(
            f"the tokenizer's chat template refuses {', '.join(one['role'] for one in turns)}: {error}: use template "
            "'paper', or leave out what it does not know"
        ) from error
    assert isinstance(text, str)
    return text


def render_completion(row: Row) -> str:
    """Write the reply that training learns, the same for every template; the end token is added to its tokens."""
    return row.output
