import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moa_peft import extras
from moa_peft.cli.compare import compare
from moa_peft.cli.train import ANY_FIELD
from moa_peft.errors import UsageError
from moa_peft.json_lines import append_rows, read_rows
from moa_peft.study.config import Method, StudyConfig, studies_of
from moa_peft.study.one_run import describe
from moa_peft.study.runner import open_study, run_study
from tiny_study import made_up_row, write_study

Invoke = Callable[..., Any]
SMALL = [
    "--learning_rates", "[0.01]", "--seeds", "[0]", "--tasks", "first", "--train_limit", "32", "--test_limit", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a finished study, and what its call printed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "study.json").write_text(json.dumps(write_study(folder)))
    app = typer.Typer()
    app.command(context_settings=ANY_FIELD)(compare)
    return folder, CliRunner().invoke(app, ["--config", str(folder / "study.json"), *SMALL])


@pytest.fixture
def invoke(finished: tuple[Path, Any], tmp_path: Path) -> Invoke:
    """Calls the command in a copy of that folder."""
    folder, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    app = typer.Typer()
    app.command(context_settings=ANY_FIELD)(compare)

    def call(*words: str, out: Path = tmp_path / "out") -> Any:
        flags = ["--config", str(folder / "study.json"), *SMALL, "--out", str(out)]
        return CliRunner().invoke(app, [*flags, *words])

    return call


@pytest.mark.slow
def test_a_study_says_what_it_will_do_how_far_it_is_and_what_it_found(finished: tuple[Path, Any]) -> None:
    folder, done = finished
    assert done.exit_code == 0, done.output
    rows = {row["label"]: row for row in read_rows(folder / "out" / "results.jsonl")}
    wanted = [
        "methods     soft-moa, lora, and the frozen model; baseline lora",
        "training    32 rows, epochs 1",
        "rates       0.01, the only one\n",
        "tests       1, 4 questions in all",
        "left        2 runs to train, 1 more to score only",
        "[2/3] soft-moa-lr0.01-seed0 (1 tests)",
        f"validation loss {rows['lora']['validation']['answer_loss']:.4f}",
        "3 of 3 done",
        f"lora: {100 * rows['lora']['tests']['first']['accuracy']:.1f} %",
        f"report    {folder}/out/report.md",
    ]
    assert [one for one in wanted if one not in done.stdout] == []
    assert sorted(one.name for one in (folder / "out").iterdir() if not one.name.startswith(".")) == [
        "accuracy_parameters.svg", "accuracy_step_time.svg", "report.html", "report.md", "results.jsonl", "runs",
        "study.json",
    ]  # fmt: skip


def test_a_dry_run_checks_and_counts_and_leaves_nothing(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("--dry-run", "--json", out=tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"out": str(tmp_path / "new"), "train": 2, "score": 1}
    assert not (tmp_path / "new").exists()
    assert json.loads(invoke("--dry-run", "--json").stdout)["train"] == 0


def test_each_domain_is_a_study_of_its_own_and_flags_go_before_its_changes() -> None:
    settings = {
        "out": "o", "data": "d", "methods": ["lora"], "baseline": "lora", "train_limit": 3,
        "domains": {"one": {"train_limit": 5, "data": "e"}, "two": {}},
    }  # fmt: skip
    found = studies_of(settings, {"test_limit": 7})
    assert [(one.out, one.data, one.train_limit, one.test_limit) for one in found] == [
        ("o/one", "e", 5, 7),
        ("o/two", "d", 3, 7),
    ]
    assert [one.train_limit for one in studies_of(settings, {"train_limit": 9})] == [9, 9]
    assert [one.out for one in studies_of(settings, {}, "two")] == ["o/two"]
    with pytest.raises(UsageError, match="unknown domain 'tow': did you mean 'two'"):
        studies_of(settings, {}, "tow")
    for wrong in (["one"], {"one": 5}, {1: {}}, {}):
        with pytest.raises(UsageError, match=r"domains is .+: give a mapping of names"):
            studies_of({**settings, "domains": wrong}, {}, "one")
    with pytest.raises(UsageError, match="the study has no domains: give a mapping of names"):
        studies_of({**settings, "domains": None}, {}, "one")
    del settings["out"]
    with pytest.raises(UsageError, match="the study has no out: give"):
        studies_of(settings, {})


def test_flags_that_would_do_nothing_are_refused(invoke: Invoke) -> None:
    for words, said in (
        (("--cpus-per-run", "2"), "--cpus-per-run is for --ray"),
        (("--dry-run", "--report-only"), "--dry-run and --report-only do nothing together"),
    ):
        assert said in str(invoke(*words).exception)


def test_the_report_alone_is_written_from_the_rows_without_model_and_data(
    invoke: Invoke, tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("[!.]*.*")}
    for name in before:
        if name not in ("results.jsonl", "study.json"):
            (tmp_path / "out" / name).unlink()
    done = invoke("--report-only", "--data_root", "nowhere")
    assert done.exit_code == 0, done.output
    assert (
        "mean accuracy over first, ± standard error over seeds, of the frozen model over questions:"
        in done.stdout
    )
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("[!.]*.*")} == before


