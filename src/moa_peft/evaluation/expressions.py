r"""The number that an expression stands for: `\frac{3}{4}`, `2 \times 10^3`, `\sqrt{16}`; read by math-verify.

Plain numbers are not read here: on those, the rules of `moa_peft.evaluation.answer_forms` are quicker, and right where
math-verify takes "20%" for 0.2 and stumbles over "-$293".
"""

import math
import re
import threading
from typing import Any

from moa_peft.extras import require

_OPERATES = re.compile(r"\\(?:[dt]?frac|sqrt|times|cdot|div|pi)|\^")
_CHUNK = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\\$|[^$\n])+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_UNITS = re.compile(r"\\(?:text|mathrm|mbox|textrm)\s*\{[^{}\d]*\}|(?<=[\d})])\s+[A-Za-z][A-Za-z ,.']*$")
_MARKS = re.compile(r"\\(?:textbf|mathbf|boldsymbol|left|right|displaystyle)\b|\\[,;!%$ ]")
_MOST_LETTERS = 160
_MOST_SECONDS = 5
_TOO_LARGE = re.compile(r"\^.*\^|\^\s*\{?[^}\d]*\d{3}|!|\d{25}")
"""Towers of powers and the like, which could take for ever to work out."""


def is_expression(text: str) -> bool:
    """Whether a text holds signs that only an expression has, so that its first or last number is not its value."""
    return _OPERATES.search(text) is not None


def last_expression(text: str) -> str | None:
    """The last piece of mathematics of a text, if it is an expression and no number follows it; else None."""
    chunks = list(_CHUNK.finditer(text))
    if not chunks or re.search(r"\d", text[chunks[-1].end() :]):
        return None
    inner = next(one for one in chunks[-1].groups() if one is not None)
    return inner if is_expression(inner) else None


def braced(text: str) -> str:
    """What stands before the brace that closes one opened before the text; all of it where none does."""
    depth = 1
    for place, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[:place]
    return text


def expression_value(text: str) -> str | None:
    r"""Work out an expression.

    Args:
        text: An expression, perhaps in `$...$` or `\(...\)`, with words or units after it; of an equation the right
            side counts.

    Returns:
        Its value: a whole number, a fraction such as "3/4", or a decimal; None where it has none.

    Raises:
        UsageError: If math-verify is not installed.
    """
    reader: Any = require("math_verify", "reading a number from an expression")
    chunk = _CHUNK.search(text)
    inner = next(one for one in chunk.groups() if one is not None) if chunk else text
    inner = _MARKS.sub(" ", _UNITS.sub("", inner.rpartition("=")[2])).strip().rstrip(".,;:$*")
    if len(inner) > _MOST_LETTERS or _TOO_LARGE.search(inner):
        return None
    # its clock is a signal, which only the main thread can have
    seconds = _MOST_SECONDS if threading.current_thread() is threading.main_thread() else None
    latex, plain = reader.LatexExtractionConfig(), reader.ExprExtractionConfig()
    found = reader.parse(f"${inner}$", [latex], parsing_timeout=seconds)
    found = found or reader.parse(inner, [latex, plain], parsing_timeout=seconds)
    return _written(found[0]) if found else None


def _written(value: Any) -> str | None:
    """A number of sympy as text."""
    if not getattr(value, "is_number", False) or not getattr(value, "is_real", False):
        return None
    exact = value.doit()
    if getattr(exact, "is_Rational", False) and abs(exact.p) < 10**15 and exact.q < 10**6:
        return str(exact)
    number = float(exact)
    return f"{number:.12g}" if math.isfinite(number) and abs(number) < 1e15 else None
