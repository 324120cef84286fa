"""A study that is killed goes on where it was, and ends with the rows and the tables of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moa_peft.compare.config import StudyConfig
from moa_peft.compare.report import write_report
from moa_peft.json_lines import read_rows
from tiny_study import same_on_every_run, tables, write_study

SCRIPT = """
import json, os, signal, sys

from moa_peft.compare.config import StudyConfig
from moa_peft.compare.report import write_report
from moa_peft.compare.run import open_study, run_study
from moa_peft.evaluate import run as evaluation
from moa_peft.train.trainer import AdapterTrainer


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


@pytest.mark.slow
def test_a_study_killed_twice_goes_on_and_gives_the_rows_and_tables_of_the_whole_one(tmp_path: Path) -> None:
    settings = write_study(tmp_path)
    whole, killed = ({**settings, "out": str(tmp_path / name)} for name in ("whole", "killed"))
    calls: list[Any] = [
        (whole, None),
        (killed, ("training", "soft-moa-lr0.03-seed0", 4)),
        (killed, ("evaluation", "lora-lr0.03-seed1", "second")),
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
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert ends == [[0, 0, 9], [9, 0, 1], [9, 0, 8], [0, 0, 9], [0, 0, 9]], done.stderr

    runs = tmp_path / "killed" / "runs"
    (trained,) = read_rows(runs / "soft-moa-lr0.03-seed0" / "results.jsonl")
    assert trained["resumed_from"].endswith("checkpoint-3")
    scored = read_rows(runs / "lora-lr0.03-seed1" / "evaluation" / "results.jsonl")
    assert [(row["task"], row["num_resumed"]) for row in scored] == [
        ("validation", 0),
        ("first", 0),
        ("second", 4),
    ]
    rows = [
        [same_on_every_run(row) for row in read_rows(tmp_path / name / "results.jsonl")]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    assert tables(tmp_path / "whole") == tables(tmp_path / "killed")
    assert "## Accuracy\n" in tables(tmp_path / "whole")
    timed = read_rows(tmp_path / "killed" / "results.jsonl")[1]["step_ms"]["steps"]
    assert timed == 6, "8 steps, of which the first of each process does not count"

    before = (tmp_path / "whole" / "report.html").read_bytes()
    (tmp_path / "whole" / "report.html").unlink()
    write_report(StudyConfig.from_mapping(whole))
    assert (tmp_path / "whole" / "report.html").read_bytes() == before
