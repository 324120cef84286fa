"""The sequential adapter against its definition."""

import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from expert_checks import (
    by_path,
    experts_of,
    gates,
    inputs,
    layer,
    logits,
    model_with,
    parameters_that_never_moved,
    randomise,
    site,
    ways_of_loading_that_differ,
)
from moa_peft import (
    ChangeRecord,
    MoAConfig,
    ParallelAdapterExpert,
    RouterConfig,
    SequentialAdapterExpert,
    UsageError,
    mixture_layers,
)
from moa_peft.mixture.experts.sequential_adapter import SequentialChange
from tiny import FAMILIES, awaken, base_model, tokens

BOTH = SequentialAdapterExpert(targets=("o_proj", "mlp"), size=5)


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def definition(expert: SequentialChange, base: Tensor, gate: Tensor) -> Tensor:
    """h + gate * (W_up GELU(W_down h + b_down) + b_up), number by number."""
    down, down_bias = expert.down_weight.tolist(), expert.down_bias.tolist()
    up, up_bias = expert.up_weight.tolist(), expert.up_bias.tolist()
    out = torch.zeros(base.shape, dtype=torch.float64)
    for r in range(base.shape[0]):
        for t in range(base.shape[1]):
            h = base[r, t].tolist()
            inner = [
                gelu(sum(w * one for w, one in zip(row, h, strict=True)) + bias)
                for row, bias in zip(down, down_bias, strict=True)
            ]
            for o in range(base.shape[2]):
                raised = sum(w * one for w, one in zip(up[o], inner, strict=True))
                out[r, t, o] = h[o] + float(gate[r, t, 0]) * (raised + up_bias[o])
    return out


@pytest.mark.parametrize(("length", "d_in", "d_out", "size"), [(1, 1, 1, 1), (3, 5, 2, 4), (2, 3, 11, 7)])
def test_it_reads_the_output_and_adds_to_it(length: int, d_in: int, d_out: int, size: int) -> None:
    expert = SequentialAdapterExpert(size=size).build(site(layer("linear", d_in, d_out), d_in, d_out, "mlp"))
    randomise(expert)
    x, base, gate = inputs(2, length, d_in), inputs(2, length, d_out), gates(2, length)
    ours = base + expert.change(x, base, gate)
    torch.testing.assert_close(ours.double(), definition(expert, base, gate), rtol=1e-5, atol=1e-5)


def test_in_a_model_it_stands_after_the_attention_and_after_the_mlp() -> None:
    model = model_with([BOTH], awake=True)
    assert list(by_path(model)) == [
        f"model.layers.{block}.{path}" for block in (0, 1) for path in ("self_attn.o_proj", "mlp")
    ]
    seen: dict[str, Tensor] = {}
    base = base_model("llama")
    for path, expert in by_path(model).items():

        def add(
            _: object, __: object, output: Tensor, path: str = path, expert: SequentialChange = expert
        ) -> Tensor:
            seen[path] = output
            return definition(expert, output, torch.ones(*output.shape[:2], 1)).float()

        base.get_submodule(path).register_forward_hook(add)
    ids = tokens(1, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(seen) == 4


def test_it_starts_with_a_small_reader_and_a_writer_of_zeros() -> None:
    expert = SequentialAdapterExpert(size=64).build(site(layer("linear", 8, 128), 8, 128, "mlp"))
    assert 0.007 < expert.down_weight.std() < 0.01
    assert expert.down_weight.abs().max() <= 0.02
    assert not any(p.any() for p in (expert.down_bias, expert.up_weight, expert.up_bias))
    assert SequentialAdapterExpert().site_names() == ("mlp",)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_is_bit_equal_to_the_frozen_one(family: str, dtype: torch.dtype) -> None:
    fresh = model_with([BOTH], family=family, dtype=dtype, router=RouterConfig(kind="linear"))
    assert len(experts_of(fresh)) == 4
    assert torch.equal(logits(fresh), logits(base_model(family, dtype)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_parameter_moves_within_three_steps(family: str) -> None:
    assert parameters_that_never_moved([BOTH], family) == []


def test_it_comes_back_bit_equal_however_it_is_loaded(tmp_path: Path) -> None:
    assert ways_of_loading_that_differ([BOTH], tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("mlp", "attention")}, "targets names 'attention': give some of o_proj, mlp"),
        ({"targets": ()}, "targets is empty: give some of o_proj, mlp"),
        ({"targets": "mlp"}, "targets is the text 'mlp'"),
        ({"size": 0}, "size is 0: it must be at least 1"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SequentialAdapterExpert(**fields)


def test_it_reads_the_frozen_mlp_beside_a_parallel_adapter_and_beside_one_of_another_mixture() -> None:
    """It sees neither what a parallel adapter adds to the MLP's output nor what another mixture does."""
    one, other = SequentialAdapterExpert(targets=("mlp",), size=5), ParallelAdapterExpert(size=6)
    router = RouterConfig(kind="linear")
    together = get_peft_model(base_model("llama"), MoAConfig(experts=[one, other], router=router))
    apart = get_peft_model(base_model("llama"), MoAConfig(experts=[one], router=router))
    apart.add_adapter("other", MoAConfig(experts=[other], router=router))
    apart.base_model.set_adapter(["default", "other"])
    for model in (together, apart):
        awaken(model)
        block = model.get_base_model().model.layers[0]
        frozen: list[Tensor] = []
        block.mlp.register_forward_hook(
            lambda mlp, args, output, frozen=frozen: frozen.append(mlp.forward(args[0]))
        )
        told: dict[str, ChangeRecord] = {}
        layer = mixture_layers(model)[0][1]
        layer.change_observer = lambda record, told=told: told.update({record.expert: record})
        logits(model.eval())
        assert told.keys() == {"sequential_adapter", "parallel_adapter"}
        record = told["sequential_adapter"]
        expert = layer.mixtures()["default"].experts["sequential_adapter"]
        expected = expert.change(frozen[0], frozen[0], record.gate)
        torch.testing.assert_close(record.change, expected, rtol=1e-4, atol=1e-5)
