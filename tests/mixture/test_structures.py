"""Every structure of blocks that a mixture can be placed in, and what must hold in each."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrOCRConfig,
    TrOCRForCausalLM,
)

from moa_peft import ArchitectureConfig, LoraExpert, MoAConfig, RouterConfig, UsageError, mixture_layers
from moa_peft.mixture import architecture
from moa_peft.mixture.families import FUSED_ATTENTION
from moa_peft.mixture.placement import find_placements
from structures import DENSE, GPT, LATENT, SHARED, TEXT, check_mixture, text_model
from tiny import FAMILIES, awaken, base_model, mixture_model, tokens

LORA = MoAConfig(
    experts=[LoraExpert(targets=["q_proj", "k_proj", "v_proj", "o_proj"])],
    router=RouterConfig(router_input="block"),
)
CONFIGS = {
    "diffllama": "sparse-moa",
    "exaone4": "soft-moa",
    "mamba2": LORA,
    "opt": LORA,
    **dict.fromkeys(
        ("gptj", "codegen", "gpt_bigcode without multi_query", "bloom", "falcon", "falcon, new", "mpt"),
        "soft-lora",
    ),
}
"""Those that cannot take Soft MoA, and what they take."""


def config_of(name: str) -> MoAConfig:
    config = CONFIGS.get(name, "soft-moa")
    return MoAConfig.preset(config) if isinstance(config, str) else config


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_a_mixture_holds_in_every_structure(name: str, tmp_path: Path) -> None:
    check_mixture(name, config_of(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soft-moa", "molora"])
def test_a_mixture_holds_where_the_number_of_heads_is_the_blocks_own(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger Gemma 4 have fewer key heads where attention is full: their config has no single number to read."""
    model_type, settings = TEXT["gemma4_text"]
    own = {"attention_k_eq_v": True, "num_key_value_heads": 2, "num_global_key_value_heads": 1}
    monkeypatch.setitem(TEXT, "gemma4_text, global heads", (model_type, settings | own))
    check_mixture("gemma4_text, global heads", MoAConfig.preset(method), tmp_path)


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_moe", "lfm2", "falcon, new", "deepseek_v3"])
def test_a_mixture_learns_in_every_kind_of_block(name: str) -> None:
    model, ids = get_peft_model(text_model(name), config_of(name)), tokens(2, 9)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-2)
    losses: list[float] = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("name", "kinds", "left_out"),
    [
        (
            "qwen3_5_text",
            ["linear attention, MLP", "attention, MLP"],
            {"prompt attention": "no softmax attention"},
        ),
        ("gpt_oss", ["attention, routed MLP"], {"lora down_proj": "routed experts are stacked"}),
        (
            "jamba",
            ["state space, MLP", "attention, routed MLP"],
            {"lora o_proj": "a kernel of its state space"},
        ),
        ("deepseek_v3", ["latent attention, MLP", "latent attention, routed MLP"], {}),
        ("falcon_h1", ["state space, attention, MLP"], {}),
        ("nemotron_h", ["state space", "attention", "MLP"], {"parallel_adapter mlp": "it has no MLP"}),
        ("olmoe", ["attention, routed MLP"], {"lora down_proj": "routed experts are stacked"}),
    ],
)
def test_what_has_no_place_is_left_out_with_the_reason(
    name: str, kinds: list[str], left_out: dict[str, str]
) -> None:
    found = find_placements(text_model(name), MoAConfig.preset("soft-moa"))
    assert [one.kind for one in found] == kinds
    said = " ".join(text for one in found for text in one.left_out)
    assert all(expert in said and why in said for expert, why in left_out.items())
    assert bool(said) is bool(left_out)


