import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moa_peft.errors import UsageError
from moa_peft.evaluation.results import mean_and_standard_error, paired_difference, proportion_standard_error
from moa_peft.json_lines import append_rows, read_rows, replace_rows


@pytest.mark.parametrize("cut", [2, 5, 11])
def test_a_last_line_cut_off_by_a_kill_is_dropped_and_the_next_row_stands_alone(
    tmp_path: Path, cut: int
) -> None:
    file = tmp_path / "deep" / "rows.jsonl"
    append_rows(file, [{"a": 1}, {"b": "ü\u2028\n"}])
    append_rows(file, [{"c": 3, "d": 4}])
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    assert read_rows(file) == [{"a": 1}, {"b": "ü\u2028\n"}]
    append_rows(file, [{"c": 3, "d": 4}])
    assert file.read_bytes() == whole
    assert read_rows(file)[-1] == {"c": 3, "d": 4}


def write_rows(file: Path, writer: int) -> None:
    for number in range(50):
        append_rows(file, [{"writer": writer, "number": number, "text": "x" * 3000}])


def test_several_that_write_to_one_file_lose_no_row(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    append_rows(file, [{"text": "x" * 3000}] * 300)
    with ThreadPoolExecutor(3) as pool:  # each opens the file by itself, as a process does
        list(pool.map(lambda writer: write_rows(file, writer), range(3)))
    rows = read_rows(file)[300:]
    for writer in range(3):
        assert [one["number"] for one in rows if one["writer"] == writer] == list(range(50))


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UsageError, match=r"rows.jsonl, line 2: not a JSON object"):
        read_rows(file)
    file.write_text("Notes.\nNot ended by a new line")
    with pytest.raises(UsageError, match=r"line 1: not a JSON object"):
        append_rows(file, [{"a": 1}])
    assert file.read_text() == "Notes.\nNot ended by a new line"


def test_a_replaced_file_is_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_rows(file, [{"a": 1}])
    (tmp_path / ".rows.jsonl.tmp").write_text("left over by a kill")
    replace_rows(file, [{"a": 2}, {"a": 3}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 2}, {"a": 3}]
    assert [one.name for one in tmp_path.iterdir()] == ["rows.jsonl"]


def test_standard_errors_are_those_of_the_textbook() -> None:
    assert proportion_standard_error(0.25, 100) == pytest.approx(math.sqrt(0.25 * 0.75 / 100))
    values = [1.0, 2.0, 4.0, 4.5]
    mean, error = mean_and_standard_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert mean_and_standard_error([3.0]) == (3.0, None)


def test_a_paired_difference_does_not_see_what_the_questions_share() -> None:
    shared = [0.0, 100.0, -50.0]
    first, second = [one + d for one, d in zip(shared, (1.0, 1.5, 2.0), strict=True)], shared
    mean, error = paired_difference(first, second)
    assert mean == pytest.approx(1.5)
    assert error == pytest.approx(0.5 / math.sqrt(3))


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0, 2.0]), ([], [])])
def test_a_paired_difference_needs_the_same_questions(first: list[float], second: list[float]) -> None:
    with pytest.raises(UsageError, match="needs the same questions twice"):
        paired_difference(first, second)
