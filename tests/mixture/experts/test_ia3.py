"""The (IA)^3 expert against its definition and against PEFT's."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn

from expert_checks import (
    LAYERS,
    Scaled8Bit,
    by_path,
    experts_of,
    gates,
    inputs,
    layer,
    logits,
    matrix,
    model_with,
    parameters_that_never_moved,
    randomise,
    site,
    ways_of_loading_that_differ,
)
from moa_peft import IA3Expert, RouterConfig, UsageError
from moa_peft.mixture.experts.ia3 import RescaledChange
from tiny import FAMILIES, base_model

EVERYWHERE = IA3Expert(targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


def definition(expert: RescaledChange, x: Tensor, gate: Tensor, module: nn.Module, *, of_input: bool) -> Tensor:  # fmt: skip
    """y = base + gate * (y_full - base), where y_full has the factor l on the output, or on the input."""
    w, factor = matrix(module), 1 + expert.offset.detach().double()
    bias = torch.zeros(len(w)) if module.bias is None else module.bias
    out = torch.zeros(*x.shape[:2], len(w), dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for o in range(len(w)):
                base = sum(float(w[o, i]) * float(x[b, t, i]) for i in range(w.shape[1])) + float(bias[o])
                if of_input:
                    full = sum(
                        float(w[o, i]) * float(factor[i]) * float(x[b, t, i]) for i in range(w.shape[1])
                    )
                    full += float(bias[o])
                else:
                    full = float(factor[o]) * base
                out[b, t, o] = base + float(gate[b, t, 0]) * (full - base)
    return out


@pytest.mark.parametrize("name", ["k_proj", "down_proj"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("length", "d_in", "d_out"), [(1, 1, 1), (3, 5, 2), (2, 7, 11)])
def test_the_output_or_at_down_proj_the_input_is_rescaled_by_the_gate(
    name: str, kind: str, length: int, d_in: int, d_out: int
) -> None:
    module = layer(kind, d_in, d_out)
    expert = IA3Expert().build(site(module, d_in, d_out, name))
    randomise(expert)
    x, gate = inputs(2, length, d_in), gates(2, length)
    base = module(x)
    ours = base + expert.change(x, base, gate)
    truth = definition(expert, x, gate, module, of_input=name == "down_proj")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_quantised_layer_is_asked_for_its_own_product() -> None:
    module = Scaled8Bit(layer("linear", 6, 4))
    expert = IA3Expert().build(site(module, 6, 4, "down_proj"))
    randomise(expert)
    x, gate = inputs(2, 3, 6), gates(2, 3)
    expected = gate * (x * expert.offset) @ module.dequantize().T
    torch.testing.assert_close(expert.change(x, module(x), gate), expected, rtol=1e-5, atol=1e-5)


def test_an_offloaded_layer_brings_its_own_weight() -> None:
    module = layer("linear", 6, 4)
    weight, bias = module.weight, module.bias
    module.weight = nn.Parameter(torch.empty(4, 6, device="meta"))  # what accelerate leaves behind
    module.forward = lambda x: nn.functional.linear(x, weight, bias)
    expert = IA3Expert().build(site(module, 6, 4, "down_proj"))
    randomise(expert)
    x, gate = inputs(2, 3, 6), gates(2, 3)
    expected = gate * (x * expert.offset) @ weight.T
    torch.testing.assert_close(expert.change(x, module(x), gate), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_hook_on_the_layer_does_not_run_again_for_its_expert(quantised: bool) -> None:
    module = layer("linear", 4, 4)
    module = Scaled8Bit(module) if quantised else module
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    expert = IA3Expert().build(site(module, 4, 4, "down_proj"))
    expert.change(inputs(1, 2, 4), inputs(1, 2, 4), gates(1, 2))
    assert calls == []


def test_in_a_gated_mlp_up_proj_gives_the_same_change_as_down_proj() -> None:
    model = {name: model_with([IA3Expert(targets=(name,))]) for name in ("up_proj", "down_proj")}
    for key, expert in experts_of(model["up_proj"]).items():
        twin = experts_of(model["down_proj"])[key.replace("up_proj", "down_proj")]
        randomise(expert)
        twin.load_state_dict(expert.state_dict())
    one, other = logits(model["up_proj"]), logits(model["down_proj"])
    assert (one - logits(base_model("llama"))).abs().max() > 0.1
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_factors_are_one_at_first_and_one_for_each_number() -> None:
    module = layer("linear", 5, 3)
    assert IA3Expert().build(site(module, 5, 3, "k_proj")).offset.tolist() == [0.0] * 3
    assert IA3Expert().build(site(module, 5, 3, "down_proj")).offset.tolist() == [0.0] * 5
    assert IA3Expert().targets == ("k_proj", "v_proj", "down_proj")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_is_bit_equal_to_the_frozen_one(family: str, dtype: torch.dtype) -> None:
    fresh = model_with([EVERYWHERE], family=family, dtype=dtype, router=RouterConfig(kind="linear"))
    assert torch.equal(logits(fresh), logits(base_model(family, dtype)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_parameter_moves_within_three_steps(family: str) -> None:
    assert parameters_that_never_moved([EVERYWHERE], family) == []


def test_it_comes_back_bit_equal_however_it_is_loaded(tmp_path: Path) -> None:
    assert ways_of_loading_that_differ([EVERYWHERE], tmp_path) == []


@pytest.mark.parametrize(
    ("family", "targets", "theirs"),
    [
        ("llama", ("k_proj", "v_proj", "down_proj"), ["k_proj", "v_proj", "down_proj"]),
        ("qwen2", ("k_proj", "v_proj", "down_proj"), ["k_proj", "v_proj", "down_proj"]),
        ("gpt2", ("down_proj", "up_proj"), ["mlp.c_proj", "c_fc"]),
    ],
)
def test_the_logits_are_those_of_pefts_ia3_with_the_same_factors(
    family: str, targets: tuple[str, ...], theirs: list[str]
) -> None:
    ours = model_with([IA3Expert(targets=targets)], family=family, awake=True)
    config = IA3Config(
        target_modules=theirs,
        feedforward_modules=[name for name in theirs if name in ("down_proj", "mlp.c_proj")],
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(base_model(family), config)
    experts, found = by_path(ours), 0
    for path, module in peft.get_base_model().named_modules():
        if hasattr(module, "ia3_l"):
            factors = module.ia3_l["default"]
            factors.data = (1 + experts[path].offset.detach()).view_as(factors)
            found += 1
    assert found == len(experts)
    torch.testing.assert_close(logits(ours), logits(peft), rtol=1e-5, atol=1e-5)
    assert (logits(ours) - logits(base_model(family))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ()}, "targets is empty: give some of q_proj, k_proj"),
        ({"targets": "k_proj"}, r"targets is the text 'k_proj': give a list, as in \['k_proj'\]"),
        ({"targets": "all-linear"}, r"targets is the text 'all-linear': give a list, of some of q_proj, "),
        ({"targets": ("k_proj", "k_proj")}, "targets names a projection twice: k_proj, k_proj"),
    ],
)
def test_wrong_targets_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        IA3Expert(**fields)
