import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig

from moa_peft.cli.overrides import load_yaml
from moa_peft.errors import UsageError
from moa_peft.mixture.presets import find_preset
from moa_peft.training.recipe import (
    DEFAULT_METHOD,
    REFUSED,
    TRAINER_DEFAULTS,
    Recipe,
    build_peft_config,
    factors_of,
    merge,
    own_fields,
)
from moa_peft.training.trainer_settings import (
    build_settings,
    check_trainer,
    field_docs,
    switch_names,
    trainer_fields,
)

FIELDS = {"learning_rate", "packing", "logging_steps"}
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_keys_are_sorted_into_the_recipes_and_the_trainers() -> None:
    recipe = Recipe.from_mapping({"data": "demo", "output_dir": "x", "learning_rate": 1.0}, FIELDS)
    assert recipe.data == "demo"
    assert recipe.trainer == {"learning_rate": 1.0}
    flat = recipe.to_mapping()
    assert flat["learning_rate"] == 1.0
    assert flat["save_steps"] == TRAINER_DEFAULTS["save_steps"]
    assert "trainer" not in flat


def test_a_recipe_written_down_is_read_back_the_same() -> None:
    recipe = Recipe(
        data="demo", output_dir="x", mixture={"router": {"kind": "linear"}}, trainer={"bf16": True}
    )
    again = Recipe.from_mapping(recipe.to_mapping(), trainer_fields())
    assert again.to_mapping() == recipe.to_mapping()


def test_the_factors_are_the_recipes_own_or_those_of_its_method() -> None:
    given = {"data": "demo", "output_dir": "x", "router_lr_factor": 2.0, "lora_b_lr_factor": 3.0}
    own = factors_of(Recipe(**given))
    assert own == {"router_lr_factor": 2.0, "lora_b_lr_factor": 3.0}
    default = Recipe(data="demo", output_dir="x")
    assert default.method == DEFAULT_METHOD
    assert factors_of(default) == find_preset(DEFAULT_METHOD).lr_factors == {"router_lr_factor": 5.0}
    assert default.to_mapping()["router_lr_factor"] == 5.0, "it is written down"
    assert factors_of(Recipe(data="demo", output_dir="x", method="soft-moa")) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"outputdir": "x"},
            "unknown recipe key 'outputdir': did you mean 'output_dir'\\? known: data, output_dir,",
        ),
        ({"learning_rat": 1}, "unknown recipe key 'learning_rat': did you mean 'learning_rate'"),
        ({"lr": 1}, "unknown recipe key 'lr': did you mean 'learning_rate'"),
        ({"trainer": {}}, "unknown recipe key 'trainer'"),
        ({"output_dir": "x"}, "the recipe has no data: give --data VALUE"),
        ({}, "the recipe has no data and no output_dir"),
    ],
)
def test_an_unknown_or_missing_key_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.from_mapping(settings, FIELDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "alpaca"}, "template is 'alpaca': give 'paper' or 'chat'"),
        ({"max_length": 1}, "max_length is 1: give a whole number of at least 2"),
        ({"max_length": None}, "max_length is None: give a whole number"),
        ({"limit": 0}, "limit is 0: give a whole number of at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"validation": 1}, "validation is 1: give a data source, or a share of the rows between 0 and 1"),
        ({"validation": 1.5}, r"validation is 1\.5"),
        ({"validation": True}, "validation is True"),
        ({"validation": ["a.jsonl"]}, r"validation is \['a.jsonl'\]: give a data source, or a share"),
        ({"data": 3}, "data is 3: give text"),
        ({"data_split": ["train"]}, r"data_split is \['train'\]: give text"),
        ({"output_dir": ""}, "output_dir is '': give text"),
        ({"mixture": "linear"}, "mixture is 'linear': give fields, as in --mixture.router.kind linear"),
        ({"resume": ""}, "resume is '': give true, false or the path of a checkpoint"),
        ({"resume": 3}, "resume is 3"),
        ({"seed": -1, "limit": 0}, "limit is 0: .*; seed is -1"),
    ],
)
def test_wrong_values_are_reported_all_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**{"data": "demo", "output_dir": "x", **changes})


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_trainer_field_without_meaning_here_is_refused_with_what_to_do(key: str) -> None:
    with pytest.raises(UsageError, match=f"recipe: {key}: .*(use|leave it out|upload)"):
        Recipe(data="demo", output_dir="x", trainer={key: "x"})
    assert key in trainer_fields(), "the trainer has no such field: the entry is out of date"


