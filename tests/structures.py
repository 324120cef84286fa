"""Tiny models of every structure that a decoder block may have: other mixers, routed MLPs, fused layers, other names."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moa_peft import MoAConfig, mixture_layers
from tiny import awaken, largest, tokens

VOCABULARY = 97
DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS = DENSE | {"head_dim": 8}
ALIKE = {name: value for name, value in DENSE.items() if name != "num_key_value_heads"}
ROUTED = HEADS | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SHARED = ROUTED | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 12, "kv_lora_rank": 12, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
PER_LAYER = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, HEADS) for name in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3", "smollm3", "granite",
        "cohere", "cohere2", "olmo", "olmo3", "glm", "glm4", "ernie4_5", "stablelm",
        "starcoder2", "nemotron", "ministral3", "bitnet", "nanochat", "doge", "diffllama", "arcee", "helium",
        "hunyuan_v1_dense", "exaone4",
    )},
    "seed_oss": ("seed_oss", HEADS | NO_DROPOUT | {"residual_dropout": 0.0}),
    "phi": ("phi", HEADS | NO_DROPOUT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "opt": ("opt", ALIKE | {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt_neox": ("gpt_neox", ALIKE | NO_DROPOUT),
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "codegen": ("codegen", GPT | {"rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", GPT | {"multi_query": True}),
    "gpt_bigcode without multi_query": ("gpt_bigcode", GPT | {"multi_query": False}),
    "bloom": ("bloom", ALIKE | NO_DROPOUT | {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", ALIKE | NO_DROPOUT | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon, new": ("falcon", ALIKE | NO_DROPOUT | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    "persimmon": ("persimmon", ALIKE | NO_DROPOUT),
    "mixtral": ("mixtral", ROUTED),
    "olmoe": ("olmoe", ROUTED),
    "qwen2_moe": ("qwen2_moe", ROUTED | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}),
    "qwen3_moe": ("qwen3_moe", ROUTED | {"decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    "glm4_moe": ("glm4_moe", SHARED),
    "deepseek_v2": ("deepseek_v2", SHARED | LATENT),
    "deepseek_v3": ("deepseek_v3", SHARED | LATENT),
    "minicpm3": ("minicpm3", DENSE | LATENT),
    "ernie4_5_moe": ("ernie4_5_moe", ROUTED | {
        "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_num_shared_experts": 1,
    }),
    "gpt_oss": ("gpt_oss", ROUTED | {"layer_types": SLIDING["layer_types"]}),
    "minimax": ("minimax", ROUTED | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    "minimax_m2": ("minimax_m2", ROUTED),
    "llama4_text": ("llama4_text", ROUTED | {
        "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 32,
    }),
    "lfm2": ("lfm2", DENSE | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": ("qwen3_next", ROUTED | DELTA | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}),
    "qwen3_5_text": ("qwen3_5_text", HEADS | DELTA),
    "granitemoehybrid": ("granitemoehybrid", ROUTED | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16}),
    "bamba": ("bamba", HEADS | MAMBA | {"attn_layer_indices": [1], "attn_rotary_emb": 8}),
    "falcon_h1": ("falcon_h1", HEADS | MAMBA | {"mamba_d_ssm": 64}),
    "jamba": ("jamba", ROUTED | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4,
    }),
    "mamba2": ("mamba2", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8,
        "n_groups": 1, "expand": 2, "chunk_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }),
    "nemotron_h": ("nemotron_h", HEADS | {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2,
    }),
    "gemma3n_text": ("gemma3n_text", HEADS | SLIDING | PER_LAYER | {
        "laurel_rank": 4, "altup_num_inputs": 2, "intermediate_size": [40, 40], "activation_sparsity_pattern": [0.0, 0.0],
    }),
    "gemma4_text": ("gemma4_text", HEADS | SLIDING | PER_LAYER | {"global_head_dim": 8}),
}  # fmt: skip
"""Model types and settings, by the name of a structure."""


def text_model(name: str) -> PreTrainedModel:
    """A small random model of a structure, in evaluation mode, whose weights are wide enough to make its tokens matter."""
    model_type, settings = TEXT[name]
    torch.manual_seed(0)
    return widened(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    )


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with wide weights, and generation that does not stop early."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 or not parameter.isfinite().all():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    return model.eval()


def check_mixture(name: str, config: MoAConfig, folder: Path) -> None:
    """Assert what must hold of a mixture in a structure.

    A fresh one is almost silent, a disabled one is the frozen model bit for bit, every weight is reached and every expert
    heard, a reloaded one is equal, checkpointed gradients are bit-equal; the cache and padding change greedy tokens only where
    they change the base model's, and likewise padding the logits of a call that names no positions.

    Args:
        name: Of `TEXT`.
        config: The mixture's.
        folder: An empty one, for the saved adapter.
    """
    base, ids = text_model(name), tokens(2, 9)
    base.requires_grad_(False)  # Jamba's recurrence rounds by that on some CPUs
    with torch.no_grad():
        frozen = base(input_ids=ids).logits
    base_is = {
        "cached": torch.equal(greedy(base, ids), greedy(base, ids, use_cache=False)),
        "padded": not any(one.any() for one in padded(base)),
        "shifted": shifted(base) < 1e-5,
    }
    model = get_peft_model(base, config)
    with torch.no_grad():
        assert largest(model(input_ids=ids).logits, frozen) < 1e-2, "a fresh mixture is silent"
    awaken(model)
    heard: set[str] = set()
    layers = [layer for _, layer in mixture_layers(model)]
    for index, layer in enumerate(layers):
        layer.change_observer = lambda record, index=index: heard.add(f"{index} {record.expert}")
    model.eval()
    with torch.no_grad():
        awake = model(input_ids=ids).logits
        assert largest(awake, frozen) > 1e-3
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, frozen)
    assert heard == {
        f"{i} {expert}" for i, one in enumerate(layers) for expert in one.mixtures()["default"].names
    }
    for layer in layers:
        layer.change_observer = None
    if base_is["cached"]:
        assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))
    if base_is["padded"]:
        assert not any(one.any() for one in padded(model))
    if base_is["shifted"]:
        assert shifted(model) < 1e-4, "padding on the left counts as positions"
    model.save_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(
            PeftModel.from_pretrained(text_model(name), folder).eval()(input_ids=ids).logits, awake
        )
    plain = gradients(model, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(model, ids)
    assert [n for n, one in plain.items() if one is None] == [], "every weight is reached"
    assert all(torch.equal(one, checkpointed[n]) for n, one in plain.items())


def greedy(model: nn.Module, ids: Tensor, mask: Tensor | None = None, *, use_cache: bool = True) -> Tensor:
    given = torch.ones_like(ids) if mask is None else mask
    generate: Any = model.generate
    made = generate(
        input_ids=ids,
        attention_mask=given,
        max_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )
    return made[:, ids.shape[1] :]


def padded(model: nn.Module) -> list[Tensor]:
    """Greedy tokens of two rows alone and left-padded in one batch."""
    rows = [tokens(1, length, seed=length) for length in (5, 9)]
    batch = torch.cat([nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    together = greedy(model, batch, (batch != 0).long())
    return [greedy(model, row)[0] - made for row, made in zip(rows, together, strict=True)]


@torch.no_grad()
def shifted(model: nn.Module) -> float:
    """How much padding on the left changes logits, in a call that names no positions, as TRL's GRPO makes it."""
    batch, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    together = model(input_ids=batch, attention_mask=mask, use_cache=False).logits[:1, 4:]
    return largest(together, model(input_ids=batch[:1, 4:], use_cache=False).logits)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
