import dataclasses
import json
from pathlib import Path

import pytest
import typer
from filelock import FileLock
from typer.testing import CliRunner, Result

from moa_peft.cli import registered
from moa_peft.cli.evaluate import evaluate
from moa_peft.data.row import Row
from moa_peft.errors import UsageError
from moa_peft.json_lines import read_rows
from tiny_lm import choice_rows, number_rows, save_adapter, save_base, write_rows

PROGRAM = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
PROGRAM.command()(registered(evaluate))


def call(*words: object) -> Result:
    return CliRunner().invoke(PROGRAM, [str(one) for one in words], catch_exceptions=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", chat=True)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "run", base, model=str(base), template="chat", method="soft-moa", seed=3)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "mine" / "test.json", choice_rows(6))


def test_an_adapter_is_evaluated_as_its_recipe_says_and_the_results_lie_with_it(
    adapter: Path, rows: Path
) -> None:
    done = call("--adapter", adapter, "--tasks", rows, "--limit", 5)
    assert done.exit_code == 0
    (row,) = read_rows(adapter / "evaluation" / "results.jsonl")
    assert (row["task"], row["n"], row["method"], row["seed"]) == ("mine", 5, "soft-moa", 3)
    assert (row["template"], row["adapter"]) == ("chat", str(adapter))
    assert f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}" in done.stdout
    assert f"{row['answer_loss']:.4f}" in done.stdout
    assert "1 row added" in done.stdout
    again = call("--adapter", adapter, "--tasks", rows, "--limit", 5)
    assert "unchanged mine: this evaluation was complete" in again.stdout
    assert len(read_rows(adapter / "evaluation" / "results.jsonl")) == 1


def test_answers_without_choices_are_said_to_need_generation(tmp_path: Path, base: Path) -> None:
    """Rows with answers were said to state none."""
    sums = write_rows(tmp_path / "sums.json", number_rows(2))
    told = call("--model", base, "--tasks", sums, "--mode", "likelihood", "--out", tmp_path / "out").stderr
    assert (
        "sums: its rows have no choices to compare, so there is a loss but no accuracy; --mode generation"
        in told
    )


def test_rows_without_answers_have_neither_accuracy_nor_loss_and_that_is_said(
    tmp_path: Path, base: Path
) -> None:
    rows = write_rows(
        tmp_path / "none.json", [dataclasses.replace(one, output="", answer="") for one in number_rows(2)]
    )
    told = call("--model", base, "--tasks", rows, "--mode", "likelihood", "--out", tmp_path / "out").stderr
    assert "none: its rows have no choices to compare, so there is no accuracy" in told


def test_no_name_of_a_task_is_not_the_demo(base: Path) -> None:
    with pytest.raises(UsageError, match="tasks is empty"):
        call("--model", base, "--tasks", "")


