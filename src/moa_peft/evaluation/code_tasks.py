"""The code tasks in their original fields: HumanEval, and MBPP."""

import ast
from collections.abc import Mapping
from typing import Any

from moa_peft.data.row import Row
from moa_peft.errors import UsageError
from moa_peft.evaluation.code_answers import CodeCheck, parse_code

_HUMANEVAL = ("prompt", "canonical_solution", "test", "entry_point")
_MBPP = ("text", "code", "test_list")


def code_question(record: Any, where: str) -> tuple[Row, CodeCheck] | None:
    """Read a record of HumanEval or of MBPP.

    Args:
        record: One record of a file or of `datasets`.
        where: Its place, for errors.

    Returns:
        The row, whose output is the reference solution, and how an answer is tested; None where the record is of another
        form.

    Raises:
        UsageError: If it has the fields of one of the two, but not what belongs in them.
    """
    if not isinstance(record, Mapping):
        return None
    if all(name in record for name in _HUMANEVAL):
        return _humaneval(record, where)
    if all(name in record for name in _MBPP):
        return _mbpp(record, where)
    return None


def _humaneval(record: Mapping[str, Any], where: str) -> tuple[Row, CodeCheck]:
    """The function's head is the row's input; an answer may give all of it again, or only go on."""
    prompt, solution, test, name = (_text(record, one, where) for one in _HUMANEVAL)
    if parse_code(test) is None:
        raise UsageError(f"{where}: test is not Python")
    row = Row(
        instruction="Complete the following Python function. Answer with the whole function.",
        input=prompt.strip("\n"),
        output=(prompt + solution).strip("\n"),
        answer="",
    )
    return row, CodeCheck(entry_point=name, head=prompt, tests=f"{test}\n\ncheck({name})\n")


def _mbpp(record: Mapping[str, Any], where: str) -> tuple[Row, CodeCheck]:
    """The tests that decide are part of the question, as in the benchmark: they give the function its name."""
    text, code = (_text(record, one, where) for one in _MBPP[:2])
    tests = record["test_list"]
    if not (isinstance(tests, list) and tests and all(isinstance(one, str) for one in tests)):
        raise UsageError(f"{where}: test_list must be a list of tests, each a line of code")
    setup = record.get("test_setup_code") or ""
    shown = "\n".join(_lines(one).rstrip("\n") for one in ([setup] if setup else []) + tests)
    solution = _lines(code).rstrip("\n")
    row = Row(
        instruction=f"{text.strip()} Your code should pass these tests:\n\n{shown}",
        input="",
        output=solution,
        answer="",
    )
    # what sets a test up comes after the answer: in one task it uses a class that the answer defines
    return row, CodeCheck(entry_point=_wanted_name(solution, shown, where), tests=shown)


def _wanted_name(solution: str, tests: str, where: str) -> str:
    """The function or class of the solution that its tests use."""
    code, uses = parse_code(solution), parse_code(tests)
    if code is None or uses is None:
        raise UsageError(f"{where}: code or test_list is not Python")
    defined = [
        one.name
        for one in code.body
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    used = {one.id for one in ast.walk(uses) if isinstance(one, ast.Name)}
    found = [one for one in defined if one in used]
    if not found:
        raise UsageError(f"{where}: no test uses what the code defines: {', '.join(defined) or 'nothing'}")
    return found[-1]


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} is {value!r}: it must be text")
    return value


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")
