import json
from pathlib import Path
from typing import Any

import pytest

from moa_peft.errors import UsageError
from moa_peft.evaluation.code_answers import CodeCheck
from moa_peft.evaluation.code_execution import check_isolation, run_programs
from moa_peft.evaluation.code_tasks import code_question
from moa_peft.evaluation.extraction_rules import official, stated
from moa_peft.evaluation.questions import Task
from moa_peft.evaluation.tasks import load_tasks

DATA = Path(__file__).parents[2] / "../shared/data"
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def twice(x):\n    """Double."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4",
}
MBPP: dict[str, Any] = {
    "task_id": 11,
    "text": "Write a function to double.",
    "code": "class Two:\r\n    n = 2\r\ndef twice(x):\r\n    return Two.n * x",
    "test_list": ["assert twice(two) == 4"],
    "test_setup_code": "two = Two.n",
}


def task(name: str) -> Task:
    if not (DATA / name).is_dir():
        pytest.skip(f"the data folder with {name} is not beside the checkout")
    try:
        check_isolation()
    except UsageError as error:
        pytest.skip(str(error))
    (found,) = load_tasks(name, data_root=DATA)
    return found


def passed(programs: list[tuple[str, CodeCheck]]) -> list[bool]:
    return [one.verdict == "passed" for one in run_programs(programs)]


def test_a_question_of_humaneval_gives_the_head_as_input_and_tests_what_goes_on_from_it() -> None:
    found = code_question(HUMANEVAL, "row 1")
    assert found is not None
    row, check = found
    assert row.input == HUMANEVAL["prompt"].rstrip()
    assert row.output == 'def twice(x):\n    """Double."""\n    return 2 * x'
    assert (row.answer, check.entry_point) == ("", "twice")
    assert passed([("    return x + x", check), ("    return x", check)]) == [True, False]


def test_a_question_of_mbpp_shows_its_tests_and_sets_them_up_after_the_answer() -> None:
    found = code_question(MBPP, "row 1")
    assert found is not None
    row, check = found
    assert row.instruction == (
        "Write a function to double. Your code should pass these tests:\n\ntwo = Two.n\nassert twice(two) == 4"
    )
    assert "\r" not in row.output
    assert check.entry_point == "twice"
    assert passed([(row.output, check), (row.output.replace("2", "3"), check)]) == [True, False]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (HUMANEVAL | {"test": 3}, "row 7: test is 3: it must be text"),
        (HUMANEVAL | {"test": "def check(:"}, "row 7: test is not Python"),
        (MBPP | {"test_list": []}, "row 7: test_list must be a list of tests"),
        (MBPP | {"code": "def f(:"}, "row 7: code or test_list is not Python"),
        (MBPP | {"code": "x = 1"}, "row 7: no test uses what the code defines: nothing"),
    ],
)
def test_a_damaged_question_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        code_question(record, "row 7")


def test_rows_of_other_forms_are_no_code_questions() -> None:
    assert code_question({"prompt": "1 + 1?", "completion": "2"}, "row 1") is None
    assert code_question([], "row 1") is None


@pytest.mark.slow
def test_reference_solutions_of_humaneval_pass_whole_or_as_what_goes_on() -> None:
    humaneval = task("humaneval")
    records = [json.loads(line) for line in (DATA / "humaneval/test.jsonl").read_text().splitlines()]
    assert len(humaneval.questions) == len(records) == 164
    programs: list[tuple[str, CodeCheck]] = []
    for question, record in zip(humaneval.questions, records, strict=True):
        assert question.code is not None
        goes_on = record["canonical_solution"]
        assert official(goes_on, question.form) == goes_on
        whole = stated(f"Here:\n```python\n{question.row.output}\n```\n", question.form)
        assert whole is not None
        assert whole.split() == question.row.output.split()
        read = stated(goes_on, question.form)
        assert read is not None
        programs += [(one, question.code) for one in (whole, goes_on, read)]
    assert passed(programs[::6]) == [True] * 82
    assert passed([*programs[1::24], *programs[2::24]]) == [True] * 42


@pytest.mark.slow
def test_every_fourth_reference_solution_of_mbpp_passes() -> None:
    mbpp = task("mbpp")
    assert len(mbpp.questions) == 500
    programs: list[tuple[str, CodeCheck]] = []
    for question in mbpp.questions:
        assert question.code is not None
        code = stated(question.row.output, question.form)
        assert code is not None
        programs.append((code, question.code))
    assert passed(programs[::4]) == [True] * 125


def test_an_empty_answer_and_one_to_another_question_fail_every_task() -> None:
    for name in ("humaneval", "mbpp"):
        questions = task(name).questions[:12]
        for place, question in enumerate(questions):
            assert question.code is not None
            other = questions[place - 1].row.output
            assert passed([("", question.code), (other, question.code)]) == [False, False]
