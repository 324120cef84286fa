"""The VeRA expert against its definition and against PEFT's, and its shared random matrices."""

import copy
import gc
import math
import pickle
from pathlib import Path

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file
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
from moa_peft import RouterConfig, UsageError, VeraExpert, mixture_layers
from moa_peft.mixture.experts.vera import VectorChange, shared_matrix
from tiny import FAMILIES, base_model

SIX = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
EVERYWHERE = VeraExpert(targets=SIX, rank=6)


def make(d_in: int, d_out: int, **fields: object) -> VectorChange:
    return VeraExpert(targets=("q_proj",), **fields).build(site(layer("linear", d_in, d_out), d_in, d_out))


def definition(expert: VectorChange, x: Tensor, gate: Tensor) -> Tensor:
    """change_o = gate * b_o * sum_j B_oj d_j sum_i A_ji x_i."""
    a, up, d, b = (p.detach().double() for p in (expert.A, expert.B, expert.d, expert.b))
    out = torch.zeros(*x.shape[:2], len(b), dtype=torch.float64)
    for r in range(x.shape[0]):
        for t in range(x.shape[1]):
            inner = [
                float(d[j]) * sum(float(a[j, i]) * float(x[r, t, i]) for i in range(a.shape[1]))
                for j in range(len(d))
            ]
            for o in range(len(b)):
                whole = sum(float(up[o, j]) * inner[j] for j in range(len(d)))
                out[r, t, o] = float(gate[r, t, 0]) * float(b[o]) * whole
    return out


@pytest.mark.parametrize(
    ("length", "d_in", "d_out", "rank"), [(1, 1, 1, 1), (3, 5, 2, 4), (2, 7, 11, 3), (2, 4, 4, 16)]
)
def test_the_change_is_two_vectors_around_two_matrices(length: int, d_in: int, d_out: int, rank: int) -> None:
    expert = make(d_in, d_out, rank=rank)
    randomise(expert)
    x, gate = inputs(2, length, d_in), gates(2, length)
    ours = expert.change(x, torch.zeros(2, length, d_out), gate)
    torch.testing.assert_close(ours.double(), definition(expert, x, gate), rtol=1e-5, atol=1e-5)


def test_only_the_two_vectors_are_trained_and_they_start_as_in_the_paper() -> None:
    expert = make(5, 3)
    assert {name: p.tolist() for name, p in expert.named_parameters()} == {
        "d": pytest.approx([0.1] * 256),
        "b": [0.0] * 3,
    }
    assert make(5, 3, initial=2, rank=2).d.tolist() == [2.0, 2.0]


def test_the_matrices_are_uniform_within_the_kaiming_bound_and_independent_of_each_other() -> None:
    expert = make(64, 64, rank=64)
    for matrix in (expert.A, expert.B):
        bound = math.sqrt(6 / 64)
        assert 0.99 * bound < matrix.abs().max() <= bound
        assert abs(matrix.std().item() - bound / math.sqrt(3)) < 0.02 * bound
    together = torch.corrcoef(torch.stack([expert.A.flatten(), expert.B.flatten()]))
    assert abs(together[0, 1]) < 0.05
    assert not torch.equal(make(64, 64, rank=64, seed=1).A, expert.A)


def test_the_matrices_of_a_seed_never_change_or_saved_adapters_would() -> None:
    """The figures are those of ``torch.empty(2, 3).uniform_(-2 ** .5, 2 ** .5, generator=...)`` seeded with 14."""
    drawn = torch.empty(2, 3).uniform_(
        -math.sqrt(2), math.sqrt(2), generator=torch.Generator().manual_seed(14)
    )
    assert torch.equal(make(3, 4, rank=2, seed=7).A, drawn)
    assert [round(one, 4) for one in drawn.flatten().tolist()] == [
        0.1966,
        -1.4009,
        1.2169,
        0.6385,
        0.9319,
        0.7589,
    ]


def storages(model: torch.nn.Module) -> set[tuple[tuple[int, ...], int]]:
    return {(tuple(m.shape), m.data_ptr()) for e in experts_of(model).values() for m in (e.A, e.B)}


def test_sites_and_blocks_share_one_matrix_of_each_size_also_after_moves_and_casts() -> None:
    model = model_with([EVERYWHERE])
    sizes = {(6, 32), (6, 44), (32, 6), (16, 6), (44, 6)}
    for change in (lambda: None, model.double, model.bfloat16, lambda: model.to("cpu"), model.float):
        change()
        assert {shape for shape, _ in storages(model)} == sizes
        assert len(storages(model)) == len(sizes)
        assert {e.A.dtype for e in experts_of(model).values()} == {next(model.parameters()).dtype}