def test_json_is_one_object_on_standard_output_and_nothing_else(
    tmp_path: Path, base: Path, rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sums = write_rows(tmp_path / "sums.json", number_rows(2))
    words = [
        "--model",
        base,
        "--tasks",
        f"{rows},{sums}",
        "--max-new-tokens",
        3,
        "--out",
        tmp_path / "out",
        "--json",
    ]
    PROGRAM([str(one) for one in words], standalone_mode=False)
    found = json.loads(capfd.readouterr().out)
    assert [one["task"] for one in found["results"]] == ["mine", "sums"]
    assert [one["mode"] for one in found["results"]] == ["likelihood", "generation"]
    assert found["results"] == read_rows(tmp_path / "out/results.jsonl")
    assert found["results_file"] == str(tmp_path / "out/results.jsonl")
    assert all(Path(one).is_file() for one in found["examples_files"])
    assert found["reused"] == []


def test_the_bare_model_is_called_frozen_and_its_results_lie_in_a_folder_of_their_own(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("--model", "base", "--tasks", rows)
    (row,) = read_rows(tmp_path / "moa_evaluation/base/results.jsonl")
    assert (row["method"], row["adapter"], row["template"]) == ("frozen", None, "paper")
    assert "base, frozen, template paper" in done.stdout


def test_generated_answers_show_both_rules_and_those_cut_off(tmp_path: Path, base: Path) -> None:
    sums = write_rows(tmp_path / "sums.json", number_rows(3))
    done = call("--model", base, "--tasks", sums, "--max-new-tokens", 2, "--out", tmp_path / "out")
    (row,) = read_rows(tmp_path / "out/results.jsonl")
    assert row["num_cut_off"] == 3
    assert "3 of 3 answers had not ended after 2 tokens" in done.stderr
    (shown,) = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["sums"]]
    accuracy, official = row["accuracy"], row["accuracies"]["official"]
    assert shown[1:6] == [
        "3",
        f"{100 * accuracy:.1f}",
        "±",
        f"{100 * row['standard_error']:.1f}",
        f"{100 * official:.1f}",
    ]
    assert shown[-1] == "generation"


def test_texts_of_choices_are_compared_with_mode_text(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = "Answer1: it is. Answer2: so\n\nAnswer format: answer1/answer2"
    rows = [
        Row(
            instruction=f"Please choose the correct answer to the question: Why {place}?\n\n{listed}",
            input="",
            output="the correct answer is answer2",
            answer="answer2",
        )
        for place in range(4)
    ]
    write_rows(tmp_path / "data/ARC-Easy/test.json", rows)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--tasks", "ARC-Easy", "--data-root", "~/data", "--mode", "text", "--limit", 3]
    done = call("--adapter", adapter, *words, "--extraction", "per_character")
    (row,) = read_rows(adapter / "evaluation/results.jsonl")
    assert (row["task"], row["n"], row["mode"], row["answer_loss"]) == ("ARC-Easy", 3, "text", None)
    assert f"{100 * row['accuracies']['per_character']:.1f} ±" in done.stdout
    assert "text, per_character" in done.stdout
    assert "unchanged ARC-Easy" in call("--adapter", adapter, *words, "--extraction", "per_character").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "text"], r"task 'mine' has no choices .* mode text takes piqa, .*ARC-Easy"),
        (["--mode", "text", "--template", "paper"], "--template has no meaning with --mode text"),
        (["--tasks", "pica"], "unknown task 'pica': did you mean 'piqa'"),
        (["--adapter", "nowhere/at/all"], "adapter folder nowhere/at/all does not exist"),
        (["--mode", "guess"], "unknown mode 'guess'"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--limit", "0"], "limit is 0"),
        (["--extraction", "official"], "'official' does not go with mode likelihood"),
        (["--data-root", "nowhere", "--tasks", "math"], "the data root nowhere is no folder"),
        (["--model", "./nowhere"], "model './nowhere' does not exist"),
        (["--dtype", "float3"], "unknown dtype 'float3'"),
    ],
)
def test_a_users_mistake_is_one_clear_error(words: list[str], message: str, base: Path, rows: Path) -> None:
    defaults = {"--model": base, "--tasks": rows}
    given = dict(zip(words[::2], words[1::2], strict=True))
    with pytest.raises(UsageError, match=message):
        call(*(word for pair in (defaults | given).items() for word in pair))


def test_a_second_process_in_the_same_folder_is_refused_before_the_model_is_loaded(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once wrote a row twice, and shared the name of a draft."""
    monkeypatch.setattr("moa_peft.evaluation.loading.load", None)
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(UsageError, match=r"another process works in .*out: wait for it"),
    ):
        call("--model", base, "--tasks", rows, "--out", tmp_path / "out")


def test_help_explains_and_shows_examples() -> None:
    done = call("--help")
    assert done.exit_code == 0
    assert "moa evaluate --adapter runs/first" in done.stdout
    for flag in ("--adapter", "--tasks", "--mode", "--extraction", "--limit", "--json"):
        assert flag in done.stdout


def test_options_come_from_a_file_and_flags_go_before_it(tmp_path: Path, base: Path, rows: Path) -> None:
    sums = write_rows(tmp_path / "sums.json", number_rows(4))
    file = tmp_path / "evaluation.yaml"
    settings = {"model": str(base), "tasks": [str(rows), str(sums)], "limit": 2, "max-new-tokens": 3}
    file.write_text(json.dumps(settings | {"batch_size": 1, "out": str(tmp_path / "out"), "json": True}))
    found = json.loads(call("--config", file, "--limit", 3).stdout)["results"]
    assert [(one["task"], one["n"], one["batch_size"]) for one in found] == [("mine", 3, 1), ("sums", 3, 1)]
    assert found[1]["max_new_tokens"] == 3
    assert (tmp_path / "out/results.jsonl").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limits: 3", "unknown option 'limits': did you mean 'limit'"),
        (
            "allow_code_execution: true",
            "allow_code_execution cannot stand in a file: give it on the command line",
        ),
        ("config: other.yaml", "config cannot stand in a file"),
        ("limit: true", "limit is true: give a value, as on the command line"),
        ("limit: 3\nlimit: 4", "line 2: 'limit' is given twice"),
    ],
)
def test_a_mistake_in_the_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=rf"mine\.yaml.*{message}"):
        call("--config", tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("limit: many")
    assert call("--config", tmp_path / "mine.yaml").exit_code == 2
