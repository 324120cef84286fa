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


def trainable(model_class: type, config: object, method: str, router: dict[str, str] | None = None) -> int:
    with torch.device("meta"):
        base = model_class(config)
    model = get_peft_model(base, MoAConfig.preset(method, router=router or {}))
    assert isinstance(model, PeftModel)
    assert all(p.device.type == "meta" for p in model.parameters())
    return model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("method", "router", "count"),
    [
        ("soft-moa", {"kind": "swiglu"}, 24_520_288),
        ("soft-moa", {"kind": "linear"}, 18_089_696),
        ("sparse-moa", {"kind": "swiglu"}, 22_289_120),
        ("sparse-moa", {"kind": "linear"}, 16_777_952),
        ("lora", None, 23_068_672),
        ("molora", None, 100_139_008),
        ("topk-moe-lora", None, 100_140_288),
        ("hydralora", None, 45_088_768),
        ("adamole", None, 101_123_488),
        (
            "unipeft",
            None,
            17_565_280,
        ),  # the official count; there a third of the gates' 393,312 are dead, here none
        ("parallel-adapter", None, 4_325_888),
        ("prompt-tuning", None, 1_311_744),
        ("instance-moa", None, 24_520_288),
    ],
)
def test_llama_31_8b_has_exactly_the_published_number_of_trainable_parameters(
    method: str, router: dict[str, str] | None, count: int
) -> None:
    assert trainable(LlamaForCausalLM, LLAMA_31_8B, method, router) == count


def test_qwen3_8b_sparse_moa_has_the_published_24_485_thousand_trainable_parameters() -> None:
    assert round(trainable(Qwen3ForCausalLM, QWEN3_8B, "sparse-moa") / 1000) == 24_485
