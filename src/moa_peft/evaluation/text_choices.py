"""Questions whose choices are compared by their texts, in the prompts of the LM Evaluation Harness."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moa_peft.data.tokenization import prompt_ids
from moa_peft.errors import UsageError
from moa_peft.evaluation.questions import Question, Task
from moa_peft.evaluation.scoring import TokenQuestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class TextQuestion:
    """A question and its choices as texts."""

    where: str
    """Its task and row, for errors."""
    prompt: str
    """What the model reads before each choice."""
    choices: tuple[str, ...]
    """The texts that are compared; a space stands between the prompt and each."""

    def tokens(self, tokenizer: "PreTrainedTokenizerBase") -> TokenQuestion:
        """Tokenise prompt and choice as one text and cut it after the prompt's own tokens, as the harness does.

        Whitespace at the end of the prompt counts as the choice's; no end token is scored, special tokens that the
        tokenizer puts in front are kept.

        Raises:
            UsageError: If the prompt or a choice has no token of its own.
        """
        bare = self.prompt.rstrip()
        prompt = prompt_ids(bare, tokenizer, "paper")
        wholes = [prompt_ids(f"{self.prompt} {one}", tokenizer, "paper") for one in self.choices]
        completions = tuple(tuple(one[len(prompt) :]) for one in wholes)
        if not prompt or not all(completions):
            raise UsageError(
                f"{self.where}: this tokenizer gives the question or a choice no token of its own: leave the row out, "
                "or choose another mode"
            )
        return TokenQuestion(prompt=tuple(prompt), completions=completions)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextForm:
    """How the rows of a task hold a question and its choices, and how the harness puts it."""

    lead: str
    """What a row says before the question."""
    word: str
    """What it calls a choice, before the choice's number."""
    apart: str = " "
    """What it has between two choices."""
    prompt: str = "Question: {question}\nAnswer:"
    """What the model reads."""
    question: Callable[[str], str] = str
    """Prepares the question."""
    choice: Callable[[str], str] = str
    """Prepares the text of a choice."""


def _cleaned(text: str) -> str:
    """Take the marks of WikiHow out, as `preprocess` of the harness's hellaswag does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _begun(text: str) -> str:
    """Prepare what a HellaSwag ending goes on from: the sentence that it begins with, if any, gets a capital.

    The harness knows that sentence from a field of its own (`ctx_b`); here it is what follows the last full stop.
    """
    whole, stop, begun = text.rpartition(". ")
    is_whole = not stop or begun.endswith(".")
    return _cleaned(text if is_whole else whole + stop + begun.capitalize())


_ASKED = "Please choose the correct answer to the question: "
_SOLVED = "Please choose the correct solution to the question: "
_ENDED = "Please choose the correct ending to complete the given sentence: "

TEXT_FORMS: Mapping[str, TextForm] = {
    "piqa": TextForm(lead=_SOLVED, word="Solution", apart="\n\n"),
    "social_i_qa": TextForm(lead=_ASKED, word="Answer", prompt="Q: {question}\nA:"),
    "hellaswag": TextForm(lead=_ENDED, word="Ending", prompt="{question}", question=_begun, choice=_cleaned),
    "ARC-Easy": TextForm(lead=_ASKED, word="Answer"),
    "ARC-Challenge": TextForm(lead=_ASKED, word="Answer"),
    "openbookqa": TextForm(lead=_ASKED, word="Answer", prompt="{question}"),
}
"""The tasks whose choices are texts, by name. BoolQ's rows lack the passage, WinoGrande's choices stand inside the sentence."""


def text_form(task: Task) -> TextForm:
    """Look up the form of a task by its name.

    Raises:
        UsageError: If the task has none.
    """
    if task.name not in TEXT_FORMS:
        raise UsageError(
            f"task {task.name!r} has no choices whose texts can be compared; mode text takes {', '.join(TEXT_FORMS)}, "
            "by name: leave the task out, or choose another mode"
        )
    return TEXT_FORMS[task.name]


def text_questions(task: Task) -> list[TextQuestion]:
    """Read the questions of a task, whose rows are in the official form, and the texts of their choices.

    Raises:
        UsageError: If the task has no form, or a row cannot be read in exactly one way.
    """
    form = text_form(task)
    return [
        _read(one, form, f"task {task.name!r}, row {place}")
        for place, one in enumerate(task.questions, start=1)
    ]


def _read(question: Question, form: TextForm, where: str) -> TextQuestion:
    marks = [f"{form.word}{number}" for number in range(1, len(question.completions) + 1)]
    listed = form.apart.join(f"{one}: (.+?)" for one in marks)
    wanted = f"{form.lead}(.+?)\n\n{listed}\n\nAnswer format: {'/'.join(marks).lower()}"
    found = re.fullmatch(wanted, question.row.instruction, re.DOTALL)
    named = re.findall(rf"{form.word}\d+:", question.row.instruction)
    is_unique = found is not None and len(named) == len(marks) and not question.row.input
    asked, *choices = found.groups() if found is not None and is_unique else ("",)
    texts = tuple(form.choice(one) for one in choices)
    if not texts or not all(texts):
        raise UsageError(
            f"{where}: the question and the texts of its choices cannot be told apart: mode text needs "
            f"{form.lead + 'QUESTION'!r}, then {form.word}1: TEXT and so on, each mark once, and the answer format; "
            "leave the row out, or choose another mode"
        )
    prompt = form.prompt.replace("{question}", form.question(asked))
    return TextQuestion(where=where, prompt=prompt, choices=texts)
