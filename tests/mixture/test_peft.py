"""PEFT's own habits, kept by a mixture."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moa_peft import (
    LoraExpert,
    MoAConfig,
    PromptExpert,
    RouterConfig,
    ThresholdConfig,
    UsageError,
    mixture_layers,
)
from moa_peft.mixture.architecture import find_blocks
from tiny import CASES, FAMILIES, METHODS, awaken, base_model, cached, mixture_model, tokens


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(tokens()).logits


@torch.no_grad()
def last_logits(model: torch.nn.Module) -> Tensor:
    """Of a row's last token, with a cache of those before."""
    ids = tokens()[:1]
    before = model.eval()(ids[:, :-1], use_cache=True)
    return model(ids[:, -1:], **cached(before)).logits


def test_the_enum_member_is_a_real_one() -> None:
    member = PeftType("MOA")
    assert member is PeftType.MOA  # added at run time
    assert member.value == "MOA"
    assert member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """A CPU's products may round a weight by where it lies in memory, and not for every number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_an_adapter_reloads_bit_equal_under_another_name_and_with_low_cpu_memory(tmp_path: Path) -> None:
    model = mixture_model("llama", "everything")
    expected, expected_last = logits(model), last_logits(model)
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "default" in key]
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(
            base_model("llama"), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(logits(again), expected)
        assert torch.equal(last_logits(again), expected_last)


def test_a_config_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    config = METHODS["everything"](FAMILIES["llama"])
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, MoAConfig)
    assert (again.experts, again.router, again.architecture) == (
        config.experts,
        config.router,
        config.architecture,
    )
    assert again.to_dict() == config.to_dict()


def test_transformers_alone_loads_an_adapter_folder(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, METHODS["everything"](FAMILIES["llama"]))
    awaken(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(mixture_layers(native)) == 2
    before = model.get_base_model().state_dict()
    assert native.state_dict().keys() == before.keys()
    assert all(torch.equal(one, before[name]) for name, one in native.state_dict().items())
    # not to the bit on every CPU: transformers leaves the weights at the addresses of their file
    torch.testing.assert_close(logits(native), expected, rtol=0, atol=1e-5)


def test_two_adapters_live_on_one_model_and_leave_it_one_by_one(tmp_path: Path) -> None:
    soft, sparse = mixture_model("llama", "soft-moa"), mixture_model("llama", "sparse-moa")
    expected = {"soft": logits(soft), "sparse": logits(sparse)}
    soft.save_pretrained(tmp_path / "soft")
    sparse.save_pretrained(tmp_path / "sparse")
    model = PeftModel.from_pretrained(base_model("llama"), tmp_path / "soft", adapter_name="soft")
    model.load_adapter(str(tmp_path / "sparse"), adapter_name="sparse")
    for name in ("soft", "sparse", "soft"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        status = get_model_status(model)
        assert status.active_adapters == [name]
        assert status.available_adapters == ["soft", "sparse"]
    model.delete_adapter("sparse")
    assert torch.equal(logits(model), expected["soft"])
    assert not [name for name, _ in model.named_parameters() if "sparse" in name]


def test_two_active_adapters_each_keep_their_own_gates() -> None:
    model = mixture_model("llama", "soft-moa")
    one = logits(model) - logits(base_model("llama"))
    model.add_adapter("second", MoAConfig.preset("sparse-moa"))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model) - logits(base_model("llama"))
    assert (one - both).abs().max() < 1e-3  # the second is fresh, so it adds next to nothing
    awaken(model)
    assert (logits(model) - logits(base_model("llama")) - both).abs().max() > 1e-2


def test_unload_gives_back_the_frozen_model_bit_for_bit() -> None:
    model = mixture_model("llama", "everything")
    base = model.unload()
    assert torch.equal(logits(base), logits(base_model("llama")))
    assert base.state_dict().keys() == base_model("llama").state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert base.model.layers[0].self_attn.config is base.config
    again = get_peft_model(base, METHODS["everything"](FAMILIES["llama"]))
    awaken(again)
    assert torch.equal(logits(again), logits(mixture_model("llama", "everything")))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_with_the_reason(merge: str) -> None:
    model = mixture_model("llama", "soft-moa")
    expected = logits(model)
    with pytest.raises(UsageError, match="gates depend on the input"):
        getattr(model, merge)()
    assert torch.equal(logits(model), expected)


def test_merging_a_single_layer_is_refused_too() -> None:
    [(_, layer), _] = mixture_layers(mixture_model("llama", "soft-moa"))
    with pytest.raises(UsageError, match="gates depend on the input"):
        layer.merge()


def test_layers_to_transform_leaves_the_other_blocks_alone() -> None:
    config = MoAConfig.preset("soft-moa", layers_to_transform=[1])
    model = get_peft_model(base_model("llama"), config)
    assert [layer.block.index for _, layer in mixture_layers(model)] == [1]


def test_an_experts_own_layers_leave_it_out_of_the_other_blocks() -> None:
    experts = [LoraExpert(targets=("q_proj",)), LoraExpert(targets=("v_proj",), layers=(1,))]
    model = get_peft_model(base_model("llama"), MoAConfig(experts=experts))
    names = [layer.mixtures()["default"].names for _, layer in mixture_layers(model)]
    assert names == [("lora_q_proj",), ("lora_q_proj", "lora_v_proj")]
    assert logits(model).isfinite().all()
    with pytest.raises(UsageError, match=r"expert 'lora' is in no block: its layers \[1\] are not among"):
        get_peft_model(base_model("llama"), MoAConfig(experts=experts, layers_to_transform=[0]))


@pytest.mark.parametrize("excluded", [["layers.0.self_attn.q_proj", "mlp"], r".*(layers\.0\..*q_proj|mlp)"])
def test_exclude_modules_takes_experts_away(excluded: str | list[str]) -> None:
    model = get_peft_model(base_model("llama"), MoAConfig.preset("sparse-moa", exclude_modules=excluded))
    first, second = (layer.mixtures()["default"].names for _, layer in mixture_layers(model))
    assert first == ("lora_k_proj", "lora_v_proj", "lora_o_proj", "lora_down_proj")
    assert second == ("lora_q_proj", *first)


def test_an_excluded_block_carries_nothing() -> None:
    model = get_peft_model(base_model("llama"), MoAConfig.preset("soft-moa", exclude_modules=["layers.0"]))
    assert [layer.block.index for _, layer in mixture_layers(model)] == [1]


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    base = base_model("llama")
    model = get_peft_model(base, MoAConfig.preset("soft-moa", modules_to_save=["lm_head"]))
    awaken(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert any("lm_head" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path)), expected)


def test_an_adapter_inside_wrapped_blocks_is_saved_whole() -> None:
    """FSDP1 under transformers' Trainer once saved an adapter without a single weight, and without a word."""
    model = mixture_model("llama", "soft-moa")
    expected = get_peft_model_state_dict(model)
    blocks = model.get_base_model().model.layers
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    found = get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], one) for key, one in expected.items())