def test_every_default_is_a_field_of_the_trainer_and_passes_its_check() -> None:
    check_trainer(Recipe(data="demo", output_dir="x", trainer=dict(TRAINER_DEFAULTS)))
    settings = build_settings(Recipe(data="demo", output_dir="x"), has_validation=True, cuda=False)
    for name, value in TRAINER_DEFAULTS.items():
        if name not in (
            "save_total_limit",
            "report_to",
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
        ):
            assert getattr(settings, name) == value, name
    assert settings.report_to == []
    assert settings.save_total_limit is None
    assert not settings.logging_nan_inf_filter
    assert not settings.dataloader_pin_memory
    assert settings.eval_strategy == "epoch"
    assert not settings.bf16


def test_the_recipes_own_values_go_before_the_defaults() -> None:
    recipe = Recipe(
        data="demo", output_dir="x", seed=7, trainer={"learning_rate": 0.5, "eval_strategy": "no"}
    )
    settings = build_settings(recipe, has_validation=True, cuda=True)
    assert (settings.learning_rate, settings.seed, settings.eval_strategy) == (0.5, 7, "no")
    assert settings.dataloader_pin_memory


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("learning_rate", "fast", "a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", -1, "a number from 0"),
        ("learning_rate", float("nan"), "a number from 0"),
        ("per_device_train_batch_size", 0, "a whole number of at least 1"),
        ("gradient_accumulation_steps", 0, "a whole number of at least 1"),
        ("gradient_accumulation_steps", 1.5, "a whole number"),
        ("weight_decay", -0.1, "a number from 0"),
        ("adam_beta2", 1.5, "a number from 0 to below 1"),
        ("num_train_epochs", 0, "a number above 0"),
        ("save_steps", 0, "a number above 0"),
        ("max_grad_norm", float("inf"), "a number from 0"),
        ("max_steps", 1.5, "a whole number"),
        ("packing", "yes", "true or false"),
        ("run_name", 3, "text or null"),
        ("save_total_limit", "all", "a whole number or null"),
        ("max_steps", None, "a whole number"),
    ],
)
def test_a_trainer_value_of_the_wrong_kind_is_named(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value!r}: give {wanted}"):
        check_trainer(Recipe(data="demo", output_dir="x", trainer={name: value}))


@pytest.mark.parametrize(
    "trainer",
    [
        {"max_grad_norm": 0},
        {"max_steps": 3, "num_train_epochs": -1},
        {"save_strategy": "no", "save_steps": 0},
        {"logging_strategy": "epoch", "logging_steps": 0},
        {"eval_strategy": "epoch", "eval_steps": 0},
        {"warmup_steps": 0.1, "eval_steps": None},
    ],
)
def test_a_number_that_the_trainer_does_not_look_at_or_knows_is_not_refused(trainer: dict[str, Any]) -> None:
    check_trainer(Recipe(data="demo", output_dir="x", trainer=trainer))


