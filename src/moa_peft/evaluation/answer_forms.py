"""What kind of answer a question wants, and when two answers are the same."""

import math
import re
from dataclasses import dataclass
from typing import Literal

AnswerKind = Literal["choice", "letter", "number", "text", "code", "none"]

NUMBER_SLACK = 1e-3
"""Largest difference between two numbers that count as the same; that of the official evaluation."""

_NUMBER = re.compile(
    r"[-+]?(?:\$\s?)?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d*)?([eE][-+]?\d{1,2})?(?:\s?/\s?(\d+(?:\.\d+)?))?\s?%?"
)
_MIXED = re.compile(r"[-+]?(\d+) (\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerForm:
    """The form of a question's answer."""

    kind: AnswerKind
    """A word of a list, a letter of a list, a number, other text, a program, or none: the data states no answer."""

    choices: tuple[str, ...] = ()
    """The words or letters allowed, as the data writes them; empty for the other kinds."""

    entry_point: str = ""
    """The function that a program must define; "" for the other kinds."""


def without_thoughts(text: str) -> str:
    """What a reply says outside of ``<think>...</think>``, behind the last of them; nothing behind one that is still open."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def parse_number(text: str) -> float | None:
    """Read a text that is a number: sign, dollar, thousands commas, decimals, powers of ten, fractions, percent.

    Args:
        text: The whole text; a percent sign is taken off, so that "50%" is 50.

    Returns:
        The number, or None where the text is not one.
    """
    bare = text.strip().replace("\u2212", "-")
    sign = -1 if bare.startswith("-") else 1
    if mixed := _MIXED.fullmatch(bare):
        whole, above, below = (int(one) for one in mixed.groups())
        return sign * (whole + above / below) if below else None
    match = _NUMBER.fullmatch(bare)
    if match is None or not (match[1] or (match[2] or ".")[1:]):
        return None
    value = float((match[1] or "0").replace(",", "") + (match[2] or "") + (match[3] or ""))
    if match[4]:
        below = float(match[4])
        if below == 0:
            return None
        value /= below
    return sign * value if math.isfinite(value) else None


def same_answer(given: str | None, wanted: str, form: AnswerForm) -> bool:
    """Tell whether an extracted answer is the one wanted.

    Args:
        given: What was extracted; None for nothing.
        wanted: The data's answer.
        form: The form of both.

    Returns:
        Numbers are compared by value, within `NUMBER_SLACK`; other answers as text, without regard to case or to marks around it.
    """
    if given is None:
        return False
    if form.kind == "number":
        left, right = parse_number(given), parse_number(wanted)
        return (
            left is not None
            and right is not None
            and math.isclose(left, right, abs_tol=NUMBER_SLACK, rel_tol=0)
        )
    return bare_text(given).casefold() == bare_text(wanted).casefold()


def bare_text(text: str) -> str:
    """A text without the spaces, quotes, stars, backquotes and full stops around it."""
    return text.strip(" \t\n\"'`*.")
