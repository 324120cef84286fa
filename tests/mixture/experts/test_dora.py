"""The DoRA expert against its definition and against PEFT's."""

import copy
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
from moa_peft import DoraExpert, RouterConfig, UsageError
from moa_peft.mixture.experts.dora import WeightDecomposedChange
from moa_peft.mixture.sites import Slot
from tiny import FAMILIES, base_model, tokens

SIX = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
EVERYWHERE = DoraExpert(targets=SIX, rank=2)


def definition(
    expert: WeightDecomposedChange, x: Tensor, gate: Tensor, rows: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """y = base + gate * (m (W + s B A) x / ||W + s B A|| + bias - base), row by row."""
    a, b, m = (p.detach().double() for p in (expert.A, expert.B, expert.magnitude))
    out = torch.zeros(*x.shape[:2], len(rows), dtype=torch.float64)
    for row in range(len(rows)):
        turned = [
            float(rows[row, i]) + scale * sum(float(b[row, j] * a[j, i]) for j in range(len(a)))
            for i in range(rows.shape[1])
        ]
        length = math.sqrt(sum(one * one for one in turned))
        for r in range(x.shape[0]):
            for t in range(x.shape[1]):
                token = x[r, t].tolist()
                base = sum(float(w) * one for w, one in zip(rows[row], token, strict=True)) + float(bias[row])
                full = float(m[row]) * sum(w * one for w, one in zip(turned, token, strict=True)) / length
                full += float(bias[row])
                out[r, t, row] = base + float(gate[r, t, 0]) * (full - base)
    return out


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("length", "d_in", "d_out", "rank", "alpha"), [(1, 1, 1, 1, 1), (3, 5, 2, 2, 3), (2, 7, 11, 3, 8)]
)
def test_each_row_of_the_weight_is_turned_and_given_its_length(
    kind: str, length: int, d_in: int, d_out: int, rank: int, alpha: float
) -> None:
    module = layer(kind, d_in, d_out)
    expert = DoraExpert(targets=("q_proj",), rank=rank, alpha=alpha).build(site(module, d_in, d_out))
    randomise(expert)
    x, gate = inputs(2, length, d_in), gates(2, length)
    base = module(x)
    bias = torch.zeros(d_out) if module.bias is None else module.bias
    truth = definition(expert, x, gate, matrix(module), bias, alpha / rank)
    torch.testing.assert_close((base + expert.change(x, base, gate)).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "slot", [Slot(groups=1, width=12, start=6, size=3), Slot(groups=2, width=6, start=2, size=2)]
)
def test_in_a_fused_layer_only_the_slots_rows_and_biases_are_read(kind: str, slot: Slot) -> None:
    module = layer(kind, 5, 12)
    rows = [g * slot.width + slot.start + i for g in range(slot.groups) for i in range(slot.size)]
    expert = DoraExpert(targets=("k_proj",), rank=2, alpha=3).build(
        site(module, 5, len(rows), "k_proj", slot)
    )
    torch.testing.assert_close(expert.magnitude.double(), matrix(module)[rows].norm(dim=1), rtol=1e-6, atol=0)
    randomise(expert)
    x, gate = inputs(2, 3, 5), gates(2, 3)
    base = slot.take(module(x))
    bias = (torch.zeros(12) if module.bias is None else module.bias)[rows]
    truth = definition(expert, x, gate, matrix(module)[rows], bias, 1.5)
    torch.testing.assert_close((base + expert.change(x, base, gate)).double(), truth, rtol=1e-5, atol=1e-5)


def test_a_quantised_base_is_read_through_its_own_dequantisation() -> None:
    module = Scaled8Bit(layer("linear", 6, 4))
    expert = DoraExpert(targets=("q_proj",), rank=2).build(site(module, 6, 4))
    torch.testing.assert_close(expert.magnitude, module.dequantize().norm(dim=1))
    randomise(expert)
    x, gate = inputs(2, 3, 6), gates(2, 3)
    base = module(x)
    truth = definition(expert, x, gate, module.dequantize().double(), module.bias, 4)
    torch.testing.assert_close((base + expert.change(x, base, gate)).double(), truth, rtol=1e-5, atol=1e-5)


def test_a_base_that_is_quantised_in_place_is_read_as_what_it_has_become() -> None:
    module = layer("linear", 6, 4)
    expert = DoraExpert(targets=("q_proj",), rank=2).build(site(module, 6, 4))
    quantised = Scaled8Bit(module)
    del module.weight
    module.__class__ = Scaled8Bit
    module.scale, module.W_q = quantised.scale, quantised.W_q
    x, gate = inputs(2, 3, 6), gates(2, 3)
    assert expert.change(x, module(x), gate).abs().max() < 0.1


def eight_bit_floats() -> nn.Module:
    module = nn.Linear(4, 4).requires_grad_(False)
    module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
    return module


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (nn.Identity(), "of Identity: .*'weight'"),
        (eight_bit_floats(), "of Linear: its numbers are torch.float8_e4m3fn, without their scale"),
    ],
)
def test_a_base_whose_weight_cannot_be_read_is_refused(packed: nn.Module, message: str) -> None:
    with pytest.raises(
        UsageError, match=f"'dora' cannot read the weight {message}; use lora on such a base"
    ) as told:
        DoraExpert(targets=("q_proj",)).build(site(packed, 4, 4))
    assert "bitsandbytes, torchao or HQQ" in str(told.value)


