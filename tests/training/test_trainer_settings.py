"""Every flag of the trainer: a value that it does not take ends in one line, before or at the first step."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moa_peft.errors import LibraryError, UsageError
from moa_peft.training.recipe import Recipe
from moa_peft.training.run import train
from moa_peft.training.trainer_settings import check_trainer

Recipes = Callable[..., Recipe]

BY_THE_LIBRARIES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"report_to": "wandb"}, "wandb to be installed"),
    ({"report_to": "nope"}, "nope is not supported"),
    ({"report_to": ["tensorboard", "nope"]}, "nope is not supported"),
    ({"optim": "adamw_8bit"}, "bitsandbytes"),
    ({"optim": "galore_adamw", "optim_target_modules": "nope"}, "galore_torch"),
    ({"optim": "schedule_free_adamw"}, "schedulefree"),
    ({"optim_args": "nope"}, "not enough values"),
    ({"use_liger_kernel": True}, "liger"),
    ({"torch_compile": True, "torch_compile_backend": "nope"}, "NOPE"),
    ({"torch_compile_mode": "nope"}, "mode=nope"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    ({"lr_scheduler_kwargs": {"nope": 1}}, "nope"),
    ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"nope": 1}}, "nope"),
    ({"save_strategy": "best", "validation": 0.2}, "metric_for_best_model"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end"),
    ({"accelerator_config": {"nope": 1}}, "nope"),
    ({"dataloader_persistent_workers": True}, "num_workers"),
    ({"dataloader_multiprocessing_context": "fork"}, "num_workers"),
    ({"fsdp": "full_shard"}, "distributed"),
    ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
    ({"tf32": True}, "tf32"),
)

BY_MOA: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}},
        "cannot be loaded: FlashAttention2",
    ),
    ({"model_init_kwargs": {"dtype": "bf16"}}, "cannot be loaded: .*bf16"),
    ({"model_init_kwargs": {"nope": 1}}, "cannot be loaded: .*nope"),
    (
        {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
        "cannot be loaded: .*bitsandbytes",
    ),
    ({"train_sampling_strategy": "nope"}, "give random or sequential"),
    ({"shuffle_dataset": True}, "has an effect with packing alone"),
    ({"eval_packing": True, "validation": 0.2}, "has an effect with packing alone"),
    ({"padding_free": True}, "has an effect with packing alone"),
    ({"packing": True, "pad_to_multiple_of": 8}, "cannot tell the padding of packed rows from tokens"),
    ({"packing_strategy": "nope"}, "give bfd"),
    (
        {"packing": True, "packing_strategy": "wrapped", "method": "instance-moa"},
        "one gate for each instance",
    ),
    (
        {
            "load_best_model_at_end": True,
            "validation": 0.2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 4,
        },
        "the best model may lie between two checkpoints",
    ),
    ({"loss_type": "nope"}, "give nll"),
    ({"log_level": "nope"}, "give detail or debug"),
    ({"ddp_backend": "nope"}, "give nccl"),
    ({"include_num_input_tokens_seen": "nope"}, "give all or non_padding"),
    ({"debug": ["nope"]}, "give underflow_overflow"),
    ({"metric_for_best_model": "accuracy"}, "give loss or eval_loss"),
    ({"model_init_kwargs": "nope"}, "give a mapping$"),
    ({"lr_scheduler_kwargs": "nope"}, "give a mapping$"),
    ({"deepspeed": "nope.json"}, "give a mapping or the path of a file"),
    ({"fsdp_config": "nope.json"}, "give a mapping or the path of a file"),
    ({"eval_strategy": "epoch"}, "asks for held-out rows: give them"),
    ({"eval_on_start": True}, "asks for held-out rows: give them"),
    ({"max_steps": 0}, "give at least 1, or -1 for num_train_epochs"),
    ({"data_seed": -1}, "a whole number from 0, below"),
    ({"neftune_noise_alpha": -5}, "a number from 0"),
    ({"save_total_limit": 0}, "at least 1"),
    ({"eval_accumulation_steps": 0}, "at least 1"),
    ({"pad_to_multiple_of": -3}, "at least 1"),
    ({"dataloader_num_workers": 100_000}, "a whole number from 0 to 256"),
    ({"dataset_num_proc": 100_000}, "a whole number from 0 to 256"),
)


def refused(recipe: Recipe, kind: type[UsageError]) -> str:
    """What is said when a recipe is refused: one line, and no folder but one that can be taken again."""
    with pytest.raises(kind) as caught:
        train(recipe)
    left = [one.name for one in Path(recipe.output_dir).glob("*")]
    assert left in ([], ["moa_recipe.json"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "said"), BY_THE_LIBRARIES, ids=lambda one: json.dumps(one)[:50])
def test_a_setting_that_a_library_refuses_is_told_in_one_line_with_its_own_error_as_the_cause(
    changes: dict[str, Any], said: str, recipe_of: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)  # loggers that were left half-made
    message = refused(recipe_of(**changes), LibraryError)
    assert re.search(f"^the trainer refuses these settings: [A-Za-z]+: .*{said}", message), message


@pytest.mark.parametrize(("changes", "said"), BY_MOA, ids=lambda one: json.dumps(one)[:50])
def test_a_setting_that_the_trainer_would_take_or_find_late_is_refused_by_name(
    changes: dict[str, Any], said: str, recipe_of: Recipes
) -> None:
    message = refused(recipe_of(**changes), UsageError)
    assert not message.startswith("the trainer refuses"), "not looked at before"
    assert re.search(said, message), message


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["fp16", "activation_offloading"])
@pytest.mark.parametrize("method", ["soft-moa", "adamole"])
def test_what_needs_a_gpu_is_refused_by_name_without_one(name: str, method: str, recipe_of: Recipes) -> None:
    """fp16 trained without a scaler, and AdaMoLE was told of DeepSpeed; offloading ended in an AttributeError."""
    assert f"{name} is true and needs a GPU" in refused(recipe_of(method=method, **{name: True}), UsageError)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_processes_that_would_train_each_by_itself_are_refused(
    recipe_of: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "WORLD_SIZE", "2"
    )  # as torchrun does; without use_cpu the trainer takes no notice on a CPU
    assert "started 2 processes, and the trainer sees 1" in refused(recipe_of(use_cpu=False), UsageError)


def test_more_files_than_mappings_may_be_paths(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text("{}")
    check_trainer(Recipe(data="x", output_dir="x", trainer={"deepspeed": str(tmp_path / "zero.json")}))
    check_trainer(Recipe(data="x", output_dir="x", trainer={"accelerator_config": {"split_batches": True}}))


@pytest.mark.parametrize("changes", [{}, {"max_steps": -1, "num_train_epochs": 3}])
def test_fewer_rows_than_a_batch_are_refused_where_incomplete_batches_are_dropped(
    changes: dict[str, Any], recipe_of: Recipes
) -> None:
    """With max_steps it said "done: 0 steps" and wrote an untrained adapter, with epochs it ended in a traceback."""
    recipe = recipe_of(dataloader_drop_last=True, per_device_train_batch_size=25, **changes)
    assert "leaves nothing to train on: the 24 rows are fewer than the 25 of a batch" in refused(
        recipe, UsageError
    )


def test_a_run_that_made_no_step_saves_nothing(recipe_of: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_peft.training.trainer.AdapterTrainer.train", lambda self, **_: None)
    assert "has made no step: nothing was trained" in refused(recipe_of(), UsageError)


@pytest.fixture(scope="module")
def half_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with float16 weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("half")
    for file in tiny_model.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("bf16", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_a_float16_base_is_not_trained_in_float16(
    bf16: bool, dtype: str, half_model: Path, recipe_of: Recipes
) -> None:
    """Its small gradients became 0: nothing scaled the loss."""
    recipe = recipe_of(model=str(half_model), bf16=bf16, max_steps=1)
    train(recipe)
    row = json.loads((Path(recipe.output_dir) / "results.jsonl").read_text())
    assert row["base_dtype"] == dtype


def test_float16_that_was_asked_for_without_fp16_is_refused(half_model: Path, recipe_of: Recipes) -> None:
    recipe = recipe_of(model=str(half_model), model_init_kwargs={"dtype": "float16"})
    assert "is in float16, whose small gradients become 0" in refused(recipe, UsageError)
