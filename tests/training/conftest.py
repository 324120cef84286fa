import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_peft.training.recipe import Recipe
from moa_peft.training.trainer_settings import trainer_fields

TINY = runpy.run_path(str(Path(__file__).with_name("tiny.py")))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["write_model"](tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["write_rows"](tmp_path_factory.mktemp("rows") / "rows.json")


@pytest.fixture
def settings_of(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a short run on the tiny model, with changes."""

    def settings(**changes: Any) -> dict[str, Any]:
        return {
            "model": str(tiny_model),
            "data": str(rows_file),
            "output_dir": str(tmp_path / "run"),
            "max_length": 96,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }

    return settings


@pytest.fixture
def recipe_of(settings_of: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    """A recipe of a short run on the tiny model, with changes."""
    return lambda **changes: Recipe.from_mapping(settings_of(**changes), trainer_fields())