def test_json_is_all_that_stands_on_standard_output(invoke: Invoke) -> None:
    told = json.loads(invoke("--report-only", "--json").stdout)
    assert set(told["accuracy"]) == {"frozen", "soft-moa", "lora"}
    assert set(told["versus_baseline"]) == {"frozen", "soft-moa"}
    for name in (
        "versus_baseline_by_test",
        "losses_versus_baseline",
    ):  # docs/comparing.md says that each has its p
        assert {"mean", "error", "p", "detectable"} <= told[name]["soft-moa"]["first"].keys()
    assert (told["rows"], told["missing"], told["failures"]) == (3, [], [])


def test_a_failed_run_ends_in_exit_code_1_and_a_line_that_names_it(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "out" / "results.jsonl"
    rows = read_rows(file)
    file.unlink()
    broken = {"failure": "RunError: the loss is nan", "validation": None, "tests": {}, "step_ms": None}
    append_rows(file, [{**row, **broken} if row["label"] == "soft-moa" else row for row in rows])
    done = invoke("--report-only")
    assert done.exit_code == 1
    assert "failed    soft-moa, rate 0.01, seed 0: RunError: the loss is nan" in done.stdout
    assert (
        "soft-moa, rate 0.01, seed 0: RunError: the loss is nan"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_a_learning_rate_that_failed_is_discarded_and_the_study_ends_well(tmp_path: Path) -> None:
    """Every later call ended in exit code 1, though nothing was left to do."""
    settings = write_study(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps(settings))
    app = typer.Typer()
    app.command(context_settings=ANY_FIELD)(compare)
    codes = []
    for fatal in ((0.03,), (0.003, 0.03)):

        def pool(orders: Any, fatal: tuple[float, ...] = fatal) -> Any:
            for order in orders:
                fails = order.job.run.learning_rate in fatal
                yield order, describe(order, {}, "RunError: nan") if fails else made_up_row(order)

        out = str(tmp_path / str(len(fatal)))
        run_study(open_study(StudyConfig.from_mapping({**settings, "out": out})), pool=pool)
        flags = ["--config", str(tmp_path / "study.json"), "--out", out, "--report-only"]
        codes.append(CliRunner().invoke(app, flags).exit_code)
    assert codes == [0, 1]


def test_what_is_wrong_with_the_last_domain_is_told_before_the_first_has_run(tmp_path: Path) -> None:
    settings = write_study(tmp_path) | {"domains": {"one": {}, "two": {"tasks": "nosuch"}}}
    (tmp_path / "study.json").write_text(json.dumps(settings))
    app = typer.Typer()
    app.command(context_settings=ANY_FIELD)(compare)
    with pytest.raises(UsageError, match="nosuch"):
        CliRunner().invoke(app, ["--config", str(tmp_path / "study.json")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no study: run it first, without --report-only"):
        raise invoke("--report-only", out=tmp_path / "new").exception


def test_without_its_packages_the_rows_are_written_and_the_report_says_what_to_install(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    done = invoke()
    assert done.exit_code == 0, done.output
    assert "no report: in a checkout of moa-peft, pip install -c constraints.txt '.[report]'" in done.stdout
    told = json.loads(invoke("--json").stdout)
    assert (told["rows"], set(told["accuracy"])) == (3, {"frozen", "soft-moa", "lora"})
    with pytest.raises(UsageError, match=r"this needs matplotlib, which is not installed: .*pip install -c constraints.txt '.\[report\]'"):  # fmt: skip
        raise invoke("--report-only").exception


def test_the_help_lists_every_key_with_its_doc_line(invoke: Invoke) -> None:
    shown = " ".join(invoke("--help").stdout.split())
    for one in (*dataclasses.fields(StudyConfig), *dataclasses.fields(Method)):
        dashes = "--" if one in dataclasses.fields(StudyConfig) else ""
        assert f"{dashes}{one.name} " in shown
    assert "moa compare --config studies/cpu.yaml --domain math --report-only" in shown
