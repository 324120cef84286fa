"""Recipes and flags drawn at random: each trains, or ends in one line and exit code 2."""

import dataclasses
import json
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import typer

from moa_peft import MoAConfig, cli
from moa_peft.mixture.config import RouterConfig
from moa_peft.mixture.experts import expert_kinds
from moa_peft.mixture.presets import PRESETS
from moa_peft.training.recipe import own_fields
from moa_peft.training.trainer_settings import trainer_fields

COUNT, DRY_RUNS, LONGEST_S = 150, 0.8, 20

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 0.5, 1e23, 10**23, 2**40, float("nan"), float("inf"), -0.0, "", "nope", "no", "x" * 5000,
    "[", "(a+)+$", "\ud800", "\u0000", "1e-4", [], ["nope"], [1], [[]], {}, {"nope": 1}, {"a": {"b": [None]}}, {1: 2},
)  # fmt: skip

MINUTES = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Fields that make a compiler run."""

FIXED = ("model", "data", "output_dir", "max_steps", "use_cpu", "resume", "validation")
"""Keys that a hub would be asked for, or that a run of two steps on a CPU needs."""


def draw(rng: random.Random) -> dict[str, Any]:
    """The changes to a recipe: some keys of the trainer, of the recipe and of its mixture, mostly with odd values."""
    trainer = sorted(set(trainer_fields()) - {*MINUTES, *FIXED})
    own = sorted({*own_fields()} - {*FIXED, "mixture"})
    changes: dict[str, Any] = {"method": rng.choice(sorted(PRESETS))}
    for _ in range(rng.randint(0, 2)):
        changes[rng.choice(trainer)] = rng.choice(ODD)
    if rng.random() < 0.3:
        changes[rng.choice(own)] = rng.choice(ODD)
    if rng.random() < 0.2:
        changes["validation"] = rng.choice(
            (0.2, *(one for one in ODD if not isinstance(one, str) or not one))
        )
    if rng.random() < 0.6:
        changes["mixture"] = draw_mixture(rng)
    return changes


def draw_mixture(rng: random.Random) -> Any:
    fields = [one.name for one in dataclasses.fields(MoAConfig)]
    router = [one.name for one in dataclasses.fields(RouterConfig)]
    kind = rng.choice(sorted(expert_kinds()))
    expert = {"kind": kind, **({"targets": ["q_proj"]} if "targets" in kind else {})}
    expert |= {rng.choice([one.name for one in dataclasses.fields(expert_kinds()[kind])]): rng.choice(ODD)}
    return rng.choice(
        (
            {rng.choice(fields): rng.choice(ODD)},
            {"router": {rng.choice(router): rng.choice(ODD)}},
            {"experts": [expert]},
            {"experts": {rng.choice(("0", "9", "x")): {"rank": rng.choice(ODD)}}},
            {"architecture": {rng.choice(("blocks", "attention", "norm", "projections")): rng.choice(ODD)}},
            rng.choice(ODD),
        )
    )


@pytest.fixture
def _hangs_end() -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not ended after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_hangs_end")
@pytest.mark.filterwarnings("ignore")
def test_every_recipe_trains_or_ends_in_one_line_and_exit_code_2(
    tiny_model: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.register_verbs()
    monkeypatch.setattr(cli, "register_verbs", lambda: None)
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    wrong: list[str] = []
    rng = random.Random(20)
    for number in range(COUNT):
        recipe = {
            "model": str(tiny_model),
            "data": str(rows_file),
            "max_length": 96,
            "max_steps": 2,
            "use_cpu": True,
        }
        recipe |= {"output_dir": str(tmp_path / "run"), "disable_tqdm": True} | draw(rng)
        config = tmp_path / "recipe.yaml"
        config.write_text(json.dumps(recipe))
        dry = ["--dry-run"] if rng.random() < DRY_RUNS else []
        monkeypatch.setattr(sys, "argv", ["moa", "train", "--config", str(config), *dry])
        signal.alarm(LONGEST_S)
        try:
            cli.main()
            code: object = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException as error:  # noqa: BLE001  # a traceback is what is looked for
            code = f"{type(error).__name__}: {error}"[:300]
        finally:
            signal.alarm(0)
        said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("moa: error: ")]
        if code not in (0, 2) or len(said) != (code == 2):
            wrong.append(f"{number}: {code} {config.read_text()[:600]}")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert not wrong, "\n".join(wrong)
    assert isinstance(cli.app, typer.Typer)
