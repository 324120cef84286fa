"""Parameter groups: their rates, their decay, and that they are the same after a run is resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from moa_peft import (
    DoraExpert,
    IA3Expert,
    LoraExpert,
    MoAConfig,
    PromptExpert,
    RouterConfig,
    UsageError,
    VeraExpert,
    parameter_groups,
    preset_names,
)
from moa_peft.errors import LibraryError
from moa_peft.training.prepare import prepare
from moa_peft.training.recipe import Recipe
from moa_peft.training.run import run, train
from tiny import base_model

RecipeOf = Callable[..., Recipe]
RATE = 1e-3


def mixture(config: MoAConfig) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base_model("llama"), config)


def by_group(groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    return {one["name"]: {name for name, _ in one["params"]} for one in groups}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    ids = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


MORE_KINDS = MoAConfig(
    experts=[
        DoraExpert(targets=["q_proj"]),
        VeraExpert(targets=["v_proj"]),
        IA3Expert(targets=["k_proj"]),
        PromptExpert(),
        LoraExpert(targets=["o_proj"], num_experts=2, router=RouterConfig(gate="softmax")),
    ]
)


@pytest.mark.parametrize(
    "config", [*map(MoAConfig.preset, preset_names()), MORE_KINDS], ids=[*preset_names(), "more"]
)
def test_every_trainable_parameter_is_in_exactly_one_group(config: MoAConfig) -> None:
    model = mixture(config)
    named = [name for one in parameter_groups(model, learning_rate=RATE) for name, _ in one["params"]]
    assert sorted(named) == sorted(name for name, one in model.named_parameters() if one.requires_grad)
    held = [one for group in parameter_groups(model, learning_rate=RATE) for _, one in group["params"]]
    assert len({id(one) for one in held}) == len(held)


def test_each_role_has_the_group_that_its_name_says() -> None:
    found = by_group(parameter_groups(mixture(MoAConfig.preset("sparse-moa")), learning_rate=RATE))
    assert found.keys() == {"weights", "lora_b", "router", "undecayed"}
    assert all(name.endswith(".B") for name in found["lora_b"])
    assert all("router" in name for name in found["router"])
    assert any("gate.threshold" in name for name in found["router"])
    assert not any("bias" in name or "router" in name for name in found["weights"])
    assert all(name.endswith("bias") for name in found["undecayed"])
    more = by_group(parameter_groups(mixture(MORE_KINDS), learning_rate=RATE))
    assert {name.rsplit(".", 1)[-1] for name in more["undecayed"]} == {
        "magnitude",
        "d",
        "b",
        "offset",
        "vectors",
        "head_scale",
    }


def test_a_router_with_a_factor_moves_further_and_the_experts_first_step_is_unchanged() -> None:
    moved, first = {}, {}
    for factor in (1.0, 10.0):
        model = mixture(MoAConfig.preset("soft-moa"))
        for name, one in model.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(one, std=0.1)  # gates have a gradient from the first step on
        start = trained(model)
        groups = parameter_groups(model, learning_rate=RATE, router_lr_factor=factor)
        optimizer = torch.optim.AdamW(groups)
        step(model, optimizer)
        first[factor] = {name: one for name, one in trained(model).items() if ".router." not in name}
        for number in range(1, 20):
            step(model, optimizer, number)
        routers = [name for name in start if ".router." in name]
        moved[factor] = sum((trained(model)[name] - start[name]).norm() for name in routers)
    assert moved[10.0] > 5 * moved[1.0]
    for name, one in first[1.0].items():
        assert torch.equal(one, first[10.0][name]), name


def test_lora_plus_moves_b_alone_by_its_factor() -> None:
    changes = {}
    for factor in (1.0, 4.0):
        model = mixture(MoAConfig.preset("lora"))
        start = trained(model)
        optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=RATE, lora_b_lr_factor=factor))
        step(model, optimizer)
        changes[factor] = {name: one - start[name] for name, one in trained(model).items()}
    for name, change in changes[1.0].items():
        factor = 4 if name.endswith(".B") else 1
        torch.testing.assert_close(changes[4.0][name], factor * change)
        assert not name.endswith(".B") or change.abs().max() > 0


def test_a_parameter_that_is_not_decayed_keeps_its_bits_where_its_gradient_is_zero() -> None:
    model = mixture(MoAConfig.preset("sparse-moa"))
    for one in model.parameters():
        if one.requires_grad:
            nn.init.normal_(one)
    start = trained(model)
    groups = parameter_groups(model, learning_rate=RATE, weight_decay=0.5)
    for group in groups:
        for _, one in group["params"]:
            one.grad = torch.zeros_like(one)
    found = by_group(groups)
    torch.optim.AdamW(groups).step()  # it changes the groups
    kept = {name for name, one in trained(model).items() if torch.equal(one, start[name])}
    assert kept == found["router"] | found["undecayed"]


@pytest.mark.parametrize("name", ["router_lr_factor", "lora_b_lr_factor"])
def test_a_factor_that_is_not_above_0_is_refused(name: str, recipe_of: RecipeOf) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0: give a number above 0"):
        parameter_groups(nn.Linear(1, 1), learning_rate=RATE, **{name: 0})
    for wrong in (-1.0, True, "much", float("nan")):
        with pytest.raises(UsageError, match=f"{name} is {wrong!r}: give a number above 0"):
            recipe_of(**{name: wrong})


def optimizer_groups(folder: str) -> list[dict[str, Any]]:
    [state] = sorted(Path(folder).glob("checkpoint-*/optimizer.pt"))[-1:]
    return torch.load(state)["param_groups"]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_groups_are_those_of_the_uninterrupted_run_after_a_resume(
    recipe_of: RecipeOf, accumulation: int, tmp_path: Path
) -> None:
    trainer = {
        "max_steps": 6,
        "save_steps": 3,
        "gradient_accumulation_steps": accumulation,
        "weight_decay": 0.1,
        "save_total_limit": None,
    }
    settings: dict[str, Any] = {
        "method": "soft-moa",
        "router_lr_factor": 10.0,
        "lora_b_lr_factor": 2.0,
        **trainer,
    }
    whole = train(recipe_of(output_dir=str(tmp_path / "whole"), **settings)).output_dir
    cut = tmp_path / "cut"
    preparation = prepare(recipe_of(output_dir=str(cut), **settings))

    class StopError(Exception): ...

    saved = preparation.trainer._save_checkpoint

    def save_and_stop(*args: Any, **kwargs: Any) -> None:
        saved(*args, **kwargs)
        raise StopError

    preparation.trainer._save_checkpoint = save_and_stop
    with pytest.raises(LibraryError, match="StopError"):
        run(preparation)
    train(recipe_of(output_dir=str(cut), resume=True, **settings))
    first, second = optimizer_groups(whole), optimizer_groups(str(cut))
    assert first == second
    assert [one["name"] for one in first] == ["weights", "lora_b", "router", "undecayed"]
    assert [one["initial_lr"] / 1e-2 for one in first] == pytest.approx([1, 2, 10, 1])
    assert [one["weight_decay"] for one in first] == [0.1, 0.1, 0, 0]
    one, other = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_optimizer_that_groups_by_itself_is_refused(
    recipe_of: RecipeOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = prepare(recipe_of(router_lr_factor=2.0)).trainer
    by_layer = (torch.optim.SGD, {"optimizer_dict": {}})  # as GaLore's, which is not installed here
    monkeypatch.setattr(SFTTrainer, "get_optimizer_cls_and_kwargs", lambda *_: by_layer)
    with pytest.raises(
        UsageError, match="it groups the parameters itself, so router_lr_factor would have no effect"
    ):
        trainer.create_optimizer()


def test_the_groups_go_into_transformers_trainer_as_an_optimizer(tmp_path: Path) -> None:
    model = mixture(MoAConfig.preset("soft-moa"))
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=RATE, router_lr_factor=10))
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    rates = {one["name"]: one["initial_lr"] for one in trainer.optimizer.param_groups}
    assert rates["router"] == pytest.approx(10 * rates["weights"])