def test_a_copied_model_computes_the_same_and_by_itself() -> None:
    model = mixture_model("llama", "everything")
    expected = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)


def test_adapters_are_float32_on_a_bfloat16_base_unless_told_otherwise() -> None:
    config = MoAConfig.preset("soft-moa")
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(
            base_model("llama", torch.bfloat16), copy.deepcopy(config), autocast_adapter_dtype=autocast
        )
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert logits(model).isfinite().all()


def test_adapters_are_never_of_a_dtype_that_only_stores() -> None:
    """On a base in float8 they were float8 too, and a file of them could not be loaded again."""
    base = base_model("llama")
    for block in base.model.layers:
        block.self_attn.q_proj.weight.data = block.self_attn.q_proj.weight.data.to(torch.float8_e4m3fn)
    model = get_peft_model(base, MoAConfig.preset("lora"), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_unmerging_does_nothing_for_nothing_was_merged() -> None:
    model = mixture_model("llama", "soft-moa")
    before = logits(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_the_official_dead_threshold_is_declared_untrained() -> None:
    dead = ThresholdConfig(maximum=0.5, gradient="none")
    model = get_peft_model(
        base_model("llama"), MoAConfig.preset("sparse-moa", router=RouterConfig(threshold=dead))
    )
    frozen = [n for n, p in model.named_parameters() if "moa_" in n and not p.requires_grad]
    assert len(frozen) == 4
    assert all(".router.gate.threshold_" in name for name in frozen)
    model.set_adapter("default")
    assert [n for n, p in model.named_parameters() if "moa_" in n and not p.requires_grad] == frozen


def rewritten(folder: Path, change: dict[str, Tensor | None]) -> Path:
    """Change (or, with None, drop) weights of a saved adapter."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for ending, value in change.items():
        [key] = [key for key in weights if key.endswith(ending)]
        del weights[key]
        if value is not None:
            weights[key] = value
    save_file(weights, file)
    return folder


def test_a_sparse_adapter_is_refused_by_a_soft_config_and_the_other_way_round(tmp_path: Path) -> None:
    mixture_model("llama", "sparse-moa").save_pretrained(tmp_path)
    no_threshold = MoAConfig.preset("sparse-moa", router={"threshold": None})
    with pytest.raises(UsageError, match="has a learned threshold but its config has none"):
        PeftModel.from_pretrained(base_model("llama"), tmp_path, config=no_threshold)
    soft = get_peft_model(base_model("llama"), no_threshold)
    soft.save_pretrained(tmp_path / "soft")
    with pytest.raises(UsageError, match="has no weights of the threshold that its config has"):
        PeftModel.from_pretrained(
            base_model("llama"), tmp_path / "soft", config=MoAConfig.preset("sparse-moa")
        )


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    mixture_model("qwen3", "sparse-moa").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"does not fit this model: .*the model's is.*another base"):
        PeftModel.from_pretrained(base_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.moa.moa_mixture.experts.lora_q_proj.A": None}, "lora_q_proj.A is missing"),
        (
            {"layers.1.moa.moa_mixture.experts.lora_q_proj.A": torch.zeros(2, 3)},
            r"is \[2, 3\], the model's is",
        ),
    ],
)
def test_an_incomplete_adapter_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    mixture_model("llama", "soft-moa").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        PeftModel.from_pretrained(base_model("llama"), rewritten(tmp_path, change))


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    mixture_model("llama", "soft-moa").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"is unknown"):
        PeftModel.from_pretrained(
            base_model("llama"), tmp_path, config=MoAConfig.preset("soft-moa", layers_to_transform=[0])
        )


@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained:UserWarning")
@pytest.mark.parametrize("name", ["a.b", "keys", ""])
def test_an_adapter_name_that_torch_cannot_keep_is_refused_before_anything_is_touched(name: str) -> None:
    base = base_model("llama")
    with pytest.raises(UsageError, match=r"adapter name .* cannot be used"):
        get_peft_model(base, MoAConfig.preset("soft-moa"), adapter_name=name)
    assert base.state_dict().keys() == base_model("llama").state_dict().keys()


@pytest.mark.parametrize(
    ("router_input", "saved"),
    [("block", "input_layernorm"), ("block", "norm"), ("projection", "q_proj"), ("projection", "self_attn")],
)
def test_saving_the_module_that_the_router_reads_is_refused(router_input: str, saved: str) -> None:
    """PEFT copies such a module with its hooks, and the gates went to the copy of the layer: every forward failed."""
    config = MoAConfig.preset("soft-moa", modules_to_save=[saved], router={"router_input": router_input})
    with pytest.raises(UsageError, match=f"covers model.layers.0.*which the router reads .*'{router_input}'"):
        get_peft_model(base_model("llama"), config)


@pytest.mark.parametrize("saved", ["k_proj", "mlp", "norm"])
def test_other_modules_to_save_go_with_a_mixture(saved: str) -> None:
    model = get_peft_model(base_model("llama"), MoAConfig.preset("sparse-moa", modules_to_save=[saved]))
    assert logits(model).isfinite().all()


def test_a_second_architecture_on_one_model_is_refused() -> None:
    model = mixture_model("llama", "soft-moa")
    with pytest.raises(UsageError, match="architecture differs"):
        model.add_adapter("b", MoAConfig.preset("soft-moa", architecture={"norm": "input_layernorm"}))
    assert list(model.peft_config) == ["default"]


def test_flash_attention_is_told_its_own_name_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config copy says "moa_prompt", and transformers' flash attention reads its kernel's name off it."""
    told: list[str] = []

    def flash(module: torch.nn.Module, query: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        told.append(module.config._attn_implementation)
        return query.transpose(1, 2), None

    model = mixture_model("llama", "soft-moa")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model.get_base_model().config._attn_implementation_internal = "flash_attention_2"
    logits(model)
    assert told == ["flash_attention_2"] * 2
    assert model.get_base_model().model.layers[0].self_attn.config._attn_implementation == "moa_prompt"


def unusual(model_type: str, **settings: object) -> PreTrainedModel:
    sizes = FAMILIES["llama"].settings
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **settings))


@pytest.mark.parametrize(("model_type", "settings"), [("cohere", {"use_qk_norm": True}), ("nanochat", {})])
def test_a_prompts_keys_go_through_the_models_norm_of_each_head(
    model_type: str, settings: dict[str, object]
) -> None:
    base = unusual(model_type, **settings)
    attention = base.model.layers[0].self_attn
    vectors = torch.randn(5, 32)
    keys, _ = find_blocks(base)[0].sites["attention"].project(vectors)
    assert torch.equal(keys, attention.k_norm(attention.k_proj(vectors).unflatten(-1, (2, 8))))


def test_a_prompt_is_refused_where_keys_are_normed_in_an_unknown_way() -> None:
    with pytest.raises(
        UsageError, match=r"expert 'prompt' cannot work on stablelm: .*has a norm 'q_layernorm'"
    ):
        get_peft_model(unusual("stablelm", qk_layernorm=True), MoAConfig(experts=[PromptExpert()]))


def test_an_mlp_that_gives_its_routers_scores_as_well_can_carry_a_parallel_adapter() -> None:
    model = mixture_model("llama", "soft-moa")
    mlp = model.get_base_model().model.layers[0].mlp
    plain = logits(model)
    mlp.forward = lambda x, forward=mlp.forward: (forward(x), "scores")  # what a mixture-of-experts MLP gives
    mlp.register_forward_hook(lambda _, __, output: output[0])
    assert torch.equal(logits(model), plain)


NEW_PROCESS = """
import sys, torch
from collections.abc import Iterator
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from peft import PeftModel
from tiny import FAMILIES, base_model, tokens
out = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = PeftModel.from_pretrained(base_model(folder.name.split("__")[0]), folder)
    with torch.no_grad():
        out[folder.name] = model(tokens()).logits
torch.save(out, sys.argv[1] + ".pt")
"""


@pytest.mark.slow
def test_every_family_and_method_reloads_bit_equal_in_a_new_process(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    expected: dict[str, Tensor] = {}
    for family, method in CASES:
        model = mixture_model(family, method)
        expected[f"{family}__{method}"] = logits(model)
        model.save_pretrained(saved / f"{family}__{method}")
    subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(saved), str(Path(__file__).parents[1])], check=True
    )
    again = torch.load(f"{saved}.pt")
    assert again.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(again[name], expected[name])]
