"""Questions and sets of them: each with the form of its answer, its choices, or the tests its program must pass."""

import re
from dataclasses import dataclass
from typing import Any

from moa_peft.data.row import Row, as_row
from moa_peft.errors import UsageError
from moa_peft.evaluation.answer_extraction import word_pattern
from moa_peft.evaluation.answer_forms import AnswerForm, parse_number
from moa_peft.evaluation.code_answers import CodeCheck
from moa_peft.evaluation.code_tasks import code_question
from moa_peft.evaluation.hub_tasks import official_row

DEFAULT_LEAD = "the correct answer is "
"""How a reply to a question with choices begins, where the data does not say otherwise."""

_FORMAT = re.compile(r"answer format:[ \t]*([^\s/]+(?:/[^\s/]+)+)", re.IGNORECASE)
_PHRASE = r"[^\s/:;,?().]+(?: [^\s/:;,?().]+){0,2}"
_PHRASES = re.compile(
    rf"answer format:[ \t]*({_PHRASE}(?: ?/ ?{_PHRASE})+)\.?[ \t]*$", re.IGNORECASE | re.MULTILINE
)
_LETTERS = re.compile(r"\(([A-Z])\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of a task."""

    row: Row
    """The row it comes from."""
    form: AnswerForm
    """What kind of answer it wants."""
    completions: tuple[str, ...] = ()
    """The replies whose likelihoods are compared, one for each word of the form; empty for other kinds."""
    code: CodeCheck | None = None
    """How a program is tested; None for other kinds."""

    @property
    def wanted(self) -> int | None:
        """The place of the right choice; None for other kinds."""
        return self.form.choices.index(self.row.answer) if self.completions else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A named set of questions."""

    name: str
    """The task's name in tables and results."""
    source: str
    """Where the rows come from, as it was given."""
    split: str
    """Which split of the source."""
    questions: tuple[Question, ...]
    """At least one."""
    limit: int | None = None
    """Only so many rows from the start of the source were taken; None for all."""
    file_md5: str | None = None
    """MD5 of the file of rows, unzipped; None where the rows are not in one file."""

    @property
    def has_choices(self) -> bool:
        """Whether every question has choices to compare by likelihood."""
        return all(one.completions for one in self.questions)

    @property
    def has_answers(self) -> bool:
        """Whether any question has an answer that a reply is scored on."""
        return any(one.form.kind != "none" for one in self.questions)

    @property
    def runs_code(self) -> bool:
        """Whether replies are programs, which are right when they run through their tests."""
        return any(one.code is not None for one in self.questions)


def question_of(record: Any, where: str) -> Question:
    """Read a record of any form that is known: rows of instruction data, the paper's tasks as the hub has them.

    Raises:
        UsageError: If a field is missing or wrong.
    """
    found = code_question(record, where)
    if found is None:
        return as_question(official_row(record, where) or as_row(record, where), where)
    row, check = found
    return Question(row=row, form=AnswerForm(kind="code", entry_point=check.entry_point), code=check)


def as_question(row: Row, where: str = "row") -> Question:
    """Find out what kind of answer a row wants.

    Args:
        row: The row. An instruction with "Answer format: a/b/c" has the choices a, b and c, of up to three words each where a
            line ends with them; one that lists "(A) ... (B) ..." has letters, where the answer is one; otherwise the
            answer decides.
        where: The place of the row, for errors.

    Returns:
        The question. Its completions are the row's own output with each choice in the place of the answer, where nothing but
        marks and spaces follows it; an output that names a choice before that has a rationale. For such and all others
        `DEFAULT_LEAD` stands.

    Raises:
        UsageError: If the answer is not one of the choices.
    """
    choices = _choices_of(row) if row.answer else ()
    if choices:
        if row.answer not in choices:
            raise UsageError(
                f"{where}: the answer is {row.answer!r}, its answer format allows {', '.join(choices)}"
            )
        lead, found, end = row.output.rpartition(row.answer)
        names = word_pattern(choices).finditer(lead)
        gives_away = any(len(one[0]) > 1 or one[0] in choices for one in names)  # in a rationale
        if gives_away or not found or re.search(r"\w", end):
            lead, end = DEFAULT_LEAD, ""
        form = AnswerForm(kind="choice", choices=choices)
        return Question(row=row, form=form, completions=tuple(lead + one + end for one in choices))
    letters = tuple(dict.fromkeys(_LETTERS.findall(row.instruction)))
    if row.answer in letters and len(letters) > 1:
        return Question(row=row, form=AnswerForm(kind="letter", choices=letters))
    if not row.answer:
        return Question(row=row, form=AnswerForm(kind="none"))
    return Question(row=row, form=AnswerForm(kind="text" if parse_number(row.answer) is None else "number"))


def _choices_of(row: Row) -> tuple[str, ...]:
    """The choices that a row's last answer format names; none where it names none."""
    found: tuple[str, ...] = ()
    for pattern in (_PHRASES, _FORMAT):
        stated = pattern.findall(row.instruction)
        found = tuple(one.strip() for one in stated[-1].rstrip(".").split("/")) if stated else found
        if row.answer in found:
            break
    return found