def test_a_trainer_value_that_the_trainer_refuses_is_passed_on() -> None:
    recipe = Recipe(data="demo", output_dir="x", trainer={"optim": "adamm"})
    with pytest.raises(UsageError, match=r"the trainer refuses these settings: .*adamm"):
        build_settings(recipe, has_validation=False, cuda=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bf16_without_a_gpu_says_what_to_do() -> None:
    recipe = Recipe(data="demo", output_dir="x", trainer={"bf16": True})
    with pytest.raises(
        UsageError, match=r"bf16 is true and no device here takes it: leave it out, or add use_cpu"
    ):
        build_settings(recipe, has_validation=False, cuda=False)
    on_cpu = Recipe(data="demo", output_dir="x", trainer={"bf16": True, "use_cpu": True})
    assert build_settings(on_cpu, has_validation=False, cuda=False).bf16


def test_switches_are_the_fields_that_take_true() -> None:
    assert {"resume", "packing", "bf16", "gradient_checkpointing"} <= switch_names()
    assert not {"learning_rate", "data", "report_to", "max_steps"} & switch_names()


def test_every_field_of_the_recipe_has_a_doc_line() -> None:
    docs = field_docs(Recipe)
    assert set(docs) == {one.name for one in dataclasses.fields(Recipe)} == {*own_fields(), "trainer"}
    assert docs["seed"].startswith("Seed of the adapter's initial weights")
    assert "\n" not in "".join(docs.values())
    assert all(text in " ".join(inspect.getsource(Recipe).split()) for text in docs.values())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_of_the_project_can_be_read(file: Path) -> None:
    recipe = Recipe.from_mapping(load_yaml(file), trainer_fields())
    check_trainer(recipe)
    assert isinstance(build_peft_config(recipe), PeftConfig)
    changes = {"bf16": False, "gradient_checkpointing": False}  # bf16 asks for a device that has it
    recipe = dataclasses.replace(recipe, trainer={**recipe.trainer, **changes})
    build_settings(recipe, has_validation=False, cuda=False)


def test_the_mixture_changes_single_fields_of_the_method() -> None:
    recipe = Recipe(
        data="demo",
        output_dir="x",
        method="sparse-moa",
        mixture={
            "router": {"threshold": {"maximum": 0.3}},
            "experts": {"0": {"rank": 4}},
            "layers_to_transform": [1],
        },
    )
    start = build_peft_config(Recipe(data="demo", output_dir="x", method="sparse-moa")).to_dict()
    changed = build_peft_config(recipe).to_dict()
    assert changed["router"]["threshold"]["maximum"] == 0.3
    assert changed["router"]["kind"] == start["router"]["kind"]
    assert changed["experts"][0] == start["experts"][0] | {"rank": 4}
    assert changed["experts"][1:] == start["experts"][1:]
    assert changed["layers_to_transform"] == [1]


def test_the_mixture_can_bring_its_own_experts() -> None:
    experts = [{"kind": "lora", "targets": ["q_proj"], "rank": 2, "alpha": 2}]
    recipe = Recipe(data="demo", output_dir="x", mixture={"experts": experts})
    (expert,) = build_peft_config(recipe).to_dict()["experts"]
    assert (expert["kind"], expert["rank"]) == ("lora", 2)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"router": {"knd": "linear"}}, "unknown router field 'knd': did you mean 'kind'"),
        ({"expert": []}, "unknown field of MoAConfig 'expert': did you mean 'experts'"),
        ({"experts": [{"kind": "lorra"}]}, "unknown expert 'lorra': did you mean 'lora'"),
    ],
)
def test_an_unknown_field_of_the_mixture_is_named(mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_peft_config(Recipe(data="demo", output_dir="x", mixture=mixture))


def test_a_number_of_a_file_and_of_a_flag_are_the_same_key() -> None:
    """The recipe that a run writes held "0" twice, and only the last was read."""
    merged = merge({"experts": {0: {"rank": 4}}}, {"experts": {"0": {"alpha": 8}}})
    assert merged == {"experts": {0: {"rank": 4, "alpha": 8}}}


def test_merging_changes_neither_argument_and_goes_into_lists_by_number() -> None:
    settings: dict[str, Any] = {"a": {"b": 1, "c": 2}, "list": [{"x": 1}, {"x": 2}], "d": 3}
    changes: dict[str, Any] = {"a": {"b": 5}, "list": {"1": {"y": 7}}, "d": {"e": 1}}
    merged = merge(settings, changes)
    assert merged == {"a": {"b": 5, "c": 2}, "list": [{"x": 1}, {"x": 2, "y": 7}], "d": {"e": 1}}
    assert settings == {"a": {"b": 1, "c": 2}, "list": [{"x": 1}, {"x": 2}], "d": 3}
    with pytest.raises(UsageError, match=r"list\.2 does not exist: list has entries 0 to 1"):
        merge(settings, {"list": {"2": {}}})
