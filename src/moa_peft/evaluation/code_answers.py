"""The program in a reply, and what it must pass.

A reply holds a whole program, in a code fence or bare, or only the lines that go on from the question's own code.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from moa_peft.evaluation.answer_forms import AnswerForm, without_thoughts

_FENCE = re.compile(r"^[ \t]*(```|~~~)[^\n`]*\n", re.MULTILINE)
_NEXT_TURN = re.compile(r"\n[^\S\n]*###\s*(?:Instruction|Response|Input)\b")
_STOPS = re.compile(r"\n(?:if __name__|print\(|assert\b|```|</?\w)")
"""What follows a bare answer: its author trying it out, or talking on."""

_ANNOTATION = r":\s*[\w.]+(?:\[[^\]\n]*\])?(?:\s*\|\s*[\w.]+)*\s*"
_BEGINS = re.compile(
    rf"^(?:from |import |def |class |async |@|\w+(?:\s*,\s*\w+)*\s*(?:{_ANNOTATION})?=)", re.MULTILINE
)
_BODY = "def _():\n"
_MOST_STARTS = 8
_MOST_ENDS = 8
_MOST_PARSED = 400_000
"""Characters that are parsed in search of where code ends: some 100 tries for a usual reply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeCheck:
    """What a program must pass."""

    entry_point: str = ""
    """The function that the tests call."""

    head: str = ""
    """The question's own code: what the answer goes on from, or needs. The tests have its functions as well."""

    tests: str = ""
    """Code that raises where the answer is wrong."""


def stated_code(text: str, form: AnswerForm) -> str | None:
    """Take the program out of a reply.

    Args:
        text: The reply.
        form: Names the function that the program must define.

    Returns:
        The first fenced block that defines the function, else the first fenced block; without a fence, the code of the
        text, up to where its author begins to try it out. Lines that go on from the question's code get the
        indentation that they lack. None where there is no code.
    """
    reply, *others = _NEXT_TURN.split(without_thoughts(text), maxsplit=1)
    reply = reply.rstrip() if others else reply
    blocks = [code for code, _ in _fenced(reply)]
    defining = [one for one in blocks if defines(one, form.entry_point)]
    if defining:
        return defining[0]
    bare = _STOPS.split(reply, maxsplit=1)[0]
    code = _definition(bare, form.entry_point) if not blocks else None
    if code is not None:
        return code
    return _continuation(blocks[0] if blocks else bare)


def has_ended(text: str, form: AnswerForm) -> bool:
    """Whether nothing that may still follow can change what `stated_code` takes, as the answer's fence has closed."""
    text = without_thoughts(text)
    return _NEXT_TURN.search(text) is not None or any(
        is_whole and defines(code, form.entry_point) for code, is_whole in _fenced(text)
    )


def _fenced(text: str) -> Iterator[tuple[str, bool]]:
    """The blocks in code fences, each with whether it has ended as code that can be read.

    A fence within a block, as in a docstring, belongs to the code: it ends where it can be read, else at its first.
    """
    opening = _FENCE.search(text)
    while opening is not None:
        start = opening.end()
        ends = islice(re.finditer(rf"^[ \t]*{opening[1]}", text[start:], re.MULTILINE), _MOST_ENDS)
        places = [(start + one.start(), start + one.end()) for one in ends]
        blocks = [textwrap.dedent(text[start:end]).strip("\n") for end, _ in places]
        whole = next((place for place, code in enumerate(blocks) if parse_code(code) is not None), None)
        if not places:
            yield textwrap.dedent(text[start:]).strip("\n"), False
            return
        yield blocks[whole or 0], whole is not None
        opening = _FENCE.search(text, places[whole or 0][1])


def defines(code: str, name: str) -> bool:
    """Whether code can be read and binds a name at its outermost level."""
    tree = parse_code(code)
    if tree is None:
        # cut off or wrong, but it is the answer that was meant
        return re.search(rf"^(?:def|class|async def)\s+{re.escape(name)}\b", code, re.MULTILINE) is not None
    return any(name in _bound(one) for one in tree.body)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement binds, as far as answers do it."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        yield from (one.id for one in statement.targets if isinstance(one, ast.Name))
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((one.asname or one.name) for one in statement.names)


def _definition(text: str, name: str) -> str | None:
    """The code of a text that defines a name: from where code begins to the last line that can still be read."""
    word = re.escape(name)
    target = re.search(rf"^(?:(?:async\s+)?(?:def|class)\s+{word}\b|{word}\s*=)", text, re.MULTILINE)
    if target is None:
        return None
    for start in [one.start() for one in _BEGINS.finditer(text, 0, target.end())][:_MOST_STARTS]:
        code = _longest(text[start:])
        if code is not None and defines(code, name):
            return code
    return text[target.start() :]  # it cannot be read, so it fails its tests as what it is


def _continuation(text: str) -> str | None:
    """The lines of a text that go on inside a function, indented as they must be."""
    lines = text.strip("\n")
    if not lines.strip():
        return None
    if lines[0] in " \t" and parse_code(_BODY + lines) is not None:
        return lines
    # its first line alone may have lost its indentation, or all of them; the way that makes sense of more is right
    ways = (f"    {text.strip()}", textwrap.indent(lines, "    "))
    found = [code for one in ways if (code := _longest(one, _BODY)) is not None]
    return max(found, key=lambda one: one.count("\n"), default=lines)


def _longest(text: str, head: str = "") -> str | None:
    """The longest part of a text, in whole lines from its start, that is code after a head; None where none is found."""
    lines = text.rstrip().split("\n")
    end = len(lines)
    for _ in range(_MOST_PARSED // (len(text) + 1)):
        part = "\n".join(lines[:end])
        found = _parsed(head + part)
        if isinstance(found, ast.Module):
            return part
        wrong_line = found - head.count("\n") if found else end
        end = min(end, wrong_line) - 1  # what holds that line cannot be read either
        if end < 1:
            break
    return None


def parse_code(code: str) -> ast.Module | None:
    """Read code of unknown origin; None where it is no Python, or too much of it."""
    found = _parsed(code)
    return found if isinstance(found, ast.Module) else None


def _parsed(code: str) -> ast.Module | int:
    """Code that was read, or the number of the line that cannot be; 0 where that is not known."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a model's escapes and comparisons
            tree = ast.parse(code)
            compile(tree, "program.py", "exec")  # also refuses a return outside a function
    except SyntaxError as error:
        return error.lineno or 0
    except (ValueError, RecursionError, MemoryError):
        return 0
    return tree
