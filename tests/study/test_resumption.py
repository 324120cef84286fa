"""A study that is killed goes on where it was, and ends with the rows and the tables of one that was not."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moa_peft.json_lines import read_rows
from moa_peft.study.config import StudyConfig
from moa_peft.study.ray_pool import first_sentence
from moa_peft.study.report import write_report
from tiny_study import same_on_every_run, tables, write_study

SCRIPT = """
import json, os, signal, sys

from moa_peft.study.config import StudyConfig
from moa_peft.study.report import write_report
from moa_peft.study.runner import open_study, run_study
from moa_peft.evaluation import run as evaluation
from moa_peft.training.trainer import AdapterTrainer


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def in_training(run, step):
    original = AdapterTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == step and run in self.args.output_dir:
            kill()
        return original(self, *args, **kwargs)

    AdapterTrainer.training_step = killed


def in_evaluation(run, task):
    original = evaluation.append_rows

    def killed(file, rows):
        original(file, rows)
        if run in str(file) and file.name.startswith(task):
            kill()

    evaluation.append_rows = killed


def study(settings, moment):
    if moment is not None:
        {"training": in_training, "evaluation": in_evaluation}[moment[0]](*moment[1:])
    opened = open_study(StudyConfig.from_mapping(settings))
    run_study(opened, progress=False)
    write_report(opened.config)


for settings, moment in json.loads(sys.argv[1]):  # a process each; the libraries are imported once
    child = os.fork()
    if not child:
        study(settings, moment)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    lines = open(settings["out"] + "/results.jsonl", "rb").read().count(b"\\n")
    print(json.dumps([os.WTERMSIG(status), os.WEXITSTATUS(status), lines]), flush=True)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[list[int]]]:
    """The folder of a whole study and of one killed twice, their settings, and how each process of them ended."""
    folder = tmp_path_factory.mktemp("studies")
    settings = {**write_study(folder), "most_rates": 3, "tuning_limit": 48, "train_limit": 64}
    whole, killed = ({**settings, "out": str(folder / name)} for name in ("whole", "killed"))
    calls: list[Any] = [
        (whole, None),
        (killed, ("training", "soft-moa-lr0.03-seed0-rows48", 4)),
        (killed, ("evaluation", "lora-lr0.06-seed1", "second")),
        (killed, None),
        (killed, None),
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, settings, [json.loads(line) for line in done.stdout.splitlines()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [same_on_every_run(row) for row in read_rows(folder / "results.jsonl")]


@pytest.mark.slow
def test_a_study_killed_twice_goes_on_and_gives_the_rows_and_tables_of_the_whole_one(
    ended: tuple[Path, dict[str, Any], list[list[int]]],
) -> None:
    folder, _, ends = ended
    # signal, exit code and rows of each process: killed after 1 row and after 10, and nothing is done twice
    assert ends == [[0, 0, 11], [9, 0, 1], [9, 0, 10], [0, 0, 11], [0, 0, 11]]
    runs = folder / "killed" / "runs"
    (trained,) = read_rows(runs / "soft-moa-lr0.03-seed0-rows48" / "results.jsonl")
    assert trained["resumed_from"].endswith("checkpoint-4")
    scored = read_rows(runs / "lora-lr0.06-seed1" / "evaluation" / "results.jsonl")
    assert [(row["task"], row["num_resumed"]) for row in scored] == [
        ("validation", 0),
        ("first", 0),
        ("second", 4),
    ]
    assert rows_of(folder / "whole") == rows_of(folder / "killed")
    assert tables(folder / "whole") == tables(folder / "killed")
    assert "## Accuracy\n" in tables(folder / "whole")
    assert "Rates were added for soft-moa, lora. The choice lies at an end for" in tables(folder / "whole")
    timed = read_rows(folder / "killed" / "results.jsonl")[1]["step_ms"]
    assert timed is None, "the process that trained last made 2 steps, and the first does not count"


@pytest.mark.slow
def test_the_report_comes_out_of_its_rows_byte_for_byte(
    ended: tuple[Path, dict[str, Any], list[list[int]]], tmp_path: Path
) -> None:
    folder, settings, _ = ended
    out = tmp_path / "copied"
    out.mkdir()
    for name in ("results.jsonl", "study.json"):
        shutil.copy(folder / "whole" / name, out)
    write_report(StudyConfig.from_mapping({**settings, "out": str(out)}))
    for name in ("report.md", "report.html", "accuracy_parameters.svg", "accuracy_step_time.svg"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_what_ray_says_of_a_process_that_died_names_no_machine() -> None:
    told = "1 worker(s) were killed.\nMemory on the node (IP: 192.0.2.1) was 9GB. Top users: 24787 /home/someone/python"
    assert first_sentence(MemoryError(told)) == "MemoryError: 1 worker(s) were killed"


@pytest.mark.slow
def test_a_study_through_ray_that_is_killed_gives_the_same_rows(
    ended: tuple[Path, dict[str, Any], list[list[int]]], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    folder, settings, _ = ended
    config = tmp_path / "study.json"
    # the part of the whole study that one learning rate, the one chosen there, needs
    part = {**settings, "learning_rates": [0.06], "most_rates": None, "out": str(tmp_path / "out")}
    config.write_text(json.dumps(part))
    main = "from moa_peft.cli import main; main()"
    command = [sys.executable, "-c", main, "compare", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rows = tmp_path / "out" / "results.jsonl"
    with subprocess.Popen([*command, "--ray"], env=environment, stdout=subprocess.PIPE, text=True) as call:
        assert call.stdout is not None
        said = ""
        while not re.search(r"\d of \d+ done", said):
            said = call.stdout.readline()
            assert said, "it ended before its next row"
        call.kill()
    assert 0 < len(read_rows(rows)) < 5, "the call adds rows, and does not end the study"
    done = subprocess.run([*command, "--ray"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "of 5 done" not in done.stdout, "what was finished was planned again"
    through_ray = {row["config_hash"]: row for row in rows_of(tmp_path / "out")}
    whole = {row["config_hash"]: row for row in rows_of(folder / "whole") if row["stage"] == "final"}
    assert len(through_ray) == 5
    assert through_ray == whole
