"""Models with another head than a language model's: the head is trained and saved with the mixture, and every token is prompt."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, Trainer, TrainingArguments
from trl import RewardConfig, RewardTrainer

from instance_gates import gates, same
from moa_peft import MoAConfig, UsageError
from tiny import FAMILIES, awaken, largest, tokens
from tiny_lm import byte_tokenizer

LABELS = 3
HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "score", "QUESTION_ANS": "qa_outputs", "FEATURE_EXTRACTION": None}
"""Llama's heads; GPT-2 has "classifier" for TOKEN_CLS."""
CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}
every_task = pytest.mark.parametrize("task", CLASSES)


def model_of(task: str, family: str = "llama", **changes: object) -> Any:
    """A small random model with the head of a task, in evaluation mode."""
    settings = FAMILIES[family].settings | {"num_labels": LABELS} | changes
    config = AutoConfig.for_model(FAMILIES[family].model_type, **settings)
    torch.manual_seed(0)
    name = type(config).__name__.removesuffix("Config") + CLASSES[task]
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def with_mixture(task: str, method: str = "soft-moa", family: str = "llama") -> Any:
    model = get_peft_model(model_of(task, family), MoAConfig.preset(method, task_type=task))
    awaken(model)
    return model.eval()


@torch.no_grad()
def says(model: Any, **call: Any) -> Tensor:
    found: Mapping[str, Any] = model(**call)
    names = ("logits", "start_logits", "last_hidden_state")
    return next(found[name] for name in names if name in found)


def targets(task: str, ids: Tensor) -> dict[str, Tensor]:
    """Labels of a task that a model can learn: the third of the vocabulary that a token is of."""
    thirds = (ids - 1) * LABELS // 97
    if task == "QUESTION_ANS":
        return {"start_positions": ids[:, 0] % ids.shape[1], "end_positions": ids[:, 1] % ids.shape[1]}
    return {"labels": thirds if task == "TOKEN_CLS" else thirds[:, 0]}


