"""The experiments for PEFT's method comparison, whose runner needs a GPU: what it does to a model, done to a tiny one."""

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from moa_peft import MoAConfig
from tiny import base_model

FOLDER = Path(__file__).parents[2] / "studies" / "peft_comparison" / "experiments" / "moa"
EXPERIMENTS = sorted(one.name for one in FOLDER.iterdir())
LORA_RANK_64 = 18_350_080
"""Of q_proj and v_proj of Llama-3.2-3B: the entry with rsLoRA, the best LoRA of the comparison."""


def llama_32_3b() -> nn.Module:
    config = LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains_as_many_parameters_as_the_entry_that_it_is_compared_with(name: str) -> None:
    config = PeftConfig.from_pretrained(str(FOLDER / name))
    assert isinstance(config, MoAConfig)
    model = get_peft_model(llama_32_3b(), config, low_cpu_mem_usage=True)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert trained == pytest.approx(LORA_RANK_64, rel=0.05)
    rank = int(name.rpartition("rank")[2])
    assert {expert.rank for expert in config.experts if hasattr(expert, "rank")} == {rank}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_the_runner_calls_trains_and_scores_an_experiment(name: str, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(str(FOLDER / name))
    model = get_peft_model(base_model("llama"), config, autocast_adapter_dtype=True)
    trained, _ = model.get_nb_trainable_parameters()
    assert trained
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[1, 6:] = 0
    labels = ids.masked_fill(real == 0, -100)  # the runner trains on the question as well
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        output = model(input_ids=ids, attention_mask=real, labels=labels, num_items_in_batch=int(real.sum()))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    with torch.inference_mode():
        scored = model(input_ids=ids.flip(1), attention_mask=real.flip(1), pad_token_id=2).logits
        settings = GenerationConfig(max_length=14, max_new_tokens=5)
        said = model.generate(
            input_ids=ids.flip(1), attention_mask=real.flip(1), generation_config=settings, pad_token_id=2
        )
    assert torch.isfinite(scored).all()
    assert said.shape[1] > ids.shape[1]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 4 * trained
