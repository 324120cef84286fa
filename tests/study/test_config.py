from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from moa_peft.cli.overrides import load_yaml, parse_flags
from moa_peft.errors import UsageError
from moa_peft.study.config import StudyConfig, studies_of
from moa_peft.study.schedule import Run, recipe_of
from moa_peft.training.recipe import build_peft_config
from moa_peft.training.trainer_settings import check_trainer

ROOT = Path(__file__).parents[2]
LEAST: dict[str, Any] = {"out": "o", "data": "d", "methods": ["soft-moa", "lora"], "baseline": "lora"}


def config(**changes: Any) -> StudyConfig:
    return StudyConfig.from_mapping({**LEAST, **changes})


def test_a_method_is_called_by_its_name_unless_it_has_a_label() -> None:
    made = config(methods=["soft-moa", {"method": "lora", "label": "lora-r16"}], baseline="lora-r16")
    assert made.labels() == ["soft-moa", "lora-r16"]


def test_folders_may_be_those_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = config(out="~/o", data_root="~/d")
    assert (made.out, made.data_root) == (f"{tmp_path}/o", f"{tmp_path}/d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown study key 'sedes': did you mean 'seeds'"),
        (
            {"out": None, "data": None},
            "the study has no out and no data: give --config FILE with it, or --out VALUE",
        ),
        ({"trainer": 5}, "trainer is 5: give fields, each as NAME: VALUE"),
        ({"trainer": {5: 1}}, r"trainer is \{5: 1\}: give fields, each as NAME: VALUE"),
        (
            {"methods": ["lora", {"method": "soft-moa", "trainer": 5}]},
            "soft-moa: trainer is 5: give fields",
        ),
        (
            {"methods": ["lora", {"method": "soft-moa", "mixture": [1]}]},
            r"soft-moa: mixture is \[1\]: give fields",
        ),
        ({"methods": ["lora", None]}, "methods holds None: give entries, each with method: NAME"),
        ({"methods": ["lora", 5]}, "methods holds 5: give entries, each with method: NAME"),
        ({"methods": ["lora", {"method": 5}]}, "method is 5: give text"),
        ({"methods": ["lora", {"method": "lora", "label": 16}]}, "label is 16: give text"),
        ({"learning_rates": [1, 2], "most_rates": 1}, "most_rates is 1: learning_rates has 2 already"),
        ({"most_rates": 0}, "most_rates is 0: give a whole number of at least 1"),
        ({"tuning_limit": 9, "train_limit": 8}, "tuning_limit is 9: give at most train_limit, 8"),
        ({"finalists": ["loar"]}, "unknown finalist 'loar': did you mean 'lora'"),
        ({"finalists": "lora, loar"}, "unknown finalist 'loar': did you mean 'lora'"),
        ({"finalists": [1]}, r"finalists is \[1\]: give names"),
        ({"mode": "likely"}, "unknown mode 'likely': did you mean 'likelihood'"),
        (
            {"methods": ["lora", {"method": "soft-moa", "router_lr_factor": 0}]},
            "soft-moa: router_lr_factor is 0: give a number above 0",
        ),
        ({"data_md5": ["a"]}, r"data_md5 is \['a'\]: give fields"),
        ({"data_md5": {"train": 5}}, "data_md5.train is 5: give text"),
        ({"tasks": None}, "tasks is None: give names, as a list or with commas between"),
        ({"tasks": 5}, "tasks is 5: give names"),
        ({"tasks": ["first", 5]}, r"tasks is \['first', 5\]: give names"),
        ({"model": 5}, "model is 5: give text"),
        ({"out": 5}, "out is 5: give text"),
        ({"baseline": 16}, "baseline is 16: give text"),
        ({"validation": 5}, "validation is 5: give text"),
        ({"learning_rates": [float("inf")]}, r"learning_rates is \[inf\]: give a list of numbers above 0"),
        ({"learning_rates": [10**400]}, "give a list of numbers above 0"),
        ({"methods": "lora"}, "methods is 'lora': give a list of entries, each with method: NAME"),
        ({"methods": [{"methd": "lora"}]}, "unknown field of a method 'methd': did you mean 'method'"),
        ({"methods": ["lora", "lora"]}, "the label 'lora' stands twice"),
        (
            {"methods": [{"method": "lora", "label": "a/b"}], "baseline": "a/b"},
            "label is 'a/b': give letters",
        ),
        (
            {"methods": [{"method": "lora", "label": "frozen"}], "baseline": "frozen"},
            "which is the bare model",
        ),
        (
            {"methods": ["lora", {"method": "lora", "label": "again"}]},
            "'lora' and 'again' are the same method: their runs would be one",
        ),
        (
            {"methods": ["lora", "soft-moa"], "finalists": ["soft-moa"]},
            "the baseline 'lora' is no finalist: nothing could be compared with it",
        ),
        ({"baseline": "loar"}, "unknown baseline 'loar': did you mean 'lora'"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]: give each seed once"),
        ({"tuning_seeds": []}, r"tuning_seeds is \[\]: give a list of whole numbers"),
        ({"learning_rates": [0]}, r"learning_rates is \[0\]: give a list of numbers above 0"),
        ({"learning_rates": [1, 1]}, "give each rate once"),
        ({"test_limit": 0}, "test_limit is 0: give a whole number of at least 1"),
        ({"choose_by": "loss"}, "unknown choose_by 'loss'"),
        ({"template": "papr"}, "unknown template 'papr': did you mean 'paper'"),
        (
            {"trainer": {"learning_rate": 1}},
            "trainer.learning_rate: give learning_rates, the same for every method",
        ),
        (
            {"methods": ["lora", {"method": "soft-moa", "trainer": {"learning_rate": 1}}]},
            "soft-moa: trainer.learning_rate: give learning_rates, the same for every method",
        ),
        ({"trainer": {"eos_token": "x"}}, "trainer.eos_token: the model's own tokenizer"),
        ({"trainer": {"seed": 1}}, "trainer.seed: it is no field of the trainer"),
        (
            {"trainer": {"train_sampling_strategy": "group_by_length"}},
            "methods would meet the rows in different orders; give random or sequential",
        ),
        (
            {"methods": ["lora", {"method": "soft-moa", "trainer": {"num_train_epochs": 9}}]},
            "soft-moa: trainer.num_train_epochs must be that of the other methods",
        ),
        *(
            (
                {"methods": ["lora", {"method": "soft-moa", "trainer": {name: value}}]},
                f"soft-moa: trainer.{name} must be that of the other methods: give it once, in the study's trainer",
            )
            for name, value in (
                ("train_sampling_strategy", "sequential"),
                ("data_seed", 7),
                ("shuffle_dataset", True),
                ("packing", True),
                ("packing_strategy", "wrapped"),
                ("dataloader_drop_last", True),
                ("dataloader_in_order", False),
                ("ignore_data_skip", True),
                ("accelerator_config", {"split_batches": True}),
            )
        ),
        (
            {"trainer": {"auto_find_batch_size": True}},
            "trainer.auto_find_batch_size: a method that needs more memory would get smaller batches",
        ),
        (
            {"methods": ["lora", {"method": "soft-moa", "trainer": {"auto_find_batch_size": True}}]},
            "trainer.auto_find_batch_size: a method that needs more memory would get smaller batches",
        ),
        (
            {"methods": ["lora", {"method": "soft-moa", "trainer": {"per_device_train_batch_size": 1}}]},
            "soft-moa: per_device_train_batch_size times gradient_accumulation_steps differs",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)


