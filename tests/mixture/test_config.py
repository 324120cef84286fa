"""What a config accepts, and what it says when it does not."""

import json
import subprocess
import sys
from typing import Any

import pytest
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moa_peft import (
    ArchitectureConfig,
    LoraExpert,
    MoAConfig,
    ParallelAdapterExpert,
    PromptExpert,
    RouterConfig,
    ThresholdConfig,
    UsageError,
    preset_names,
)
from moa_peft.errors import RunError
from moa_peft.mixture.experts import IA3Expert, expert_kinds, register_expert
from moa_peft.mixture.model import MoAModel
from moa_peft.mixture.registration import register
from tiny import base_model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ThresholdConfig(), "maximum is None and constant is None: give exactly one"),
        (lambda: ThresholdConfig(maximum=0.5, constant=0.5), "give exactly one of them"),
        (lambda: ThresholdConfig(maximum=1.5), r"maximum is 1.5: it must lie in \(0, 1\]"),
        (lambda: ThresholdConfig(constant=-1), r"constant is -1: it must lie in \[0, 1\]"),
        (lambda: ThresholdConfig(constant=0.5, gradient="none"), "belong to a learned threshold"),
        (
            lambda: ThresholdConfig(maximum=0.5, gradient="hard"),
            "gradient is 'hard': give one of 'straight-through'",
        ),
        (lambda: ThresholdConfig(maximum=0.5, bandwidth=0), "bandwidth is 0: it must be above 0"),
        (lambda: RouterConfig(kind="mlp"), "kind is 'mlp': give one of 'linear', 'swiglu'"),
        (lambda: RouterConfig(gate="relu"), "unknown gate 'relu': known: sigmoid, softmax"),
        (
            lambda: RouterConfig(router_input="blok"),
            "router_input is 'blok': give one of 'projection', 'block'",
        ),
        (lambda: RouterConfig(kind="linear", hidden_per_expert=4), "a linear router has no hidden layer"),
        (lambda: RouterConfig(hidden_per_expert=0), "hidden_per_expert is 0: it must be at least 1"),
        (lambda: RouterConfig(initial_gate=1.0), r"initial_gate is 1.0: it must lie in \(0, 1\)"),
        (lambda: RouterConfig(initial_gate=0.9, bias=False), "it is set by the bias, and bias is false"),
        (
            lambda: RouterConfig(gate="softmax", initial_gate=0.9),
            "initial_gate is 0.9: the gate 'softmax' has none",
        ),
        (lambda: LoraExpert(targets=()), "targets is empty"),
        (lambda: LoraExpert(targets="q_proj"), r"targets is the text 'q_proj': give a list"),
        (lambda: LoraExpert(targets=("q_proj", "q_proj")), "names a projection twice"),
        (
            lambda: LoraExpert(targets=("q_proj",), rank=0, alpha=0, dropout=1),
            "rank is 0.*alpha is 0.*dropout is 1",
        ),
        (lambda: LoraExpert(targets=("q_proj",), layers=()), r"layers is \(\): give indices"),
        (lambda: ParallelAdapterExpert(size=0), "size is 0: it must be at least 1"),
        (lambda: PromptExpert(length=0), "length is 0: it must be at least 1"),
        (lambda: MoAConfig(), "experts is empty: give some"),
        (lambda: MoAConfig.preset("soft-moe"), "unknown method 'soft-moe': did you mean 'soft-moa'"),
        (
            lambda: MoAConfig.preset("soft-moa", rooter={}),
            "unknown field of MoAConfig 'rooter': did you mean 'router'",
        ),
        (
            lambda: MoAConfig.preset("soft-moa", router={"knd": 1}),
            "unknown router field 'knd': did you mean 'kind'",
        ),
        (
            lambda: MoAConfig.preset("sparse-moa", router={"threshold": {"maxmum": 1}}),
            "unknown threshold field 'maxmum': did you mean 'maximum'",
        ),
        (lambda: MoAConfig(experts=[{"kind": "lore"}]), "unknown expert 'lore': did you mean 'lora'"),
        (lambda: MoAConfig(experts=[{"rank": 8}]), "an expert has no kind"),
        (
            lambda: MoAConfig(experts=[{"kind": "lora", "targets": ["q_proj"], "rnk": 2}]),
            "unknown field of expert 'lora' 'rnk': did you mean 'rank'",
        ),
        (lambda: MoAConfig(experts=[3]), "an expert is 3: give LoraExpert"),
        (lambda: MoAConfig(experts=1000), "experts is 1000: give a list of LoraExpert"),
        (lambda: PromptExpert(length=10**9), "length is 1000000000: give a whole number of at most 65,536"),
        (
            lambda: MoAConfig.preset("soft-moa", exclude_modules="["),
            r"exclude_modules is '\[': as a regular expression it has an error",
        ),
        (
            lambda: MoAConfig.preset("soft-moa", target_modules=["q_proj"]),
            "a mixture's targets belong to its experts",
        ),
        (lambda: MoAConfig.preset("soft-moa", task_type="SEQ_2_SEQ_LM"), "task_type is SEQ_2_SEQ_LM"),
    ],
)
def test_a_wrong_config_is_refused_with_what_is_allowed(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoraExpert(targets=("q_proj",), rank="8"), "rank is '8': give a whole number"),
        (lambda: LoraExpert(targets=("q_proj",), rank=8.0), "rank is 8.0: give a whole number"),
        (lambda: LoraExpert(targets=("q_proj",), alpha="8"), "alpha is '8': give a number"),
        (lambda: LoraExpert(targets=("q_proj",), layers=["0"]), r"layers is \('0',\): give whole numbers"),
        (lambda: LoraExpert(targets=("q_proj",), layers=[True]), r"layers is \(True,\): give whole numbers"),
        (lambda: LoraExpert(targets=("q_proj",), layers=3), "layers is 3: give a list"),
        (lambda: LoraExpert(targets=("q_proj",), layers="3"), "layers is '3': give a list"),
        (lambda: LoraExpert(targets=None), "targets is None: give a list"),
        (lambda: LoraExpert(targets={"q_proj"}), "targets is {'q_proj'}: give a list"),
        (lambda: LoraExpert(targets=[["q_proj"]]), r"targets is \(\['q_proj'\],\): give names"),
        (lambda: LoraExpert(targets=["mlp"]), "targets names 'mlp': give some of q_proj"),
        (
            lambda: IA3Expert(targets=["attention", "mlp"]),
            "targets names 'attention': give some of q_proj",
        ),
        (lambda: MoAConfig(experts=[{"kind": "lora", "rank": 4}]), "missing: give targets"),
        (lambda: MoAConfig(experts=[{"kind": ["lora"]}]), "unknown expert"),
        (lambda: RouterConfig(gate=["sigmoid"]), r"gate is .*: give text"),
        (
            lambda: MoAConfig(experts=[PromptExpert()], router="linear"),
            r"router is 'linear': give RouterConfig\(\.\.\.\), or a mapping",
        ),
        (lambda: PromptExpert(length=True), "length is True: give a whole number"),
        (lambda: RouterConfig(hidden_per_expert="2"), "hidden_per_expert is '2': give a whole number"),
        (lambda: RouterConfig(threshold=0.5), "threshold is 0.5: give a mapping"),
        (lambda: ThresholdConfig(maximum="0.5"), "maximum is '0.5': give a number"),
        (
            lambda: ThresholdConfig(maximum=0.5, at_least_one="false"),
            "at_least_one is 'false': give true or false",
        ),
        (
            lambda: MoAConfig.preset("soft-moa", layers_to_transform=["1"]),
            r"layers_to_transform is \['1'\]: give whole",
        ),
        (
            lambda: MoAConfig.preset("soft-moa", layers_to_transform=True),
            "layers_to_transform is True: give whole",
        ),
        (
            lambda: MoAConfig.preset("soft-moa", layers_to_transform=[]),
            r"layers_to_transform is \[\]: give whole numbers, or leave it out for every block",
        ),
        (
            lambda: MoAConfig.preset("soft-moa", exclude_modules=3),
            "exclude_modules is 3: give a list of names",
        ),
        (lambda: MoAConfig.preset("soft-moa", router={3: 1}), "unknown router field 3"),
        (lambda: ArchitectureConfig(norm=3), "norm is 3: give text"),
        (
            lambda: ArchitectureConfig(projections="(a+)+$"),
            "projections is .*: give a mapping of names to names",
        ),
        (lambda: ArchitectureConfig(projections={"q_proj": 3}), "projections is .*: give a mapping"),
        (
            lambda: MoAConfig.preset("soft-moa", modules_to_save="lm_head"),
            "modules_to_save is 'lm_head': give a list of names",
        ),
    ],
)
def test_a_value_of_another_type_is_refused_not_read_as_something_else(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()
    assert LoraExpert(targets=("q_proj",), alpha=8).alpha == 8  # a whole number where fractions are welcome


def test_every_problem_of_a_config_is_reported_at_once() -> None:
    with pytest.raises(UsageError, match=r"kind is 'a'.*hidden_per_expert is -1.*unknown gate 'b'"):
        RouterConfig(kind="a", gate="b", hidden_per_expert=-1)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "llama",
            MoAConfig(experts=[LoraExpert(targets=("q_prj",))]),
            "unknown target of llama 'q_prj': .*'q_proj'",
        ),
        (
            "gpt2",
            MoAConfig(experts=[LoraExpert(targets=("gate_proj",))]),
            "'lora' cannot work on gpt2: its MLP has no gate",
        ),
        (
            "llama",
            MoAConfig.preset("soft-moa", layers_to_transform=[7]),
            r"layers \[7\] do not exist: .* 0 to 1",
        ),
        ("llama", MoAConfig(experts=[PromptExpert(layers=(5,))]), r"layers \[5\] do not exist"),
        ("llama", MoAConfig.preset("soft-moa", exclude_modules=r".*layers.*"), "no target matched"),
        (
            "llama",
            MoAConfig.preset("soft-moa", exclude_modules=r"([a-z._0-9]+)+X"),
            r"has not ended after 0\.1 s",
        ),
        (
            "llama",
            MoAConfig.preset("soft-moa", modules_to_save=["lm_head", "nope"]),
            "modules_to_save has 'nope': no module's name ends so; give names such as lm_head",
        ),
        ("llama", MoAConfig.preset("soft-moa", modules_to_save=[""]), "modules_to_save has ''"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused_and_leaves_it_as_it_was(
    family: str, config: MoAConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moa_peft.mixture.model._PATTERN_S", 0.1)
    base = base_model(family)
    names = list(base.state_dict())
    with pytest.raises(UsageError, match=message):
        get_peft_model(base, config)
    assert list(base.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_a_prompt_is_refused_by_name_where_attention_goes_its_own_way() -> None:
    base = base_model("gpt2")
    base.config.reorder_and_upcast_attn = True
    with pytest.raises(UsageError, match="expert 'prompt' cannot work on gpt2: reorder_and_upcast_attn"):
        get_peft_model(base, MoAConfig.preset("soft-moa"))
    get_peft_model(base, MoAConfig.preset("sparse-moa"))  # the other kinds can


def test_a_model_without_a_transformers_config_is_refused() -> None:
    with pytest.raises(UsageError, match="has no transformers config"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), MoAConfig.preset("soft-moa"))


def renamed_llama() -> LlamaForCausalLM:
    """A model of no known family: everything in a block has another name."""
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4
        )
    )
    for block in base.model.layers:
        block.self_attn.wq = block.self_attn.q_proj
    return base


