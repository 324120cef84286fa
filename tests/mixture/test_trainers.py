"""transformers' Trainer, TRL's SFTTrainer and continuous batching take a mixture as they take any PEFT method."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from moa_peft import MoAConfig
from tiny import base_model, mixture_model, tokens
from tiny_lm import byte_tokenizer, tiny_llama


def rows(count: int = 16) -> Dataset:
    ids = tokens(count, 12)
    return Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids])


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def settings(folder: Path, **changes: object) -> dict[str, object]:
    common = {
        "output_dir": str(folder), "max_steps": 8, "learning_rate": 2e-2, "logging_steps": 1, "use_cpu": True,
        "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return common | changes


@pytest.mark.parametrize("method", ["soft-moa", "sparse-moa"])
def test_transformers_trainer_trains_saves_and_resumes_it(tmp_path: Path, method: str) -> None:
    model = get_peft_model(base_model("llama"), MoAConfig.preset(method))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=4)),
        train_dataset=rows(),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    again = get_peft_model(base_model("llama"), MoAConfig.preset(method))
    resumed = Trainer(
        model=again,
        args=TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=4)),
        train_dataset=rows(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trained, retrained = dict(model.named_parameters()), dict(again.named_parameters())
    assert not [name for name in trained if not torch.equal(trained[name], retrained[name])]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trls_sft_trainer_takes_the_config_with_and_without_packing(
    tmp_path: Path, packing: bool, checkpointing: bool
) -> None:
    texts = [{"prompt": f"What is {i} + 1? ", "completion": f"{i + 1}"} for i in range(16)]
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            **settings(tmp_path, packing=packing, max_length=48, gradient_checkpointing=checkpointing),
            packing_strategy="wrapped" if packing else "bfd",
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=byte_tokenizer(),
        peft_config=MoAConfig.preset("soft-moa"),
    )
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["everything", "instance-moa"])
def test_continuous_batching_gives_the_greedy_tokens_of_plain_generation(method: str) -> None:
    model = mixture_model("llama", method)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (4, 7, 5, 6, 3)]

    def alone(prompt: list[int], end: int) -> list[int]:
        ids = torch.tensor([prompt])
        out: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=end,
        )
        return out[0, len(prompt) :].tolist()

    end = alone(prompts[0], -1)[2]  # the first request ends early, so that another starts among running ones
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=end)
    batching = ContinuousBatchingConfig(
        allow_block_sharing=False,
        max_requests_per_batch=3,
        page_size=4,
        num_blocks=32,  # by itself it takes nearly all memory, which two tests at once do not find
        max_batch_tokens=64,
    )
    outputs = model.get_base_model().generate_batch(
        inputs=prompts, generation_config=greedy, continuous_batching_config=batching
    )
    together = {tuple(one.prompt_ids): one.generated_tokens for one in outputs.values()}
    assert [list(together[tuple(prompt)]) for prompt in prompts] == [alone(prompt, end) for prompt in prompts]
