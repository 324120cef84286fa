import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_peft.cli.train import plan_text
from moa_peft.errors import UsageError
from moa_peft.training import checkpoints
from moa_peft.training.checkpoints import changed_keys
from moa_peft.training.prepare import prepare
from moa_peft.training.recipe import Recipe
from moa_peft.training.run import train

Recipes = Callable[..., Recipe]

KILLED_RUN = """
import json, os, signal, sys
import torch
from moa_peft.training.recipe import Recipe
from moa_peft.training.run import train
from moa_peft.training.trainer_settings import trainer_fields
from moa_peft.training.trainer import AdapterTrainer

settings, method, step, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
original = getattr(AdapterTrainer, method)

def killed(self, *args, **kwargs):
    if self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

setattr(AdapterTrainer, method, killed)
train(Recipe.from_mapping(settings, trainer_fields()))
"""

RUN: dict[str, Any] = {
    "max_steps": 9,  # six steps an epoch: the run is cut off in the first epoch and ends in the second
    "save_steps": 2,
    "save_total_limit": 1,
    "validation": 0.1,
    "eval_steps": 3,
    "eval_strategy": "steps",
    "mixture": {"experts": {"0": {"dropout": 0.2}}},  # so that a wrong random state shows
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "step", "last", "cut_off"),
    [
        ("training_step", 5, "checkpoint-4", ()),
        ("_save_rng_state", 6, "checkpoint-4", ("checkpoint-6",)),  # weights and optimiser of 6 are on disk
    ],
)
def test_a_run_killed_and_resumed_ends_with_the_bits_of_the_whole_one(
    method: str,
    step: int,
    last: str,
    cut_off: tuple[str, ...],
    settings_of: Callable[..., Any],
    tmp_path: Path,
) -> None:
    from moa_peft.training.trainer_settings import trainer_fields

    settings = settings_of(**RUN, output_dir=str(tmp_path / "killed"))
    arguments = json.dumps([settings, method, step, torch.get_num_threads()])
    died = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, arguments], capture_output=True, text=True, timeout=120
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    found = checkpoints.find_checkpoints(tmp_path / "killed")
    assert found.complete[-1].name == last
    assert tuple(one.name for one in found.incomplete) == cut_off
    assert not (tmp_path / "killed" / "adapter_config.json").exists()

    seen: list[str] = []
    resumed = Recipe.from_mapping(settings | {"resume": True}, trainer_fields())
    train(resumed, on_plan=lambda plan: seen.append(plan_text(plan)))
    assert f"from {tmp_path}/killed/{last}" in seen[0]
    assert all(f"skipped     {name}" in seen[0] for name in cut_off)

    whole = Recipe.from_mapping(settings | {"output_dir": str(tmp_path / "whole")}, trainer_fields())
    train(whole)
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    left = checkpoints.find_checkpoints(tmp_path / "killed")
    assert [one.name for one in left.complete] == ["checkpoint-9"]
    assert not left.incomplete


def test_resuming_with_other_data_seed_or_method_names_what_changed(
    recipe_of: Recipes, tmp_path: Path
) -> None:
    train(recipe_of(save_steps=2))
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"instruction": "add 1 and 1", "output": "2"}] * 24))
    changed = recipe_of(
        save_steps=2,
        resume=True,
        data=str(other),
        seed=3,
        method="sparse-moa",
        mixture={"router": {"kind": "linear"}},
    )
    message = "was started with other values of data, method, mixture, router_lr_factor, seed: resume it with its own recipe"
    with pytest.raises(UsageError, match=message):
        train(changed)