def test_an_unknown_family_works_when_its_sites_are_named() -> None:
    base = renamed_llama()
    base.config.model_type = "unheard-of"
    architecture = {"blocks": "model.layers", "projections": {"q_proj": "self_attn.wq"}}
    model = get_peft_model(base, MoAConfig.preset("soft-moa", architecture=architecture))
    assert model.get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            ArchitectureConfig(blocks="model.layer"),
            "the model has no list of modules of that path; it has model.layers",
        ),
        (
            ArchitectureConfig(attention="attn"),
            "attention is 'attn': no block of model.layers has a module of that path; the first has self_attn, mlp",
        ),
        (ArchitectureConfig(mlp="ffn"), "mlp is 'ffn': no block"),
        (ArchitectureConfig(norm="nope"), "norm is 'nope': no block"),
        (
            ArchitectureConfig(projections={"q_proj": "self_attn.nope"}),
            "q_proj is 'self_attn.nope': no block",
        ),
        (ArchitectureConfig(fused={"mlp.qkv": ["q_proj"]}), "mlp.qkv is 'mlp.qkv': no block"),
        (
            ArchitectureConfig(projections={"q_proj": "mlp.down_proj"}),
            "q_proj is model.layers.0.mlp.down_proj, 44 to 32 features: q_proj of this model has 32 to 32",
        ),
        (ArchitectureConfig(projections={"q_proj": "mlp"}), "mlp is no linear layer, but LlamaMLP"),
        (
            ArchitectureConfig(fused={"mlp.gate_proj": ["q_proj", "k_proj", "v_proj"]}),
            "q_proj is model.layers.0.mlp.gate_proj, 32 to ",
        ),
    ],
)
def test_a_wrong_architecture_says_what_to_name(architecture: ArchitectureConfig, message: str) -> None:
    config = MoAConfig.preset("soft-moa", architecture=architecture, router={"router_input": "block"})
    base = base_model("llama")
    with pytest.raises(UsageError, match=message):
        get_peft_model(base, config)
    assert base.state_dict().keys() == base_model("llama").state_dict().keys()
    assert not any(hasattr(block, "moa") for block in base.model.layers)


