"""Models that read pictures: the mixture goes into the language model alone, and learns from pictures in TRL's SFTTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from instance_gates import gates, same
from moa_peft import MoAConfig, mixture_layers
from moa_peft.mixture.placement import find_placements
from pictures import BUILD, IDS, IMAGE, model_of, picture, processor_of
from structures import shifted
from tiny import awaken, largest, tokens

EYES = ("vision_tower", "vision_model", "visual")
"""What families call the vision tower."""
every_family = pytest.mark.parametrize("family", BUILD)


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Questions of unequal length on pictures of two kinds."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{'So? ' * (i % 3)}What?"}],
            "completion": [{"role": "assistant", "content": "cat" if i % 2 else "dog"}],
            "images": [picture(i % 2)],
        }
        for i in range(count)
    ]


def batch_of(family: str, some: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What TRL gives the model for rows."""
    collator = DataCollatorForVisionLanguageModeling(processor_of(family), completion_only_loss=True)
    return dict(collator([{**one} for one in some]))  # it changes them


def with_mixture(family: str, method: str) -> Any:
    model = get_peft_model(model_of(family), MoAConfig.preset(method))
    awaken(model)
    return model.eval()


def trainer_of(family: str, folder: Path, data: list[dict[str, Any]], **given: Any) -> SFTTrainer:
    settings = {
        "output_dir": str(folder), "max_steps": 3, "learning_rate": 2e-2, "logging_steps": 1, "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return SFTTrainer(
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(data),
        processing_class=processor_of(family),
        **given,
    )


@every_family
def test_the_language_model_alone_gets_experts_and_nothing_is_left_out(family: str) -> None:
    model, config = model_of(family), MoAConfig.preset("soft-moa")
    assert [one.left_out for one in find_placements(model, config)] == [()]
    get_peft_model(model, config)
    layers = [name.rpartition(".layers.")[0] for name, _ in mixture_layers(model)]
    assert layers == ["model.text_model" if "text_model" in layers[0] else "model.language_model"] * 2


@every_family
def test_padding_on_the_left_counts_as_no_position(family: str) -> None:
    """Gemma 3 gives its language model masks of four dimensions."""
    assert shifted(with_mixture(family, "soft-moa")) < 1e-4


@pytest.mark.slow
@every_family
def test_a_mixture_learns_from_pictures_in_trls_trainer_and_comes_back_equal(
    tmp_path: Path, family: str
) -> None:
    frozen, batch = model_of(family), batch_of(family, rows())
    tower: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        tower.append(output[0].detach())

    def says(model: Any) -> Tensor:
        (eyes,) = [m for n, m in model.named_modules() if n.rpartition(".")[2] in EYES]
        handle = eyes.register_forward_hook(note)
        with torch.no_grad():
            logits = model(**batch).logits
        handle.remove()
        return logits

    expected = says(frozen)
    trainer = trainer_of(
        family, tmp_path, rows(), model=model_of(family), peft_config=MoAConfig.preset("soft-moa")
    )
    model: Any = trainer.model
    before = {name: one.clone() for name, one in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {name for name, one in model.named_parameters() if one.requires_grad}
    trained = says(model.eval())
    with model.disable_adapter():
        assert torch.equal(says(model), expected)
    assert all(torch.equal(one, tower[0]) for one in tower[1:])
    model.save_pretrained(tmp_path)
    assert torch.equal(says(PeftModel.from_pretrained(model_of(family), tmp_path).eval()), trained)


def test_a_wrapped_model_and_a_conversation_train_as_well(tmp_path: Path) -> None:
    talks = [{"messages": [*one["prompt"], *one["completion"]], "images": one["images"]} for one in rows()]
    wrapped = get_peft_model(model_of("gemma3"), MoAConfig.preset("soft-moa"))
    trainer = trainer_of("gemma3", tmp_path, talks, model=wrapped)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3


@every_family
def test_instance_gates_take_the_tokens_of_pictures_as_tokens_of_the_prompt(family: str) -> None:
    model, some = with_mixture(family, "instance-moa"), rows()
    batch = batch_of(family, some)
    together = gates(model, **batch)
    for row, one in enumerate(some):
        assert same(gates(model, **batch_of(family, [one])), together[row : row + 1]), (
            "padding counts for nothing"
        )
    length = (batch["labels"] != -100).int().argmax(dim=1)
    assert (batch["input_ids"] == IDS[IMAGE]).sum(dim=1).min() >= 4, "a picture is several tokens"
    told = {name: one for name, one in batch.items() if name != "labels"}
    assert same(gates(model, prompt_length=length, **told), together)
    other = [{**one, "images": [picture(7)]} for one in some]
    assert (gates(model, **batch_of(family, other)) - together).abs().amax(dim=(1, 2)).min() > 1e-3


@every_family
def test_greedy_tokens_after_pictures_do_not_depend_on_cache_batch_or_padding(family: str) -> None:
    model, processor = with_mixture(family, "instance-moa"), processor_of(family)

    def asked(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": one["prompt"][0]["content"]}],
                    }
                ]
            )
            for one in some
        ]
        images = [one["images"] for one in some]
        return dict(
            processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        )

    def greedy(some: list[dict[str, Any]], **more: Any) -> Tensor:
        call = asked(some)
        made = model.generate(**call, max_new_tokens=5, do_sample=False, pad_token_id=IDS["<pad>"], **more)
        return made[:, call["input_ids"].shape[1] :]

    some = rows(3)
    together = greedy(some)
    assert torch.equal(greedy(some, use_cache=False), together)
    assert torch.equal(torch.cat([greedy([one]) for one in some]), together)


def test_gates_are_the_same_in_calls_of_the_inner_models() -> None:
    """Gemma 3 gives its language model masks of 4 dimensions, in which the tokens of a picture see one another."""
    model = with_mixture("gemma3", "instance-moa").get_base_model()
    batch = {name: one for name, one in batch_of("gemma3", rows()).items() if name != "labels"}
    assert same(gates(model.model, **batch), gates(model, **batch))


def test_packed_rows_with_the_positions_of_a_qwen_vl_are_instances_of_their_own() -> None:
    """Only positions of 2 dimensions were read, so that all sequences of a row had the gates of their common mean."""
    model, first, second = with_mixture("qwen3_vl", "instance-moa"), tokens(1, 4), tokens(1, 5, seed=2)
    positions = torch.cat([torch.arange(4), torch.arange(5)]).expand(4, 1, -1)  # text, time, height, width
    ids = torch.cat([first, second], dim=1)
    with torch.no_grad():
        packed = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).logits
        alone = [model(input_ids=one, labels=one, use_cache=False).logits for one in (first, second)]
    assert largest(packed, torch.cat(alone, dim=1)) < 1e-5
