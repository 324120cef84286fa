import logging
import subprocess
import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from moa_peft import provenance as proving
from moa_peft.provenance import provenance
from moa_peft.quiet import quiet_libraries
from moa_peft.training.progress import ProgressLines, StepClock, log_line

NOTHING: Any = None


def test_a_log_line_holds_the_figures_a_person_looks_for() -> None:
    logs = {
        "loss": 1.23456,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "entropy": 3.0,
        "router/active_experts": 3.5,
    }
    assert log_line(logs) == "loss 1.2346, gradient norm 0.5, learning rate 0.0001, active experts 3.50"
    assert log_line({"eval_loss": 2.0, "eval_runtime": 1.0}) == "held-out loss 2.0000"
    assert log_line({"train_runtime": 3.0}) == ""


def test_the_clock_gives_the_median_of_the_steps_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 10.0, 11.0, 20.0, 22.0, 30.0, 33.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = StepClock()
    assert clock.median() is None
    medians = []
    for _ in range(4):
        clock.on_step_begin(NOTHING, NOTHING, NOTHING)
        clock.on_step_end(NOTHING, NOTHING, NOTHING)
        medians.append(clock.median())
    assert medians == [9.0, 1.0, 1.5, 2.0]


def test_the_bar_starts_at_the_step_of_a_resumed_run_and_logs_beside_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=2)
    lines = ProgressLines()
    lines.on_train_begin(NOTHING, state, NOTHING)
    state.global_step = 3
    lines.on_step_end(NOTHING, state, NOTHING)
    lines.on_log(NOTHING, state, NOTHING, logs={"loss": 2.5})
    lines.on_train_end(NOTHING, state, NOTHING)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 3: loss 2.5000" in shown.err
    assert "2/4" in shown.err
    assert "3/4" in shown.err


def test_other_processes_than_the_first_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=False, max_steps=4, global_step=0)
    lines = ProgressLines()
    lines.on_train_begin(NOTHING, state, NOTHING)
    lines.on_step_end(NOTHING, state, NOTHING)
    lines.on_log(NOTHING, state, NOTHING, logs={"loss": 2.5})
    lines.on_train_end(NOTHING, state, NOTHING)
    assert capsys.readouterr() == ("", "")


def test_libraries_are_quiet_inside_the_block_and_as_before_after_it() -> None:
    import datasets

    before = (
        transformers_logging.get_verbosity(),
        logging.getLogger("trl").level,
        datasets.are_progress_bars_disabled(),
    )
    with quiet_libraries():
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert datasets.are_progress_bars_disabled()
        warnings.warn_explicit("noise", UserWarning, "file.py", 1, module="transformers.trainer")
        with pytest.raises(UserWarning, match="ours"):
            warnings.warn_explicit("ours", UserWarning, "file.py", 1, module="moa_peft.training")
    after = (
        transformers_logging.get_verbosity(),
        logging.getLogger("trl").level,
        datasets.are_progress_bars_disabled(),
    )
    assert after == before
    with pytest.raises(UserWarning, match="noise"):
        warnings.warn_explicit("noise", UserWarning, "file.py", 1, module="transformers.trainer")


def test_provenance_says_what_is_needed_to_repeat_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    row = provenance()
    assert set(row) == {"versions", "commit", "dirty", "command", "device", "threads", "taken_at"}
    assert all(
        row["versions"][name] for name in ("python", "moa-peft", "torch", "transformers", "peft", "trl")
    )

    def broken(*args: Any, **kwargs: Any) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(proving.subprocess, "run", broken)
    monkeypatch.setattr(proving, "LIBRARIES", ("no-such-distribution",))
    row = provenance()
    assert row["commit"] is None
    assert row["dirty"] is None
    assert row["versions"]["no-such-distribution"] is None