def test_an_unknown_architecture_field_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown architecture field 'block': did you mean 'blocks'"):
        MoAConfig.preset("soft-moa", architecture={"block": "x"})


def test_a_kind_that_is_taken_cannot_be_registered_again() -> None:
    with pytest.raises(
        UsageError, match=r"expert 'lora' is already registered by moa_peft\.mixture\.experts\.lora"
    ):
        register_expert(LoraExpert)
    assert expert_kinds()["lora"] is LoraExpert


def test_changes_of_a_preset_leave_the_rest_of_its_router_alone() -> None:
    changed = MoAConfig.preset("sparse-moa", router={"kind": "linear", "threshold": {"bandwidth": 0.2}})
    assert changed.router == RouterConfig(
        kind="linear", threshold=ThresholdConfig(maximum=0.5, bandwidth=0.2)
    )


@pytest.mark.parametrize("method", preset_names())
def test_every_preset_survives_json(method: str) -> None:
    config = MoAConfig.preset(method)
    assert MoAConfig.from_peft_type(**config.to_dict()).to_dict() == config.to_dict()


def test_a_config_with_lists_and_ranges_survives_json() -> None:
    config = MoAConfig(experts=[LoraExpert(targets=["q_proj"], layers=range(4, 6))])
    written = json.loads(json.dumps(config.to_dict()))
    assert written["experts"][0]["layers"] == [4, 5]
    assert MoAConfig.from_peft_type(**written).to_dict() == config.to_dict()


@pytest.mark.slow
def test_importing_the_package_is_quiet_and_importing_it_twice_is_harmless() -> None:
    code = "import moa_peft, importlib; importlib.reload(moa_peft.mixture.registration); from moa_peft import MoAConfig"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_a_peft_that_would_save_what_it_cannot_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_remove_adapter_name_from_key")
    with pytest.raises(RunError, match=r"install peft 0\.21\.2"):
        register(MoAConfig, MoAModel)