@pytest.mark.slow
def test_the_forward_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    model = model_with([DoraExpert(targets=("k_proj", "down_proj"))], family="gpt2", awake=True)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens()).logits
    torch.testing.assert_close(compiled, logits(model), rtol=1e-5, atol=1e-5)


def test_no_gradient_flows_through_the_length_as_in_the_papers_section_on_cost() -> None:
    module = layer("linear", 5, 3)
    expert = DoraExpert(targets=("q_proj",), rank=2, alpha=2).build(site(module, 5, 3))
    randomise(expert)
    x, gate = inputs(2, 4, 5), gates(2, 4)
    base = module(x)
    (base + expert.change(x, base, gate)).square().sum().backward()

    a, b, m = (p.detach().double().requires_grad_() for p in (expert.A, expert.B, expert.magnitude))
    w = matrix(module)
    turned = w + b @ a
    full = m * (x.double() @ turned.T) / turned.detach().norm(dim=1) + module.bias
    (base + gate * (full - base)).square().sum().backward()
    for ours, truth in ((expert.A, a), (expert.B, b), (expert.magnitude, m)):
        assert ours.grad is not None
        assert truth.grad is not None
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_stays_finite() -> None:
    module = nn.Linear(4, 3).requires_grad_(False)
    module.weight.data[1] = 0
    expert = DoraExpert(targets=("q_proj",), rank=2).build(site(module, 4, 3))
    x = inputs(1, 2, 4)
    change = expert.change(x, module(x), torch.ones(1, 1, 1))
    assert torch.equal(change, torch.zeros(1, 2, 3))
    change.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in expert.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_is_bit_equal_to_the_frozen_one(family: str, dtype: torch.dtype) -> None:
    fresh = model_with([EVERYWHERE], family=family, dtype=dtype, router=RouterConfig(kind="linear"))
    assert torch.equal(logits(fresh), logits(base_model(family, dtype)))
    fresh = model_with([EVERYWHERE], family=family, dtype=dtype)
    assert torch.equal(logits(fresh), logits(base_model(family, dtype)))


def test_a_fresh_model_is_bit_equal_with_adapters_in_bfloat16_too() -> None:
    fresh = model_with([EVERYWHERE], dtype=torch.bfloat16, autocast=False)
    assert {p.dtype for p in fresh.parameters() if p.requires_grad} == {torch.bfloat16}
    assert torch.equal(logits(fresh), logits(base_model("llama", torch.bfloat16)))


def test_the_length_of_a_bfloat16_weight_is_measured_in_float32() -> None:
    module = layer("linear", 64, 8).bfloat16()
    expert = DoraExpert(targets=("q_proj",)).build(site(module, 64, 8))
    assert expert.magnitude.dtype == torch.float32
    torch.testing.assert_close(expert.magnitude.double(), matrix(module).norm(dim=1), rtol=1e-6, atol=0)


def test_autocast_does_not_round_the_length() -> None:
    module = layer("linear", 64, 8)
    expert = DoraExpert(targets=("q_proj",)).build(site(module, 64, 8))
    randomise(expert)
    plain = expert._norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expert._norm(), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_parameter_moves_within_three_steps(family: str) -> None:
    assert parameters_that_never_moved([EVERYWHERE], family) == []


def test_it_comes_back_bit_equal_however_it_is_loaded(tmp_path: Path) -> None:
    assert ways_of_loading_that_differ([EVERYWHERE], tmp_path) == []


def test_without_a_weight_to_read_the_magnitude_waits_for_loading() -> None:
    with torch.device("meta"):
        module = nn.Linear(5, 3)
        expert = DoraExpert(targets=("q_proj",)).build(site(module, 5, 3))
    assert all(p.is_meta for p in expert.parameters())
    late = DoraExpert(targets=("q_proj",)).build(site(module, 5, 3))
    assert late.magnitude.isnan().all()  # whoever never loads it will notice


def test_a_copied_model_reads_its_own_weights() -> None:
    model = model_with([EVERYWHERE], awake=True)
    expected = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)


@pytest.mark.parametrize(
    ("family", "targets", "theirs"),
    [
        ("llama", SIX, list(SIX)),
        ("qwen2", SIX, list(SIX)),
        ("gpt2", ("up_proj", "down_proj"), ["mlp.c_proj", "c_fc"]),
        ("gpt_neox", ("o_proj", "down_proj"), ["attention.dense", "dense_4h_to_h"]),
    ],
)
def test_the_logits_are_those_of_pefts_dora_with_the_same_weights(
    family: str, targets: tuple[str, ...], theirs: list[str]
) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        target_modules=theirs,
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(base_model(family), config)
    ours = model_with([DoraExpert(targets=targets, rank=3, alpha=5)], family=family)
    experts, found = by_path(ours), 0
    for path, module in peft.get_base_model().named_modules():
        if not hasattr(module, "lora_magnitude_vector"):
            continue
        expert, found = experts[path], found + 1
        magnitude = module.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(expert.magnitude, magnitude, rtol=1e-6, atol=1e-6)
        randomise(expert, seed=found)
        magnitude.data = expert.magnitude.detach().clone()
        module.lora_A["default"].weight.data = expert.A.detach().clone()
        module.lora_B["default"].weight.data = expert.B.detach().clone()
    assert found == len(experts) == len(experts_of(ours))
    torch.testing.assert_close(logits(ours), logits(peft), rtol=1e-5, atol=1e-5)
    assert (logits(ours) - logits(base_model(family))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("q_proj",), "rank": 0, "alpha": 0}, "rank is 0: it must be .*alpha is 0: it must be"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DoraExpert(**fields)
