"""Exact numbers of trainable parameters at the paper's sizes, built on the meta device."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moa_peft import MoAConfig

LLAMA_31_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


def trainable(model_class: type, config: object, method: str, router: str) -> int:
    with torch.device("meta"):
        base = model_class(config)
    model = get_peft_model(base, MoAConfig.preset(method, router={"kind": router}))
    assert isinstance(model, PeftModel)
    assert all(p.device.type == "meta" for p in model.parameters())
    return model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("method", "router", "count"),
    [
        ("soft-moa", "swiglu", 24_520_288),
        ("soft-moa", "linear", 18_089_696),
        ("sparse-moa", "swiglu", 22_289_120),
        ("sparse-moa", "linear", 16_777_952),
    ],
)
def test_llama_31_8b_has_exactly_the_papers_number_of_trainable_parameters(
    method: str, router: str, count: int
) -> None:
    assert trainable(LlamaForCausalLM, LLAMA_31_8B, method, router) == count


def test_qwen3_8b_sparse_moa_has_the_published_24_485_thousand_trainable_parameters() -> None:
    assert round(trainable(Qwen3ForCausalLM, QWEN3_8B, "sparse-moa", "swiglu") / 1000) == 24_485
