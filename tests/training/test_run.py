import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import SFTTrainer

from moa_peft.data.loading import load_rows
from moa_peft.data.tokenization import encode_rows
from moa_peft.errors import UsageError
from moa_peft.training import prepare as preparing
from moa_peft.training.checkpoints import find_checkpoints
from moa_peft.training.recipe import Recipe
from moa_peft.training.run import train
from moa_peft.training.trainer_settings import trainer_fields
from structures import text_model

Recipes = Callable[..., Recipe]


def weights(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def history(folder: str) -> list[dict[str, Any]]:
    last = find_checkpoints(Path(folder)).complete[-1]
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def plain_loss(recipe: Recipe, count: int | None = None) -> float:
    """The frozen model's mean loss over all answer tokens, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    total, tokens = 0.0, 0
    for one in encode_rows(
        load_rows(recipe.data)[:count], tokenizer, recipe.template, recipe.max_length
    ).examples:
        with torch.no_grad():
            logits = model(torch.tensor([one.input_ids])).logits[0, :-1]
        labels = torch.tensor(one.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return total / tokens


def test_a_short_run_logs_and_writes_checkpoints_before_its_end_unless_the_recipe_says_when(
    settings_of: Callable[..., dict[str, Any]],
) -> None:
    """The loss last logged of nine steps was that of the first."""
    settings = settings_of(max_steps=40, validation=0.2)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps"}
    for given, logging, saving in (
        ({}, 8, 2),
        ({"logging_steps": 30, "save_steps": 7}, 30, 7),
        (best | {"eval_steps": 13}, 8, 13),
        (best, 8, 10),
    ):
        own = {key: value for key, value in settings.items() if key != "logging_steps"} | given
        args = preparing.prepare(Recipe.from_mapping(own, trainer_fields())).trainer.args
        assert (args.logging_steps, args.save_steps) == (logging, saving)


def test_a_run_leaves_exactly_the_files_it_promises_and_the_loss_falls(recipe_of: Recipes) -> None:
    recipe = recipe_of(max_steps=12, save_steps=6, validation=0.2)
    outcome = train(recipe)
    folder = Path(recipe.output_dir)
    assert {one.name for one in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-12",
        "checkpoint-6",
        "moa_recipe.json",
        "results.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    losses = [one["loss"] for one in history(recipe.output_dir) if "loss" in one]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.2
    assert outcome.final_loss == losses[-1]
    (row,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert row["steps"] == outcome.steps == 12
    assert row["trainable_parameters"] == sum(one.numel() for one in weights(recipe.output_dir).values())
    assert row["validation_loss"] == outcome.validation_loss is not None
    assert row["recipe"] == json.loads((folder / "moa_recipe.json").read_text())
    assert row["recipe"]["data_md5"]
    assert row["recipe"]["seed"] == 0
    assert row["versions"]["torch"] == torch.__version__


def test_the_recipe_written_down_repeats_the_run_bit_for_bit(recipe_of: Recipes, tmp_path: Path) -> None:
    from moa_peft.cli.overrides import load_yaml
    from moa_peft.training.trainer_settings import trainer_fields

    first = recipe_of(mixture={"router": {"kind": "linear"}}, validation=0.2)
    train(first)
    again = load_yaml(Path(first.output_dir) / "moa_recipe.json") | {"output_dir": str(tmp_path / "again")}
    train(Recipe.from_mapping(again, trainer_fields()))
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (Path(first.output_dir) / name).read_bytes()


def test_the_adapter_reloads_through_peft_and_differs_from_another_seeds(
    recipe_of: Recipes, tmp_path: Path
) -> None:
    recipe = recipe_of()
    train(recipe)
    base = AutoModelForCausalLM.from_pretrained(recipe.model)
    model = PeftModel.from_pretrained(base, recipe.output_dir)
    held = {name for name, _ in model.named_parameters() if "moa_" in name}
    assert len(held) == len(weights(recipe.output_dir))
    other = recipe_of(seed=1, output_dir=str(tmp_path / "other"))
    train(other)
    mine, theirs = weights(recipe.output_dir), weights(other.output_dir)
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_first_loss_is_the_frozen_models_mean_over_answer_tokens_whatever_the_accumulation(
    recipe_of: Recipes, tmp_path: Path
) -> None:
    whole = recipe_of(max_steps=1, per_device_train_batch_size=24, output_dir=str(tmp_path / "whole"))
    parts = recipe_of(
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=8,
        output_dir=str(tmp_path / "parts"),
    )
    expected = plain_loss(whole)
    for recipe in (whole, parts):
        assert train(recipe).final_loss == pytest.approx(expected, abs=1e-4)
    first = torch.load(tmp_path / "whole/checkpoint-1/optimizer.pt")["state"]
    second = torch.load(tmp_path / "parts/checkpoint-1/optimizer.pt")["state"]
    for key in first:  # Adam's first moment after one step is the gradient, but for a factor
        scale = first[key]["exp_avg"].abs().max()
        assert (first[key]["exp_avg"] - second[key]["exp_avg"]).abs().max() <= 1e-4 * scale + 1e-9


def test_on_a_cpu_only_the_answers_go_through_the_output_layer(
    recipe_of: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer import utils as trl_forward

    scored: list[int] = []

    class Counted(trl_forward._ChunkedLogProbFunction):
        @classmethod
        def apply(cls, hidden: Tensor, *rest: Any) -> Any:
            scored.append(len(hidden))
            return trl_forward_function.apply(hidden, *rest)

    trl_forward_function = trl_forward._ChunkedLogProbFunction
    decision = trl_forward._use_triton
    monkeypatch.setattr(trl_forward, "_ChunkedLogProbFunction", Counted)
    train(recipe_of(max_steps=1, per_device_train_batch_size=24, method="sparse-moa"))
    assert scored == [24 + sum(1 + i % 3 for i in range(24))], (
        "not one position for each answer and end token"
    )
    assert trl_forward._use_triton is decision


def test_packed_rows_do_not_see_each_other(recipe_of: Recipes) -> None:
    recipe = recipe_of(max_steps=1, per_device_train_batch_size=24, packing=True)
    preparation = preparing.prepare(recipe)
    assert preparation.plan.rows_kept == 24
    assert len(preparation.trainer.train_dataset) < 24  # type: ignore[arg-type]  # a Dataset is sized
    preparation.claim.close()
    assert train(recipe).final_loss == pytest.approx(plain_loss(recipe), abs=1e-4)


def test_gradient_checkpointing_gives_the_same_adapter_bit_for_bit(
    recipe_of: Recipes, tmp_path: Path
) -> None:
    plain = recipe_of(output_dir=str(tmp_path / "plain"))
    checkpointed = recipe_of(gradient_checkpointing=True, output_dir=str(tmp_path / "checkpointed"))
    for recipe in (plain, checkpointed):
        train(recipe)
    first, second = weights(plain.output_dir), weights(checkpointed.output_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_held_out_loss_is_the_mean_over_answer_tokens_whatever_the_batch(
    recipe_of: Recipes, rows_file: Path, tmp_path: Path
) -> None:
    """It was the mean of batches' means, so that it depended on their size."""
    found: list[float] = []
    for size in (1, 5, 20):
        recipe = recipe_of(
            output_dir=str(tmp_path / f"run{size}"), validation=str(rows_file), learning_rate=0.0, max_steps=1,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        found.append(train(recipe).validation_loss or 0.0)
    assert found == pytest.approx([plain_loss(recipe)] * 3, rel=1e-3)  # the adapter's small start
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")
@pytest.mark.parametrize(
    "loss", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}], ids=["smoothed", "dft"]
)
def test_the_held_out_loss_is_the_negative_log_likelihood_whatever_is_trained(
    loss: dict[str, Any], recipe_of: Recipes, rows_file: Path
) -> None:
    """The best of dft's was the worst model: it falls where the model is surer of wrong answers."""
    recipe = recipe_of(validation=str(rows_file), learning_rate=0.0, max_steps=1, **loss)
    assert train(recipe).validation_loss == pytest.approx(plain_loss(recipe), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("olmoe", {}), ("olmoe", {"router_aux_loss_coef": 0.1}), ("llama4_text", {}), ("doge", {})],
)
def test_of_a_base_with_routers_of_its_own_the_answers_alone_are_trained_and_judged(
    name: str, settings: dict[str, Any], recipe_of: Recipes, rows_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """OLMoE's own balance loss was in every figure; Llama 4 and a dense Doge did not train."""
    base = tmp_path / "base"
    text_model(name).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    recipe = recipe_of(
        model=str(base),
        validation=str(rows_file),
        learning_rate=0.0,
        max_steps=1,
        per_device_train_batch_size=24,
        **settings,
    )
    outcome = train(recipe)
    assert outcome.validation_loss == pytest.approx(plain_loss(recipe), rel=1e-3)
    if not settings:
        assert outcome.final_loss == pytest.approx(outcome.validation_loss, rel=1e-3)


def test_the_loss_of_the_first_step_is_not_that_of_the_end(recipe_of: Recipes) -> None:
    recipe = recipe_of(logging_steps=100)
    assert train(recipe).final_loss is None
    assert "training loss" not in (Path(recipe.output_dir) / "README.md").read_text()


def test_the_adapter_of_a_quantised_base_is_trained_in_float32(
    recipe_of: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL makes it bfloat16 there: a router's bias of 2.2 did not move in 30 steps."""
    load = preparing._load_model

    def quantised(*args: Any) -> Any:
        model = load(*args)
        model.is_loaded_in_4bit = True
        return model

    monkeypatch.setattr(preparing, "_load_model", quantised)
    trainer = preparing.prepare(recipe_of()).trainer
    assert {one.dtype for one in trainer.wrapped.parameters() if one.requires_grad} == {torch.float32}


def test_bf16_keeps_the_adapter_in_float32_on_a_bfloat16_base(recipe_of: Recipes) -> None:
    recipe = recipe_of(bf16=True, max_steps=8, gradient_checkpointing=True)
    train(recipe)
    assert {one.dtype for one in weights(recipe.output_dir).values()} == {torch.float32}
    row = json.loads((Path(recipe.output_dir) / "results.jsonl").read_text())
    assert row["base_dtype"] == "bfloat16"
    losses = [one["loss"] for one in history(recipe.output_dir) if "loss" in one]
    assert losses[-1] < losses[0]


def test_watching_the_router_leaves_the_training_bit_for_bit_alone(
    recipe_of: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = recipe_of(output_dir=str(tmp_path / "watched"), logging_steps=2, method="sparse-moa")
    train(watched)
    figures = [name for one in history(watched.output_dir) for name in one if name.startswith("router/")]
    assert "router/threshold_mean" in figures
    assert "router/active_experts" in figures
    monkeypatch.setattr(preparing, "mixture_layers", lambda model: [])
    alone = recipe_of(output_dir=str(tmp_path / "alone"), logging_steps=2, method="sparse-moa")
    train(alone)
    assert not [name for one in history(alone.output_dir) for name in one if name.startswith("router/")]
    first, second = weights(watched.output_dir), weights(alone.output_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    recipe_of: Recipes,
) -> None:
    recipe = recipe_of(learning_rate=1e30, save_steps=1)
    with pytest.raises(UsageError, match=r"the loss of step 2 is nan: training stopped, the last checkpoint before it is .*checkpoint-1; start a new run in another output_dir with a lower learning_rate"):  # fmt: skip
        train(recipe)
    folder = Path(recipe.output_dir)
    assert [one.name for one in find_checkpoints(folder).complete] == ["checkpoint-1"]
    assert not (folder / "checkpoint-2").exists()
    assert not (folder / "adapter_config.json").exists()


def test_a_held_out_loss_that_is_not_finite_stops_the_run_too(
    recipe_of: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run had ended when its row could not be written: a traceback."""

    def nowhere(self: SFTTrainer, *_args: Any, **_kwargs: Any) -> Any:
        nan = torch.tensor(float("nan"))
        return (nan, {}) if not self.model.training else real(self, *_args, **_kwargs)

    real = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", nowhere)
    with pytest.raises(UsageError, match=r"the held-out loss after step 2 is nan: training stopped"):
        train(recipe_of(max_steps=2, validation=0.5))


def test_a_short_run_leaves_checkpoints_without_being_told(recipe_of: Recipes, tmp_path: Path) -> None:
    train(recipe_of(max_steps=4))
    assert [one.name for one in find_checkpoints(tmp_path / "run").complete] == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert json.loads((tmp_path / "run/moa_recipe.json").read_text())["save_steps"] == 1


def test_a_folder_below_home_is_the_same_for_the_run_and_its_checkpoints(
    recipe_of: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    outcome = train(recipe_of(output_dir="~/run", save_steps=2))
    assert outcome.output_dir == str(tmp_path / "home/run")
    assert {"checkpoint-2", "adapter_config.json"} <= {one.name for one in (tmp_path / "home/run").iterdir()}
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("options", [{"save_steps": 1}, {"save_strategy": "no", "max_steps": 1}])
def test_weights_that_are_not_finite_are_never_saved(recipe_of: Recipes, options: dict[str, Any]) -> None:
    """Neither in a checkpoint, nor at the end where no checkpoint follows the last step."""
    recipe = recipe_of(learning_rate=1e39, **options)
    with pytest.raises(UsageError, match=r"after step 1, .*moa_.* holds numbers that are not finite: training stopped, there was no checkpoint yet; start a new run in another output_dir with a lower learning_rate, bf16 instead of fp16, or a lower max_grad_norm$"):  # fmt: skip
        train(recipe)
    assert [one.name for one in Path(recipe.output_dir).iterdir()] == ["moa_recipe.json"]


def test_an_output_folder_that_holds_anything_is_refused_and_left_alone(
    recipe_of: Recipes, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("mine.txt", ".mine.tmp"):
        (tmp_path / "run" / name).write_text("keep")
    with pytest.raises(
        UsageError, match=r"run exists and is not empty: choose another one, delete it, or add --resume"
    ):
        train(recipe_of())
    assert {one.name for one in (tmp_path / "run").iterdir()} == {"mine.txt", ".mine.tmp"}


def test_a_second_process_in_the_same_folder_is_refused_and_a_killed_ones_drafts_are_removed(
    recipe_of: Recipes, tmp_path: Path
) -> None:
    """Two runs at once wrote one folder; one adapter was neither's."""
    (tmp_path / "run/.adapter-left").mkdir(parents=True)
    (tmp_path / "run/moa_recipe.json").write_text("{}")
    with (
        FileLock(tmp_path / "run/.lock"),
        pytest.raises(UsageError, match=r"another process works in .*run: wait for it"),
    ):
        train(recipe_of())
    preparation = preparing.prepare(recipe_of())
    assert {one.name for one in (tmp_path / "run").iterdir()} == {".lock", "moa_recipe.json"}
    with pytest.raises(TimeoutError):
        FileLock(tmp_path / "run/.lock", timeout=0).acquire()
    preparation.claim.close()
    FileLock(tmp_path / "run/.lock", timeout=0).acquire().lock.release()


def test_an_error_after_the_first_step_starts_on_a_line_of_its_own(
    recipe_of: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stood behind the progress bar, on the same line."""
    with pytest.raises(UsageError, match="the loss of step 2"):
        train(recipe_of(learning_rate=1e30, disable_tqdm=False))
    said = capsys.readouterr().err
    assert "1/4" in said
    assert said.endswith("\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "soft-mao"}, "unknown method 'soft-mao': did you mean 'soft-moa'"),
        ({"mixture": {"rooter": {}}}, "unknown field of MoAConfig 'rooter': did you mean 'router'"),
        ({"mixture": {"experts": {"9": {"rank": 4}}}}, r"experts\.9 does not exist"),
        ({"max_length": 4}, "max_length 4 cuts away every answer of the rows"),
        (
            {"max_length": 999, "validation": "long.json"},
            "a row takes 3[0-9]+ tokens, and the model reads 256",
        ),
        ({"max_length": 999, "packing": True, "packing_strategy": "wrapped"}, "and the model reads 256"),
        ({"validation": "long.json"}, "max_length 96 cuts away every answer of the held-out rows"),
        ({"model": "./no/such/model"}, "cannot be loaded|does not exist|no model"),
        ({"data": "./no/such/rows.json"}, "does not exist|no such file|not found"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast': give a number"),
        ({"lr_scheduler_type": "cosin"}, "the trainer refuses these settings: .*cosin"),
        ({"data_md5": "0" * 32}, "the rows of .* have MD5 [0-9a-f]{32}, the recipe's data_md5 is 0{32}"),
        ({"validation": 0.99}, "validation holds out 24 of 24 rows: nothing is left"),
        ({"mixture": {"modules_to_save": ["nope"]}}, "modules_to_save has 'nope': no module's name ends so"),
    ],
)
def test_a_recipe_that_cannot_be_followed_leaves_no_folder(
    changes: dict[str, Any], message: str, recipe_of: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.json").write_text(json.dumps([{"instruction": "add " * 300, "output": "1"}]))
    recipe = recipe_of(**changes)
    with pytest.raises(UsageError, match=message):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


def test_no_space_while_saving_leaves_no_half_written_checkpoint(
    recipe_of: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError
    from transformers import Trainer

    def full(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Trainer, "_save_rng_state", full)
    recipe = recipe_of(save_steps=2)
    with pytest.raises(OSError, match="No space left on device") as caught:
        train(recipe)
    assert caught.value.errno == 28
    assert caught.value.filename == recipe.output_dir
    assert {one.name for one in Path(recipe.output_dir).iterdir()} == {"moa_recipe.json"}
