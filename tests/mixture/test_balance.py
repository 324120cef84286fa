"""The balance loss reaches the gradients, the right one, whatever the training loop does around the model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    DefaultFlowCallback,
    StaticCache,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import trainer as trainer_module
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from trl import SFTConfig, SFTTrainer

from moa_peft import LoraExpert, MoAConfig, PromptExpert, RouterConfig, UsageError, mixture_layers
from moa_peft.mixture.balance_scaling import BalanceLossScale, give_to_trainers, set_loss_scale
from moa_peft.mixture.router import Router
from tiny import awaken, base_model, largest, mixture_model, tokens
from tiny_lm import byte_tokenizer, tiny_llama

COEFFICIENT = 3.0
"""Large, so that the balance loss is no small part of any gradient."""


def top_k(balance: float | None, keep: int = 2) -> RouterConfig:
    return RouterConfig(kind="linear", gate="top-k", keep=keep, balance=balance)


def block_config(balance: float | None) -> MoAConfig:
    """A router of each block over four experts."""
    return MoAConfig(
        experts=[LoraExpert(targets=("q_proj", "v_proj", "down_proj"), rank=2), PromptExpert(length=3)],
        router=top_k(balance),
    )


def copies_config(balance: float | None) -> MoAConfig:
    """Routers of copies at projections and at the attention, of both gates that have the loss by default."""
    adaptive = RouterConfig(kind="linear", gate="threshold", balance=balance)
    return MoAConfig(
        experts=[
            LoraExpert(targets=("q_proj", "down_proj"), rank=2, num_experts=4, router=top_k(balance)),
            LoraExpert(targets=("v_proj",), rank=2, num_experts=3, router=adaptive),
            PromptExpert(length=3, num_experts=2, router=top_k(balance, keep=1)),
        ],
        router=None,
    )


CONFIGS: dict[str, Callable[[float | None], MoAConfig]] = {"block": block_config, "copies": copies_config}
everywhere = pytest.mark.parametrize("where", CONFIGS)


@pytest.fixture(autouse=True)
def untouched_trainers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test sees the trainers' callbacks and accelerate's state as a new process does."""
    monkeypatch.setattr(trainer_module, "DEFAULT_CALLBACKS", [DefaultFlowCallback])
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def mixture(where: str, balance: float | None = COEFFICIENT) -> PeftModel:
    """A model in training mode and float64."""
    model = get_peft_model(base_model("llama"), CONFIGS[where](balance))
    assert isinstance(model, PeftModel)
    awaken(model)
    return exact(model).train()


def exact(model: PeftModel) -> PeftModel:
    """Make a model compute in float64 throughout; its norms would not, and differences of gradients would show it."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(norm_in_full, module)
    return model.double()


def norm_in_full(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def routers(model: nn.Module) -> dict[str, Router]:
    return {
        f"{path}.{name}": router
        for path, layer in mixture_layers(model)
        for name, router in layer.mixtures()["default"].routers().items()
    }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that have gathered, which are taken away."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained(model).items()
    }
    model.zero_grad()
    return found


def backward(model: nn.Module, scale: float = 1.0, **inputs: Any) -> None:
    """Backpropagate a model loss of 0, so that the gradients are the balance loss's alone."""
    (model(**inputs).logits.sum() * 0.0 * scale).backward()