def settings(folder: Path, **changes: object) -> dict[str, Any]:
    common = {
        "output_dir": str(folder), "learning_rate": 1e-2, "use_cpu": True, "per_device_train_batch_size": 16, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return common | changes


@pytest.mark.parametrize("method", ["soft-moa", "instance-moa"])
def test_a_classifier_learns_is_saved_with_its_head_and_comes_back_equal(tmp_path: Path, method: str) -> None:
    third = 97 // LABELS
    labels = torch.arange(60) % LABELS
    ids = 1 + labels.unsqueeze(1) * third + torch.randint(third, (60, 6), generator=torch.manual_seed(1))
    rows = [{"input_ids": row.tolist(), "labels": int(label)} for row, label in zip(ids, labels, strict=True)]
    frozen = says(model_of("SEQ_CLS"), input_ids=ids)
    model = get_peft_model(model_of("SEQ_CLS"), MoAConfig.preset(method, task_type="SEQ_CLS"))
    Trainer(
        model=model,
        args=TrainingArguments(**settings(tmp_path, max_steps=24)),
        train_dataset=Dataset.from_list(rows),
    ).train()
    trained = says(model.eval(), input_ids=ids)
    assert (trained.argmax(dim=-1) == labels).float().mean() > 0.9
    assert (frozen.argmax(dim=-1) == labels).float().mean() < 0.9, "or there was nothing to learn"
    with model.disable_adapter():
        assert torch.equal(says(model, input_ids=ids), frozen)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(model_of("SEQ_CLS"), tmp_path / "adapter").eval()
    assert torch.equal(says(again, input_ids=ids), trained)


@every_task
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_is_trained_and_saved_and_the_frozen_model_is_left_alone(
    tmp_path: Path, task: str, family: str
) -> None:
    ids = tokens(4, 6)
    frozen = says(model_of(task, family), input_ids=ids)
    model = get_peft_model(model_of(task, family), MoAConfig.preset("soft-moa", task_type=task))
    before = {name: one.clone() for name, one in model.named_parameters()}
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(3):
        made = model.train()(input_ids=ids, **({} if HEADS[task] is None else targets(task, ids)))
        (made.last_hidden_state.square().mean() if HEADS[task] is None else made.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [n for n, one in model.named_parameters() if one.requires_grad and torch.equal(one, before[n])]
    moved = [
        n for n, one in model.named_parameters() if not one.requires_grad and not torch.equal(one, before[n])
    ]
    assert (still, moved) == ([], [])
    trained = says(model.eval(), input_ids=ids)
    with model.disable_adapter():
        assert torch.equal(says(model, input_ids=ids), frozen)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of(task, family), tmp_path).eval()
    assert torch.equal(says(again, input_ids=ids), trained)


@pytest.mark.parametrize("method", ["instance-moa", "adamole"])
def test_a_reward_model_learns_which_answer_was_chosen(tmp_path: Path, method: str) -> None:
    answers = [("good fine", "bad wrong"), ("fine", "bad"), ("good", "wrong")]
    rows = [
        {"prompt": f"Q{i}? ", "chosen": chosen, "rejected": rejected}
        for i in range(12)
        for chosen, rejected in answers
    ]
    base = model_of("SEQ_CLS", num_labels=1, vocab_size=257, pad_token_id=None, max_position_embeddings=64)
    trainer = RewardTrainer(
        model=base,
        args=RewardConfig(**settings(tmp_path, max_steps=12, max_length=48), gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        peft_config=MoAConfig.preset(method, task_type="SEQ_CLS"),
    )
    trainer.train()
    accuracies = [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry]
    assert sum(accuracies[-4:]) / 4 > 0.9


@every_task
def test_the_prompt_is_every_real_token_whatever_the_labels_say(task: str) -> None:
    """Labels of tokens were read as a language model's: what comes before the first of them was the prompt."""
    # PEFT's wrapper for answers in a text keeps the positions from the model
    model, ids = with_mixture(task, "instance-moa").get_base_model(), tokens(2, 6)
    alone = gates(model, input_ids=ids)
    labels = targets(task, ids)
    if task == "TOKEN_CLS":
        labels["labels"][:, :3] = -100
    if HEADS[task] is not None:
        assert same(gates(model, input_ids=ids, **labels), alone)
    short = gates(model.train(), input_ids=ids[:, :4], use_cache=False)
    for left in (0, 1, 2):
        padded, mask = (F.pad(one, (left, 2 - left)) for one in (ids[:, :4], torch.ones(2, 4).long()))
        call = {
            "input_ids": padded,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        assert same(gates(model, **call), short)
        if task == "SEQ_CLS":  # the last real token's
            assert largest(says(model, **call), says(model, input_ids=ids[:, :4])) < 1e-5
    assert not same(short, alone)


def test_packed_rows_of_a_token_classifier_are_instances_of_their_own() -> None:
    model, first, second = with_mixture("TOKEN_CLS", "instance-moa"), tokens(1, 4), tokens(1, 5, seed=2)
    positions = torch.cat([torch.arange(4), torch.arange(5)]).unsqueeze(0)
    call = {"position_ids": positions, "use_cache": False}
    packed = says(model, input_ids=torch.cat([first, second], dim=1), **call)
    alone = torch.cat([says(model, input_ids=one) for one in (first, second)], dim=1)
    assert (packed - alone).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("model", "task", "match"),
    [
        (
            lambda: model_of("SEQ_CLS"),
            "CAUSAL_LM",
            r"task_type is CAUSAL_LM, .* is a model for SEQ_CLS or TOKEN_CLS: give MoAConfig\(task_type='SEQ_CLS'\)",
        ),
        (lambda: model_of("QUESTION_ANS"), "SEQ_CLS", r"give MoAConfig\(task_type='QUESTION_ANS'\)"),
        (
            lambda: model_of("FEATURE_EXTRACTION"),
            "SEQ_CLS",
            r"give MoAConfig\(task_type='FEATURE_EXTRACTION'\)",
        ),
    ],
)
def test_a_task_that_is_not_the_models_is_refused_before_anything_is_touched(
    model: Callable[[], Any], task: str, match: str
) -> None:
    base = model()
    with pytest.raises(UsageError, match=match):
        get_peft_model(base, MoAConfig.preset("soft-moa", task_type=TaskType(task)))
    assert not hasattr(base, "peft_config")
    assert not any("moa" in name for name, _ in base.named_modules())


def test_a_model_whose_head_is_of_an_unknown_kind_is_refused() -> None:
    class Ranker(transformers.LlamaPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model, self.rank = transformers.LlamaModel(config), torch.nn.Linear(32, 1)

    base = Ranker(model_of("FEATURE_EXTRACTION").config)
    with pytest.raises(UsageError, match="Ranker is no causal language model, and has no head that PEFT"):
        get_peft_model(base, MoAConfig.preset("soft-moa", task_type="FEATURE_EXTRACTION"))


@pytest.mark.usefixtures("any_peft")
@every_task
def test_transformers_own_add_adapter_trains_saves_and_loads_the_head_too(tmp_path: Path, task: str) -> None:
    """It was accepted with a random head that was neither trained nor saved, and then refused."""
    model_of(task).save_pretrained(tmp_path / "base")
    kind, ids = type(model_of(task)), tokens(3, 6)
    model = kind.from_pretrained(tmp_path / "base")
    frozen = says(model, input_ids=ids)
    model.add_adapter(MoAConfig.preset("soft-moa", task_type=task))
    trained = {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad}
    assert (HEADS[task] in trained) is (HEADS[task] is not None)
    awaken(model)
    said = says(model.eval(), input_ids=ids)
    model.save_pretrained(tmp_path / "adapter")
    again = kind.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(says(again, input_ids=ids), said)
    wrapped = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(says(wrapped.eval(), input_ids=ids), said)
    model.disable_adapters()
    assert torch.equal(says(model, input_ids=ids), frozen)