def test_what_chooses_the_best_checkpoint_is_free_only_where_none_is_chosen() -> None:
    run = {"eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    assert changed_keys(run, run | {"save_steps": 3, "save_total_limit": 2}) == []
    assert changed_keys(run, run | {"eval_steps": 3}) == ["eval_steps"], (
        "it draws from the generator of dropout"
    )
    assert changed_keys(run, run | {"validation_md5": "abc"}) == [], "of before it was written down"
    assert changed_keys(run | {"model_init_kwargs": {"dtype": "float32"}}, run) == [], "what the run found"
    assert changed_keys(run | {"model_init_kwargs": {"revision": "v1"}}, run) == ["model_init_kwargs"]
    run |= {"load_best_model_at_end": True}
    changed = run | {"eval_steps": 3, "save_steps": 3, "save_total_limit": 2}
    assert changed_keys(run, changed) == ["eval_steps", "save_steps"]


def test_other_held_out_rows_in_the_same_file_are_noticed(
    recipe_of: Recipes, rows_file: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.json"
    held_out.write_bytes(rows_file.read_bytes())
    train(recipe_of(save_steps=2, validation=str(held_out)))
    held_out.write_text(json.dumps(json.loads(held_out.read_text())[1:]))
    with pytest.raises(UsageError, match="was started with other values of validation: resume it"):
        train(recipe_of(save_steps=2, validation=str(held_out), resume=True))


def test_a_recipe_whose_experts_are_named_by_numbers_is_still_the_runs_own(recipe_of: Recipes) -> None:
    by_number = {"experts": {0: {"rank": 4}}}
    train(recipe_of(mixture=by_number))
    train(recipe_of(mixture=by_number, resume=True))


def test_resuming_a_finished_run_elsewhere_with_other_saving_writes_its_adapter_again(
    recipe_of: Recipes, rows_file: Path, tmp_path: Path
) -> None:
    train(recipe_of(save_steps=2))
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    adapter.unlink()
    moved = tmp_path / "moved.json"
    moved.write_bytes(rows_file.read_bytes())
    outcome = train(recipe_of(save_steps=1, logging_steps=3, resume=True, data=str(moved)))
    assert outcome.steps == 4
    assert outcome.step_s is None, "a finished run had something left to do"
    assert adapter.read_bytes() == before
    assert json.loads((tmp_path / "run" / "moa_recipe.json").read_text())["resume"] is False


def test_a_resumed_run_logs_and_saves_as_its_own_recipe_says(recipe_of: Recipes) -> None:
    """The intervals of the checkpoint were kept, without a word."""
    train(recipe_of(save_steps=2, save_total_limit=None))
    folder = Path(recipe_of().output_dir)
    checkpoints.unmark(folder / "checkpoint-4")
    train(recipe_of(save_steps=1, logging_steps=2, save_total_limit=None, resume=True))
    assert {one.name for one in checkpoints.find_checkpoints(folder).complete} == {
        "checkpoint-2", "checkpoint-3", "checkpoint-4",
    }  # fmt: skip
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [one["step"] for one in history] == [1, 2, 4]


def test_an_order_of_rows_that_cannot_be_found_again_is_not_resumed(recipe_of: Recipes) -> None:
    settings = {"save_steps": 2, "train_sampling_strategy": "group_by_length"}
    train(recipe_of(**settings))
    with pytest.raises(
        UsageError, match="group_by_length, whose order of rows a resumed run cannot find again"
    ):
        train(recipe_of(**settings, resume=True))


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut off"])
def test_the_best_weights_of_a_run_are_found_where_its_folder_was_moved_to(
    finished: bool, recipe_of: Recipes, rows_file: Path, tmp_path: Path
) -> None:
    settings = {
        "validation": str(rows_file), "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "load_best_model_at_end": True, "greater_is_better": True,  # the highest loss: that of the first checkpoint
    }  # fmt: skip
    train(recipe_of(**settings))
    best = weights_of(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    if not finished:
        checkpoints.unmark(tmp_path / "moved" / "checkpoint-4")
    train(recipe_of(**settings, resume=True, output_dir=str(tmp_path / "moved")))
    assert weights_of(tmp_path / "moved") == best != weights_of(tmp_path / "moved" / "checkpoint-4")


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_run_cut_off_before_its_first_checkpoint_starts_over(recipe_of: Recipes) -> None:
    train(recipe_of(save_steps=2))
    for one in checkpoints.find_checkpoints(Path(recipe_of().output_dir)).complete:
        checkpoints.unmark(one)
    preparation = prepare(recipe_of(resume=True))
    assert preparation.plan.resume_from is None
    assert preparation.plan.skipped == ("checkpoint-2", "checkpoint-4")
    text = plan_text(preparation.plan)
    assert "from the start: no checkpoint was complete" in text
    preparation.claim.close()
    assert checkpoints.find_checkpoints(Path(recipe_of().output_dir)).incomplete, (
        "giving the folder back deleted a run's files"
    )


def test_an_earlier_checkpoint_can_be_named_and_later_ones_are_written_anew(recipe_of: Recipes) -> None:
    recipe = recipe_of(save_steps=1, save_total_limit=None)
    train(recipe)
    folder = Path(recipe.output_dir)
    before = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    outcome = train(dataclasses.replace(recipe, resume=str(folder / "checkpoint-2")))
    assert outcome.step_s is not None
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [one.name for one in checkpoints.find_checkpoints(folder).complete] == [
        f"checkpoint-{step}" for step in (1, 2, 3, 4)
    ]
    assert len((folder / "results.jsonl").read_text().splitlines()) == 2


def test_a_checkpoint_that_is_not_the_runs_is_refused(recipe_of: Recipes, tmp_path: Path) -> None:
    recipe = recipe_of(save_steps=2)
    train(recipe)
    with pytest.raises(UsageError, match=r"checkpoint-3 is not a complete checkpoint of the run in .*: complete are checkpoint-2, checkpoint-4"):  # fmt: skip
        train(dataclasses.replace(recipe, resume=str(tmp_path / "run" / "checkpoint-3")))


def test_a_checkpoint_without_the_optimizers_state_is_only_good_for_what_has_reached_its_end(
    recipe_of: Recipes,
) -> None:
    """With save_only_model, optimizer and schedule started over, without a word."""
    recipe = recipe_of(save_steps=1, save_only_model=True)
    train(recipe)
    again = dataclasses.replace(recipe, resume=True)
    assert train(again).step_s is None
    checkpoints.unmark(checkpoints.find_checkpoints(Path(recipe.output_dir)).complete[-1])
    with pytest.raises(
        UsageError, match="checkpoint-3 holds no state of the optimizer, as save_only_model leaves it out"
    ):
        train(again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 12}, r"checkpoint-2 is of a run of 12 steps, this one has 4: .* as many processes"),
        ({"processes": 2}, r"checkpoint-2 is of a run in 2 processes, and these are 1: start as many"),
    ],
)
def test_a_run_of_other_steps_or_processes_is_not_gone_on_with(
    recipe_of: Recipes, change: dict[str, int], message: str
) -> None:
    """With twice the processes a run had half the steps, had made them all, and was called done."""
    recipe = recipe_of(save_steps=2)
    train(recipe)
    checkpoint = Path(recipe.output_dir) / "checkpoint-2"
    if "max_steps" in change:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | change))
    else:
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
        (checkpoint / "rng_state_1.pth").write_bytes((checkpoint / "rng_state_0.pth").read_bytes())
    checkpoints.mark_complete(checkpoint)
    with pytest.raises(UsageError, match=message):
        train(dataclasses.replace(recipe, resume="checkpoint-2"))


def test_resuming_where_there_is_no_run_is_refused(recipe_of: Recipes, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"run holds no readable moa_recipe.json, so there is no run to resume"
    ):
        train(recipe_of(resume=True))
    assert not (tmp_path / "run").exists()


def test_the_only_complete_checkpoint_stays_until_the_next_one_is_complete(
    recipe_of: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = checkpoints.mark_complete

    def killed(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt
        mark(checkpoint)

    monkeypatch.setattr(checkpoints, "mark_complete", killed)
    recipe = recipe_of(save_steps=1, save_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    found = checkpoints.find_checkpoints(Path(recipe.output_dir))
    assert [one.name for one in found.complete] == ["checkpoint-1"]
    assert [one.name for one in found.incomplete] == ["checkpoint-2"]