def alone(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    backward(model, **inputs)
    return gradients(model)


def by_hand(model: nn.Module, rows: list[Tensor]) -> dict[str, Tensor]:
    """The balance loss's gradient for one batch, written out from what each router reads of each row alone.

    Args:
        model: The model; it is run in evaluation mode, where no loss is attached.
        rows: Token ids [T] of each row, without padding.
    """
    read: dict[Router, list[Tensor]] = {router: [] for router in routers(model).values()}
    hooks = [
        router.register_forward_pre_hook(lambda module, args: read[module].append(args[0][0]))
        for router in read
    ]
    model.eval()
    for row in rows:
        model(input_ids=row.unsqueeze(0))
    model.train()
    for hook in hooks:
        hook.remove()
    total = torch.zeros((), dtype=torch.float64)
    for router, pieces in read.items():
        x = torch.cat(pieces)  # [tokens, D]
        weights: dict[str, Tensor] = dict(router.named_parameters())
        logits = x @ weights["logits.linear_weight"].T + weights["logits.linear_bias"]
        share = logits.softmax(-1)
        experts = logits.shape[-1]
        if router.config.gate == "top-k":
            assert router.config.keep is not None
            given = torch.zeros_like(share).scatter(-1, logits.topk(router.config.keep).indices, 1.0)
        else:
            threshold = torch.sigmoid(x @ weights["gate.threshold_weight"].T + weights["gate.threshold_bias"])
            share = share - threshold / experts
            given = (share > 0).double()
        total = total + router.balance * experts * (given.mean(0) * share.mean(0)).sum()
    parameters = trained(model)
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if one is None else one
        for (name, p), one in zip(parameters.items(), found, strict=True)
    }


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """Every gradient is equal to within a part of its largest entry, and every router has one."""
    assert found.keys() == expected.keys()
    wrong = [
        name
        for name in found
        if (found[name] - expected[name]).abs().max() > tolerance * expected[name].abs().max()
    ]
    assert not wrong
    assert all(one.abs().max() > 0 for name, one in expected.items() if "router" in name and "weight" in name)


def mean(many: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in many]).mean(0) for name in many[0]}


def ragged(lengths: tuple[int, ...] = (11, 4, 7)) -> list[Tensor]:
    return [tokens(1, length, seed=length)[0] for length in lengths]


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Token ids, mask and positions; padding is any token. A prompt's attention depends on the position."""
    width = max(len(row) for row in rows)
    ids, mask = tokens(len(rows), width, seed=99), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, where], mask[number, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def packed(rows: list[Tensor]) -> dict[str, Any]:
    """All rows in one, without a mask: the positions begin again at each."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return {
        "input_ids": torch.cat(rows).unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "use_cache": False,
    }


# Which tokens are real


@pytest.mark.parametrize("method", ["topk-moe-lora", "instance-moa", "soft-moa"])
def test_a_mask_for_a_whole_cache_of_fixed_size_is_read_from_the_calls_own_columns(method: str) -> None:
    """It was read from its end, where no token is real yet: gates of a zero vector."""
    model = mixture_model("llama", method)
    ids, mask = tokens(3, 11), torch.zeros(3, 20, dtype=torch.long)
    mask[:, :11] = 1
    mask[0, :4] = mask[1, :2] = 0
    losses: list[float] = []
    for _, layer in mixture_layers(model):
        layer.observer = lambda record: losses.append(
            -1.0 if record.balance_loss is None else record.balance_loss.item()
        )
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask[:, :11]).logits
        before, losses[:] = [*losses], []
        cache = StaticCache(config=model.get_base_model().config, max_cache_len=20)
        found = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    real = mask[:, :11].bool()
    assert largest(found[real], plain[real]) < 1e-4
    assert losses == pytest.approx(before)


def test_the_new_token_of_a_padded_row_is_real_in_a_mask_of_four_dimensions() -> None:
    """Its place among the keys was taken for the first one, which is padding."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    told: dict[str, list[float]] = {}
    for kind in ("dynamic", "static"):
        model, losses = mixture_model("llama", "topk-moe-lora"), told.setdefault(kind, [])
        for _, layer in mixture_layers(model):
            layer.observer = lambda record, losses=losses: losses.append(record.balance_loss.item())
        settings = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **settings)
    assert told["static"] == pytest.approx(told["dynamic"])


def test_a_model_without_values_can_run_in_training_mode() -> None:
    with torch.device("meta"):
        model = get_peft_model(base_model("llama"), MoAConfig.preset("topk-moe-lora")).train()
    model = model.to("meta")
    assert model(input_ids=tokens(1, 5).to("meta"), labels=tokens(1, 5).to("meta")).loss.is_meta


# One batch


@everywhere
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
def test_the_gradient_is_that_of_the_loss_under_every_kind_of_checkpointing(
    where: str, checkpointing: str | None
) -> None:
    model = mixture(where)
    ids = tokens()
    expected = by_hand(model, list(ids))
    calls: list[Router] = []
    for router in routers(model).values():
        router.register_forward_pre_hook(lambda module, _: calls.append(module))
    if checkpointing is not None:
        model.get_base_model().enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    assert_same(alone(model, input_ids=ids), expected)
    assert len(calls) == len(routers(model)) * (1 if checkpointing is None else 2)


