import dataclasses
import errno
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moa_peft import cli
from moa_peft.cli.train import ANY_FIELD, train, way_on
from moa_peft.errors import UsageError
from moa_peft.training.checkpoints import mark_complete
from moa_peft.training.recipe import Recipe

TINY = runpy.run_path(str(Path(__file__).parents[1] / "training" / "tiny.py"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a short run on a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    model, rows = TINY["write_model"](folder / "model"), TINY["write_rows"](folder / "rows.json")
    flags = ["--model", model, "--data", rows, "--max_length", 96, "--max-steps", 3, "--logging_steps=1"]
    return [*map(str, flags), "--gradient_accumulation_steps", "1", "--use_cpu", "--report_to", "none"]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    app.command(context_settings=ANY_FIELD)(train)
    return app


def test_a_run_prints_its_plan_where_everything_lies_and_what_to_type_next(
    app: typer.Typer, tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = CliRunner().invoke(app, [*tiny, "--output_dir", str(folder), "--mixture.router.kind", "linear"])
    assert done.exit_code == 0, done.output
    out = done.stdout
    row = json.loads((folder / "results.jsonl").read_text())
    wanted = [
        f"method      soft-lora: {row['trainable_parameters']:,} trainable parameters",
        "data        24 rows",
        "steps       3",
        f"done: 3 steps, last logged loss {row['final_loss']:.4f}",
        f"moa evaluate --adapter {folder} --tasks FILE_OF_TEST_ROWS",
        f"moa chat --adapter {folder}",
    ]
    assert [one for one in wanted if one not in out] == []
    assert "step 3: loss" in done.stderr
    assert "3/3" in done.stderr
    assert done.stderr.count("step 3: ") == 1
    assert "entropy" not in out + done.stderr, "the trainer's own dump of the log is shown as well"
    assert row["recipe"]["mixture"] == {"router": {"kind": "linear"}}


def test_a_flag_goes_before_the_file_and_json_is_all_that_stands_on_standard_output(
    app: typer.Typer, tiny: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(
        f"output_dir: {tmp_path / 'run'}\nmethod: sparse-moa\nseed: 1\nmixture:\n  router: {{kind: linear}}\n"
    )
    flags = ["--config", str(config), "--seed", "5", "--mixture.router.threshold.maximum", "0.3", "--json"]
    done = CliRunner().invoke(app, [*tiny, *flags])
    assert done.exit_code == 0, done.output
    outcome = json.loads(done.stdout)
    assert outcome["steps"] == 3
    recipe = json.loads((tmp_path / "run" / "moa_recipe.json").read_text())
    assert (recipe["seed"], recipe["method"]) == (5, "sparse-moa")
    assert recipe["mixture"] == {"router": {"kind": "linear", "threshold": {"maximum": 0.3}}}


def test_a_dry_run_stops_after_the_plan_and_leaves_nothing(
    app: typer.Typer, tiny: list[str], tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, [*tiny, "--output_dir", str(tmp_path / "run"), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert (plan["steps"], plan["rows_kept"], plan["resume_from"]) == (3, 24, None)
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_says_from_where(app: typer.Typer, tiny: list[str], tmp_path: Path) -> None:
    flags = [*tiny, "--output_dir", str(tmp_path / "run"), "--save_steps", "2"]
    assert CliRunner().invoke(app, flags).exit_code == 0
    (tmp_path / "run" / "checkpoint-3" / "complete.json").unlink()
    done = CliRunner().invoke(app, [*flags, "--resume"])
    assert done.exit_code == 0, done.output
    assert "skipped     checkpoint-3: cut off" in done.stdout
    assert f"resume      from {tmp_path}/run/checkpoint-2" in done.stdout


def test_the_help_lists_every_key_of_a_recipe_with_its_doc_line(app: typer.Typer) -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout.split())
    for one in dataclasses.fields(Recipe):
        assert (f"--{one.name} " in shown) is (one.name != "trainer")
    assert "--max_length Tokens kept of an example; one whose answer would be cut away whole is dropped. (default: 512)" in shown  # fmt: skip
    assert "moa train --config recipes/math.yaml --resume" in shown


def test_an_unknown_key_in_a_file_is_refused_before_anything_is_loaded(
    app: typer.Typer, tmp_path: Path
) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("data: demo\noutput_dir: x\nlearning_rte: 1\n")
    done = CliRunner().invoke(app, ["--config", str(config)])
    with pytest.raises(UsageError, match="unknown recipe key 'learning_rte': did you mean 'learning_rate'"):
        raise done.exception or AssertionError(done.output)


def test_an_unknown_flag_without_a_value_is_unknown_before_it_has_no_value(app: typer.Typer) -> None:
    for flag, says in (
        ("--bf1", "unknown recipe key 'bf1': did you mean 'bf16'"),
        ("--seed", "--seed has no value"),
    ):
        done = CliRunner().invoke(app, ["--data", "demo", flag])
        with pytest.raises(UsageError, match=says):
            raise done.exception or AssertionError(done.output)


def test_a_wrong_method_ends_in_one_line_and_exit_code_2(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output_dir", str(tmp_path / "run"), "--method", "soft-mao"]
    monkeypatch.setattr(sys, "argv", ["moa", "train", *tiny, *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moa: error: unknown method 'soft-mao': did you mean 'soft-moa'")


def test_an_interrupted_run_says_how_to_go_on(
    app: typer.Typer, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ended in silence: nobody learned that --resume works."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moa_peft.training.run.run", interrupted)
    done = CliRunner().invoke(app, [*tiny, "--output_dir", str(tmp_path / "run")])
    assert done.exit_code != 0
    assert (
        "interrupted: no checkpoint was complete yet, so --resume starts over; --save_steps N" in done.output
    )
    checkpoint = tmp_path / "run/checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("x")
    mark_complete(checkpoint)
    assert way_on(tmp_path / "run") == f"add --resume to go on from {checkpoint}"


def test_the_home_of_a_path_is_expanded_for_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves that of --out=~/here, and a folder named ~ was made."""
    monkeypatch.setenv("HOME", "/home/me")
    given: dict[str, object] = {}
    cli.registered(lambda **options: given.update(options))(out=Path("~/here"), files=[Path("~/a")], name="~")
    assert given == {"out": Path("/home/me/here"), "files": [Path("/home/me/a")], "name": "~"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "No space left on device: x: free some space or choose another folder"),
        (errno.EROFS, "Read-only file system: x: check that it may be read and written, or choose another"),
        (
            errno.ENOENT,
            "No such file or directory: x: check that it may be read and written, or choose another",
        ),
    ],
)
def test_a_disk_that_does_not_take_a_file_ends_in_one_line(
    code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError(code, os.strerror(code), "x")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(cli, "register_verbs", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == f"moa: error: {message}\n"
