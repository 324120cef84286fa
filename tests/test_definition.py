"""The package against the definition (`oracle`), in float32 and with a bfloat16 base."""

import pytest
import torch
from torch import Tensor

from moa_peft import mixture_layers
from oracle import oracle_run
from tiny import FAMILIES, METHODS, mixture_model, tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 7)])
def test_float32_equals_the_float64_plain_loop(family: str, method: str, rows: int, length: int) -> None:
    ids = tokens(rows, length)
    model = mixture_model(family, method)
    with torch.no_grad():
        ours = model(ids).logits.double()
    truth, _ = oracle_run(family, model, ids, torch.float64, torch.float32)
    assert (ours - truth).abs().max() < 1e-5 * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_base_with_float32_adapters_is_as_close_to_float64_as_the_plain_loop(
    family: str, method: str
) -> None:
    model = mixture_model(family, method, dtype=torch.bfloat16)
    for parameter in model.parameters():  # every run below sees the same values
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            parameter.data = parameter.data.bfloat16().float()
    recorded: list[Tensor] = []
    for _, layer in mixture_layers(model):
        layer.observer = lambda record: recorded.append(record.gates > 0)
    for seed in range(
        50
    ):  # a score within rounding of its threshold may fall on either side of it: try others
        ids = tokens(1, 5, seed=seed)
        recorded.clear()
        truth, active = oracle_run(family, model, ids, torch.float64, torch.bfloat16)
        plain, plain_active = oracle_run(family, model, ids, torch.bfloat16, torch.bfloat16)
        with torch.no_grad():
            ours = model(ids).logits.double()
        if all(map(torch.equal, active, recorded)) and all(map(torch.equal, active, plain_active)):
            break
    else:
        pytest.fail("no seed gives the same active experts in bfloat16 and in float64")
    slack = 2 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= (plain.double() - truth).abs().max() + slack