@everywhere
def test_it_adds_to_the_models_own_gradient_and_leaves_the_logits_as_they_are(where: str) -> None:
    ids = tokens()
    model, without = mixture(where), mixture(where, 0.0)
    outputs, plain = model(input_ids=ids, labels=ids), without(input_ids=ids, labels=ids)
    assert torch.equal(outputs.logits, plain.logits)
    assert outputs.loss == plain.loss
    outputs.loss.backward()
    plain.loss.backward()
    own = gradients(without)
    extra = {name: one - own[name] for name, one in gradients(model).items()}
    assert_same(extra, by_hand(model, list(ids)))


@everywhere
@pytest.mark.parametrize("form", ["right", "left", "packed"])
def test_padding_never_counts_and_packed_rows_count_as_padded_ones(where: str, form: str) -> None:
    model = mixture(where)
    rows = ragged()
    inputs = packed(rows) if form == "packed" else padded(rows, form)
    assert_same(alone(model, **inputs), by_hand(model, rows))


def test_a_packed_instance_counts_once_as_a_padded_one() -> None:
    config = block_config(COEFFICIENT)
    config.router = replace(top_k(COEFFICIENT), granularity="instance")
    model = get_peft_model(base_model("llama"), config)
    awaken(model)
    model.double().train()
    for call in (found := [packed(ragged()), padded(ragged(), "right")]):
        call["labels"] = torch.full_like(call["input_ids"], -100)  # all of it is prompt
    one_row, three_rows = (alone(model, **call) for call in found)
    assert_same(one_row, three_rows)


@everywhere
def test_evaluation_mode_adds_nothing(where: str) -> None:
    model = mixture(where).eval()
    assert not any(one.any() for one in alone(model, input_ids=tokens()).values())


@pytest.mark.parametrize("preset", ["topk-moe-lora", "adamole"])
def test_the_presets_have_the_coefficient_of_the_official_code(preset: str) -> None:
    model = get_peft_model(base_model("llama"), MoAConfig.preset(preset))
    found = routers(model)
    assert len(found) == 2 * 5
    assert {router.balance for router in found.values()} == {0.001}
    awaken(model)
    backward(model.train(), input_ids=tokens())
    assert all(one.any() for name, one in gradients(model).items() if "router" in name)


# Trainers