@pytest.mark.parametrize(
    ("name", "method", "match"),
    [
        ("mamba2", "prompt-tuning", "expert 'prompt' cannot work on mamba2: it has no softmax attention"),
        ("mamba2", "sparse-moa", "expert 'parallel_adapter' cannot work on mamba2: it has no MLP"),
        (
            "diffllama",
            "soft-moa",
            "expert 'prompt' cannot work on diffllama: its attention has a norm 'groupnorm'",
        ),
        ("bloom", "soft-moa", "expert 'prompt' cannot work on bloom: its attention does not go through"),
        ("opt", "parallel-adapter", "the layers of its MLP are the block's own"),
        ("qwen3_5_text", "adamole", "has no softmax attention, which is told which tokens are real"),
    ],
)
def test_what_no_block_can_have_is_refused_by_name(name: str, method: str, match: str) -> None:
    base = text_model(name)
    before = [module for module, _ in base.named_modules()]
    with pytest.raises(UsageError, match=match):
        get_peft_model(base, MoAConfig.preset(method))
    assert [module for module, _ in base.named_modules()] == before


def test_a_prompt_is_refused_where_the_mask_depends_on_the_implementations_name() -> None:
    """DeepSeek V3.2 attends to few tokens only where its config says eager or sdpa: all were attended to, with the adapter off too."""
    indexer = {
        "index_topk": 3,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "mlp_layer_types": ["dense", "dense"],
    }
    model_config = AutoConfig.for_model("deepseek_v32", **SHARED | LATENT | indexer)
    with pytest.raises(
        UsageError, match="'prompt' cannot work on deepseek_v32: its mask depends on the name"
    ):
        get_peft_model(AutoModelForCausalLM.from_config(model_config), MoAConfig.preset("prompt-tuning"))


def test_in_a_block_with_an_mlp_alone_the_router_reads_what_the_mlp_reads() -> None:
    """It read the input of down_proj, and LoRA on up_proj then ran before its router."""
    model = get_peft_model(text_model("nemotron_h"), MoAConfig(experts=[LoraExpert(targets=["up_proj"])]))
    awaken(model)
    assert [layer.block.hidden_size for _, layer in mixture_layers(model)] == [32]
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("family", ["trocr", "gpt2"])
def test_attention_to_an_encoder_carries_no_expert(family: str) -> None:
    """It took the place of the block's own, and without an encoder it never runs: nothing was trained."""
    changes = (
        DENSE
        | GPT
        | {"add_cross_attention": True, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    )
    names = {"trocr": TrOCRConfig, "gpt2": GPT2Config}
    config = names[family](**changes, **({"decoder_ffn_dim": 40} if family == "trocr" else {}))
    base = {"trocr": TrOCRForCausalLM, "gpt2": GPT2LMHeadModel}[family](config)
    model = get_peft_model(base, MoAConfig(experts=[LoraExpert(targets=["q_proj", "v_proj", "o_proj"])]))
    awaken(model)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert not [name for name, grad in trained.items() if grad is None or not grad.any()]


def test_blocks_of_an_unknown_kind_take_no_experts_from_those_behind_them() -> None:
    """The last blocks had none: indices were compared with the number of known blocks."""
    base = base_model("llama")
    layers = base.model.layers
    base.model.layers = nn.ModuleList([layers[0], nn.Identity(), layers[1]])
    base.config.num_hidden_layers = 3
    config = MoAConfig(experts=[LoraExpert(targets=["q_proj"])], router=None)
    assert [index for one in find_placements(base, config) for index in one.blocks] == [0, 2]
    config.layers_to_transform = [2]
    assert [index for one in find_placements(base, config) for index in one.blocks] == [2]
    config.layers_to_transform = [1]
    with pytest.raises(
        UsageError, match=r"layers \[1\] do not exist: .* blocks 0 to 2, of which \[1\] have no place"
    ):
        find_placements(base, config)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_a_fused_attention_that_is_named_takes_prompts_like_one_that_is_known(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM fuses q, k and v of every family, which no table can know."""
    known = mixture_model(name, "soft-moa")
    [layer] = FUSED_ATTENTION[name][:1]
    monkeypatch.setattr(architecture, "FUSED_ATTENTION", {})
    path = f"{FAMILIES[name].attention}.{layer}"
    groups = "head" if FAMILIES[name].per_head else "layer"
    named = ArchitectureConfig(fused={path: ["q_proj", "k_proj", "v_proj"]}, fused_groups=groups)
    model = get_peft_model(base_model(name), MoAConfig.preset("soft-moa", architecture=named))
    awaken(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, known(tokens()).logits)