def test_an_empty_out_is_refused_with_domains_too() -> None:
    """The study ran in the folder None/math."""
    settings = {**LEAST, "out": None, "domains": {"math": {}}}
    with pytest.raises(UsageError, match="the study has no out"):
        studies_of(settings, {})


def test_an_empty_key_of_fields_is_as_one_left_out() -> None:
    """`trainer:` with every line below it commented out ended in a traceback."""
    entry = {"method": "lora", "label": None, "mixture": None, "trainer": None}
    assert config(methods=["soft-moa", entry], trainer=None, data_md5=None) == config()


def test_a_method_may_share_the_batch_out_otherwise() -> None:
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    made = config(methods=["lora", {"method": "soft-moa", "trainer": split}])
    assert made.trainer_of(made.methods[1])["per_device_train_batch_size"] == 4


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_method_of_a_committed_study_can_be_built(file: Path) -> None:
    flags = parse_flags(
        ["--train_limit", "300", "--tuning_limit", "100", "--test_limit=25", "--out", "elsewhere"]
    )
    made = studies_of(load_yaml(file), flags)
    assert all((one.train_limit, one.test_limit) == (300, 25) for one in made)
    assert {Path(one.out).parts[0] for one in made} == {"elsewhere"}
    for study, one in ((each, one) for each in made for one in each.methods):
        run = Run(label=one.label, method=one, learning_rate=1e-3, seed=0)
        recipe = recipe_of(study, run, data="d", data_md5=None, folder="f")
        check_trainer(recipe)
        build_peft_config(recipe)


SMOLLM2 = LlamaConfig(
    vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
    num_key_value_heads=3,
)  # fmt: skip
QWEN3_06B = Qwen3Config(
    vocab_size=64, hidden_size=1024, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
"""One block, which has the same ratios as all of them."""


@pytest.mark.parametrize(("name", "shape"), [("cpu", SMOLLM2), ("gpu", QWEN3_06B)])
def test_the_methods_of_a_study_have_loras_number_of_parameters_within_5_percent(
    name: str, shape: PretrainedConfig
) -> None:
    """Those of the paper's size, which end in 8x8, have more."""
    studies = studies_of(load_yaml(ROOT / "studies" / f"{name}.yaml"), {})
    counts = {}
    for one in {one.label: one for study in studies for one in study.methods}.values():
        run = Run(label=one.label, method=one, learning_rate=1e-3, seed=0)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(shape)
        recipe = recipe_of(studies[0], run, data="d", data_md5=None, folder="f")
        model = get_peft_model(base, build_peft_config(recipe))
        counts[one.label] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    off = {
        label: count / counts["lora-s1"] - 1 for label, count in counts.items() if not label.endswith("8x8")
    }
    assert {label: share for label, share in off.items() if abs(share) > 0.05} == {}
    assert len(counts) - len(off) == 4