class Spy(TrainerCallback):
    """Keeps what the model was given in each batch, at which scale, and the gradient of each optimiser step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.batches: list[dict[str, Tensor]] = []
        self.scales: list[float] = []
        self.steps: list[dict[str, Tensor]] = []
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        self.batches.append(
            {"input_ids": ids, "attention_mask": kwargs.get("attention_mask", torch.ones_like(ids))}
        )
        scale = next(iter(routers(module).values())).loss_scale
        self.scales.append(float("nan") if scale is None else float(scale))

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in trained(self.model).items()
            }
        )

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.hook.remove()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A learning rate of 0 keeps the weights, so that every step's gradient is taken at the same place."""
    common = {
        "output_dir": str(folder), "num_train_epochs": 2, "learning_rate": 0.0, "optim": "sgd", "use_cpu": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    return common | changes


def id_rows(count: int = 14) -> Dataset:
    lengths = [4 + number % 5 for number in range(count)]
    rows = [tokens(1, length, seed=number)[0].tolist() for number, length in enumerate(lengths)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def right_padded(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = padded([torch.tensor(one["input_ids"]) for one in features], "right")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def plain_trainer(folder: Path, where: str, balance: float, **changes: Any) -> Trainer:
    return Trainer(
        model=mixture(where, balance),
        args=TrainingArguments(**settings(folder, **changes)),
        train_dataset=id_rows(),
        data_collator=right_padded,
    )


def sft_trainer(folder: Path, where: str, balance: float, **changes: Any) -> Trainer:
    """The trainer makes the mixture itself."""
    texts = [{"prompt": f"What is {3**i} + 1? ", "completion": f"{3**i + 1}"} for i in range(14)]
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            **settings(folder, max_length=48, gradient_checkpointing=where == "copies", **changes)
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=byte_tokenizer(),
        peft_config=CONFIGS[where](balance),
    )
    assert isinstance(trainer.model, PeftModel)
    awaken(trainer.model)
    exact(trainer.model)
    return trainer


def train(trainer: Trainer, **how: Any) -> Spy:
    assert isinstance(trainer.model, nn.Module)
    spy = Spy(trainer.model)
    trainer.add_callback(spy)
    trainer.train(**how)
    return spy


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize("kind", [plain_trainer, sft_trainer])
def test_a_trainers_step_has_the_mean_of_its_batches_gradients_also_at_the_end_of_an_epoch(
    tmp_path: Path, where: str, kind: Callable[..., Trainer]
) -> None:
    """Seven batches an epoch and four a step: the second step of each epoch has three."""
    trainer = kind(tmp_path, where, COEFFICIENT)
    spy = train(trainer)
    without = train(kind(tmp_path, where, 0.0))
    assert isinstance(trainer.model, nn.Module)
    assert [one["input_ids"].tolist() for one in spy.batches] == [
        one["input_ids"].tolist() for one in without.batches
    ]
    assert len(spy.batches) == 14
    assert len(spy.steps) == 4
    each = [
        by_hand(trainer.model, [ids[real.bool()] for ids, real in zip(*one.values(), strict=True)])
        for one in spy.batches
    ]
    batches = (each[:4], each[4:7], each[7:11], each[11:])
    for of_step, step, plain in zip(batches, spy.steps, without.steps, strict=True):
        extra = {name: one - plain[name] for name, one in step.items()}
        assert_same(extra, mean(of_step))
    assert {router.loss_scale for router in routers(trainer.model).values()} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("skips", [True, False])
def test_a_resumed_run_knows_which_steps_are_incomplete(tmp_path: Path, skips: bool) -> None:
    whole, rest = [1 / 4] * 4, [1 / 3] * 3
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = train(plain_trainer(tmp_path, "block", COEFFICIENT, **saving))
    assert first.scales == pytest.approx(whole + rest + whole + rest)
    again = plain_trainer(tmp_path, "block", COEFFICIENT, **saving, ignore_data_skip=not skips)
    resumed = train(again, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    expected = rest + whole + rest if skips else whole + rest + whole
    assert resumed.scales == pytest.approx(expected)


def test_rows_without_an_end_have_no_incomplete_step(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, "block", COEFFICIENT, max_steps=2)
    trainer.train_dataset = id_rows(40).to_iterable_dataset()
    assert train(trainer).scales == pytest.approx([1 / 4] * 8)


# Who tells the scale


def test_a_mixture_with_the_loss_gives_the_callback_to_trainers_once_and_others_do_not() -> None:
    get_peft_model(base_model("llama"), MoAConfig.preset("molora"))
    mixture("block", 0.0)
    assert [DefaultFlowCallback] == trainer_module.DEFAULT_CALLBACKS
    model = mixture("block")
    model.add_adapter("second", copies_config(None))
    assert [DefaultFlowCallback, BalanceLossScale] == trainer_module.DEFAULT_CALLBACKS


def test_the_callback_leaves_a_model_without_a_mixture_alone(tmp_path: Path) -> None:
    give_to_trainers()
    ids = tokens(4)
    trainer = Trainer(
        model=base_model("llama"),
        args=TrainingArguments(**settings(tmp_path)),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()]),
    )
    assert [type(one) for one in trainer.callback_handler.callbacks].count(BalanceLossScale) == 1
    trainer.train()


@pytest.mark.parametrize("given", [False, True])
def test_accumulation_in_a_trainer_older_than_the_mixture_needs_the_callback(
    tmp_path: Path, given: bool
) -> None:
    model = base_model("llama")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings(tmp_path)),
        train_dataset=id_rows(),
        data_collator=right_padded,
    )
    model.add_adapter(block_config(COEFFICIENT))  # transformers' own way, after the trainer
    if given:
        trainer.add_callback(BalanceLossScale())
        trainer.train()
        return
    with pytest.raises(
        UsageError, match="over how many batches gradients are accumulated: give your Trainer"
    ):
        trainer.train()


def test_accelerates_own_accumulation_gives_the_mean_by_itself() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = mixture("block")
    batches = [tokens(2, 9, seed=seed) for seed in (1, 2)]
    for ids in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids).logits.sum() * 0.0)
    assert_same(gradients(model), mean([by_hand(model, list(ids)) for ids in batches]))