def test_a_cast_there_and_back_gives_the_very_bits_of_the_seed() -> None:
    model = model_with([EVERYWHERE], awake=True)
    before = {key: (e.A.clone(), e.B.clone()) for key, e in experts_of(model).items()}
    model.bfloat16()
    model.float()
    for key, expert in experts_of(model).items():
        assert torch.equal(expert.A, before[key][0])
        assert torch.equal(expert.B, before[key][1])


def test_models_share_too_and_nobody_keeps_a_matrix_that_no_model_holds() -> None:
    one, two = make(10, 3, rank=2, seed=99), make(10, 5, rank=2, seed=99)
    assert one.A.data_ptr() == two.A.data_ptr()
    held = shared_matrix(2 * 99, 2, 10, torch.zeros(1))
    assert held.data_ptr() == one.A.data_ptr()
    from moa_peft.mixture.experts import vera

    del one, two, held
    gc.collect()
    assert not [key for key in vera._MATRICES if key[0] == 2 * 99]


def test_a_matrix_drawn_while_inferring_trains_another_model() -> None:
    with torch.inference_mode():
        drawn = shared_matrix(77, 5, 7, torch.empty(0))
    assert not drawn.is_inference()


def test_a_checkpoint_holds_the_vectors_alone(tmp_path: Path) -> None:
    model_with([EVERYWHERE]).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {"d", "b"}
    assert len(saved) == 2 * 2 * len(SIX)


def test_it_comes_back_bit_equal_however_it_is_loaded(tmp_path: Path) -> None:
    assert ways_of_loading_that_differ([EVERYWHERE], tmp_path) == []


def test_copies_and_pickles_compute_the_same_and_by_themselves() -> None:
    model = model_with([EVERYWHERE], awake=True)
    expected = logits(model)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert len(storages(twin)) == len(storages(thawed)) == 5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(thawed), expected)


def test_on_the_meta_device_the_matrices_have_no_values_until_they_get_a_real_one() -> None:
    with torch.device("meta"):
        expert = make(5, 3, rank=2)
    assert expert.A.is_meta
    assert expert.B.is_meta
    expert.to_empty(device="cpu")
    assert torch.equal(expert.A, make(5, 3, rank=2).A)
    assert torch.equal(expert.B, make(5, 3, rank=2).B)


def test_a_second_adapter_with_another_seed_has_matrices_of_its_own() -> None:
    model = model_with([EVERYWHERE])
    from moa_peft import MoAConfig

    model.add_adapter(
        "second", MoAConfig(experts=[VeraExpert(targets=("q_proj",), rank=6, seed=1)], router=None)
    )
    mixtures = mixture_layers(model)[0][1].mixtures()
    one, other = (mixtures[name].experts["vera_q_proj"] for name in ("default", "second"))
    assert (one.A - other.A).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_is_bit_equal_to_the_frozen_one(family: str, dtype: torch.dtype) -> None:
    fresh = model_with([EVERYWHERE], family=family, dtype=dtype, router=RouterConfig(kind="linear"))
    assert torch.equal(logits(fresh), logits(base_model(family, dtype)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_parameter_moves_within_three_steps(family: str) -> None:
    assert parameters_that_never_moved([EVERYWHERE], family) == []


def test_the_logits_are_those_of_pefts_vera_with_the_same_matrices_and_vectors() -> None:
    config = VeraConfig(r=6, target_modules=list(SIX), task_type="CAUSAL_LM")
    peft = get_peft_model(base_model("llama"), config)
    ours = model_with([EVERYWHERE], awake=True)
    experts, found = by_path(ours), 0
    for path, module in peft.get_base_model().named_modules():
        if not hasattr(module, "vera_lambda_b"):
            continue
        expert, found = experts[path], found + 1
        expert.A = module.vera_A["default"][:, : module.in_features].clone()
        expert.B = module.vera_B["default"][: module.out_features].clone()
        module.vera_lambda_d["default"].data = expert.d.detach().clone()
        module.vera_lambda_b["default"].data = expert.b.detach().clone()
    assert found == len(experts)
    torch.testing.assert_close(logits(ours), logits(peft), rtol=1e-5, atol=1e-5)
    assert (logits(ours) - logits(base_model("llama"))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ()}, "targets is empty"),
        ({"rank": 0, "initial": 0}, "rank is 0: it must be at least 1; initial is 0: neither vector"),
        ({"seed": -1}, r"seed is -1: it must lie in \[0, 2 \*\* 31\)"),
        ({"seed": 2**31}, r"seed is 2147483648: it must lie in"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VeraExpert(**{"targets": ("q_proj",), **fields})
