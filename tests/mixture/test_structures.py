"""Every structure of blocks that a mixture can be placed in, and what must hold in each."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from moa_peft import ArchitectureConfig, LoraExpert, MoAConfig, RouterConfig, UsageError
from moa_peft.mixture import architecture
from moa_peft.mixture.families import FUSED_ATTENTION
from moa_peft.mixture.placement import find_placements
from structures import TEXT, check_mixture, text_model
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
        "sparse-moa",
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