def test_a_loop_of_ones_own_says_the_scale_and_can_take_it_back() -> None:
    model = mixture("copies")
    ids = tokens()
    full = alone(model, input_ids=ids)
    set_loss_scale(model, 0.25)
    assert_same({name: 4 * one for name, one in alone(model, input_ids=ids).items()}, full)
    set_loss_scale(model, None)
    assert_same(alone(model, input_ids=ids), full)


def half_precision(model: nn.Module, scaler: torch.amp.GradScaler | None) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(input_ids=tokens()).logits.float().mean() * 0.0
    (loss if scaler is None else scaler.scale(loss)).backward()
    return gradients(model)


def begin_step(model: nn.Module, optimizer: Any) -> None:
    """What a trainer with fp16 calls; none scales without a GPU."""
    args: Any = SimpleNamespace(gradient_accumulation_steps=1, ignore_data_skip=False, fp16=True)
    state, control = TrainerState(), TrainerControl()
    callback = BalanceLossScale()
    callback.on_train_begin(args, state, control, model=model, train_dataloader=[0, 1, 2])
    callback.on_step_begin(args, state, control, optimizer=optimizer)


class DeepSpeedLike(AcceleratedOptimizer):
    """As accelerate's wrapper of DeepSpeed's optimizer, which scales the loss by itself."""


def test_fp16_on_a_cpu_where_nothing_scales_the_loss_is_not_refused() -> None:
    """It was, with words about DeepSpeed; accelerate trains in float32 there."""
    Accelerator(cpu=True)  # its optimizer asks for that state
    model = mixture("block").float()
    begin_step(model, AcceleratedOptimizer(torch.optim.SGD(model.parameters())))
    assert {float(one.loss_scale) for one in routers(model).values() if one.loss_scale is not None} == {1.0}


def test_the_gradient_scaler_of_fp16_scales_the_balance_loss_too() -> None:
    model = mixture("block").float()
    set_loss_scale(model, 1.0)
    expected = half_precision(model, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    begin_step(model, SimpleNamespace(scaler=scaler))
    scaled = half_precision(model, scaler)
    assert_same({name: one / 1024 for name, one in scaled.items()}, expected, tolerance=1e-2)


def test_fp16_whose_scale_nobody_knows_is_refused() -> None:
    Accelerator(cpu=True)
    model = mixture("block").float()
    with pytest.raises(UsageError, match="by what fp16's gradient scaler multiplies the loss"):
        half_precision(model, None)
    with pytest.raises(UsageError, match="no gradient scaler that the balance loss could follow"):
        begin_step(model, DeepSpeedLike(torch.optim.SGD(model.parameters())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(model, input_ids=tokens())  # no scaler


def test_a_compiled_router_follows_the_scale_as_a_plain_one_does() -> None:
    model = mixture("block")
    router = next(iter(routers(model).values()))
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    state = GradientState(GradientAccumulationPlugin(num_steps=1))
    for scale, steps in ((None, 1), (None, 2), (torch.tensor(0.25), 1)):
        router.loss_scale = scale
        state.plugin_kwargs["num_steps"] = steps
        found: list[dict[str, Tensor]] = []
        for run in (router, compiled):
            (run(x).gates.sum() * 0.0).backward()
            found.append(gradients(router))
        assert found[0]["logits.linear_weight"].any()
        assert_same(found[1], found[0])


# What it is for


@pytest.mark.slow
@everywhere
def test_a_router_trained_with_it_has_a_flatter_load_than_one_without(where: str) -> None:
    """All routers begin by giving nearly every token to their first expert."""

    def largest_share(balance: float) -> float:
        model = mixture(where, balance).float()
        for router in routers(model).values():
            bias = dict(router.named_parameters())["logits.linear_bias"]
            bias.data[0] = 4.0
        optimizer = torch.optim.Adam(trained(model).values(), lr=3e-2)
        ids = tokens(8, 12)
        for _ in range(60):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        shares: list[float] = []
        for _, layer in mixture_layers(model):
            layer.observer = lambda record: shares.append(
                (record.gates.sum((0, 1)) / record.gates.sum()).max().item()
            )
        model.eval()(input_ids=ids)
        return sum(shares) / len(shares)

    with_loss, without = largest_share(0.3), largest_share(0.0)
    assert with_loss < without - 0.1
