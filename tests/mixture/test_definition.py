"""The package against the definition (`oracle`), in float32 and with a bfloat16 base."""

from functools import partial

import pytest
import torch
from torch import Tensor

from moa_peft import GateRecord, mixture_layers
from oracle import oracle_run
from tiny import CASES, mixture_model, tokens

every_case = pytest.mark.parametrize(
    ("family", "method"),
    [
        case for case in CASES if case[1] != "extra-kinds"
    ],  # each of those kinds has its definition in its own test
)


@every_case
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 7)])
def test_float32_equals_the_float64_plain_loop(family: str, method: str, rows: int, length: int) -> None:
    ids = tokens(rows, length)
    model = mixture_model(family, method)
    with torch.no_grad():
        ours = model(ids).logits.double()
    truth, _ = oracle_run(family, model, ids, torch.float64, torch.float32)
    limit = 1e-5 * max(1.0, truth.abs().max().item())
    error = (ours - truth).abs().max()
    if error > limit:  # some gates magnify rounding: then the loop in float32 is no closer
        plain, _ = oracle_run(family, model, ids, torch.float32, torch.float32)
        limit = 2 * (plain.double() - truth).abs().max().item()
    assert error < min(limit, 1e-3)


def note_active(seen: set[tuple[str, int, int, int]], record: GateRecord) -> None:
    gates = record.gates.expand(1, 5, -1)  # an instance has the same for all tokens
    seen |= {(record.router, *place) for place in (gates > 0).nonzero().tolist()}


@pytest.mark.slow
@every_case
def test_a_bfloat16_base_with_float32_adapters_is_as_close_to_float64_as_the_plain_loop(
    family: str, method: str
) -> None:
    model = mixture_model(family, method, dtype=torch.bfloat16)
    for parameter in model.parameters():  # every run below sees the same values
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            parameter.data = parameter.data.bfloat16().float()
    recorded: list[set[tuple[str, int, int, int]]] = [set() for _ in mixture_layers(model)]
    for seen, (_, layer) in zip(recorded, mixture_layers(model), strict=True):
        layer.observer = partial(note_active, seen)
    squares: list[tuple[Tensor, Tensor, Tensor]] = []
    for seed in range(
        100
    ):  # a score within rounding of its threshold may fall on either side: try other tokens
        ids = tokens(1, 5, seed=seed)
        for seen in recorded:
            seen.clear()
        truth, active = oracle_run(family, model, ids, torch.float64, torch.bfloat16)
        plain, plain_active = oracle_run(family, model, ids, torch.bfloat16, torch.bfloat16)
        with torch.no_grad():
            ours = model(ids).logits.double()
        if active == recorded == plain_active:
            squares.append(((ours - truth).square(), (plain.double() - truth).square(), truth.square()))
        if len(squares) == 3:
            break
    assert squares, "no seed gives the same active experts in bfloat16 and in float64"
    our_error, plain_error, size = (torch.stack(one).mean().sqrt() for one in zip(*squares, strict=True))
    assert our_error <= plain_error + torch.finfo(torch.bfloat16).eps * size
