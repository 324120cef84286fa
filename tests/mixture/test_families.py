"""What must hold for every family of models and every method: one table."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from tiny import CASES, FAMILIES, awaken, base_model, largest, mixture_model, tokens

every_family = pytest.mark.parametrize("family", FAMILIES)
every_case = pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*case, marks=[] if case[0] == "llama" else pytest.mark.slow) for case in CASES],
)
"""Families other than Llama are marked slow."""


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_parallel_adapter_a_fresh_model_is_bit_equal_to_the_frozen_one(
    family: str, dtype: torch.dtype
) -> None:
    ids = tokens()
    with torch.no_grad():
        frozen = base_model(family, dtype)(ids).logits
        fresh = mixture_model(family, "exact-start", dtype=dtype, awake=False)(ids).logits
    assert torch.equal(fresh, frozen)


@every_family
@pytest.mark.parametrize("method", ["soft-moa", "sparse-moa", "everything"])
def test_with_the_parallel_adapter_a_fresh_model_differs_by_its_initialisation_only(
    family: str, method: str
) -> None:
    ids = tokens()
    with torch.no_grad():
        frozen = base_model(family)(ids).logits
        fresh = mixture_model(family, method, awake=False)(ids).logits
    assert largest(fresh, frozen) < 1e-4


def train_steps(model: torch.nn.Module, ids: Tensor, steps: int) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()


@every_case
def test_every_trainable_parameter_moves_within_three_steps_also_after_an_evaluation_pass(
    family: str, method: str
) -> None:
    model = mixture_model(family, method, awake=False)
    ids = tokens()
    with torch.no_grad():
        model.eval()(ids)  # must leave nothing behind that a training step reuses
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model, ids, 3)
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    moved = [n for n, p in model.named_parameters() if not p.requires_grad and not torch.equal(p, before[n])]
    assert not still, f"never moved: {still}"
    assert not moved, f"frozen, but moved: {moved}"


@every_case
def test_a_disabled_adapter_is_bit_equal_to_the_frozen_model_after_training(family: str, method: str) -> None:
    ids = tokens()
    with torch.no_grad():
        frozen = base_model(family)(ids).logits
    model = mixture_model(family, method)
    train_steps(model, ids, 1)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        disabled = model(ids).logits
    with torch.no_grad():
        enabled = model(ids).logits
    assert torch.equal(disabled, frozen)
    assert largest(enabled, frozen) > 1e-3


@every_case
def test_eager_and_sdpa_attention_agree(family: str, method: str) -> None:
    if FAMILIES[family].attention_implementations == ("eager",):
        pytest.skip("the family's own attention is eager only")
    ids = tokens()
    with torch.no_grad():
        sdpa = mixture_model(family, method, attention="sdpa")(ids).logits
        eager = mixture_model(family, method, attention="eager")(ids).logits
    assert largest(sdpa, eager) < 1e-5 * max(1.0, sdpa.abs().max().item())


def greedy(model: torch.nn.Module, ids: Tensor, mask: Tensor, use_cache: bool) -> Tensor:
    settings = GenerationConfig(max_new_tokens=20, do_sample=False, use_cache=use_cache, pad_token_id=0)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return out[:, ids.shape[1] :]


@every_case
def test_greedy_tokens_do_not_depend_on_cache_batch_or_left_padding(family: str, method: str) -> None:
    model = mixture_model(family, method)
    lengths, width = (5, 9, 7), 9
    rows = [tokens(1, length, seed=length) for length in lengths]
    padded = torch.cat([F.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    together = greedy(model, padded, mask, use_cache=True)
    for row, ours in zip(rows, together, strict=True):
        alone = torch.ones_like(row)
        assert torch.equal(greedy(model, row, alone, use_cache=True)[0], ours)
        assert torch.equal(greedy(model, row, alone, use_cache=False)[0], ours)


@every_case
def test_a_row_does_not_depend_on_its_batch_or_its_padding(family: str, method: str) -> None:
    model = mixture_model(family, method)
    ids = tokens(3, 8)
    mask = torch.tensor([[0] * pad + [1] * (8 - pad) for pad in (0, 3, 5)])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, pad in enumerate((0, 3, 5)):
            alone = model(input_ids=ids[row : row + 1, pad:]).logits[0]
            assert largest(batch[row, pad:], alone) < 1e-5 * max(1.0, alone.abs().max().item())


def gradients(family: str, method: str, checkpointing: bool | None, ids: Tensor) -> dict[str, Tensor]:
    model = mixture_model(family, method)
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@every_case
def test_gradients_are_bit_equal_with_every_kind_of_checkpointing(family: str, method: str) -> None:
    ids = tokens()
    plain = gradients(family, method, None, ids)
    for reentrant in (False, True):
        checkpointed = gradients(family, method, reentrant, ids)
        assert plain.keys() == checkpointed.keys()
        differ = [name for name in plain if not torch.equal(plain[name], checkpointed[name])]
        assert not differ, f"use_reentrant={reentrant}: {differ}"


@every_case
def test_no_gate_survives_a_forward_or_a_recomputed_backward_pass(family: str, method: str) -> None:
    from moa_peft import mixture_layers

    model = mixture_model(family, method)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert not any(layer._state.passes for _, layer in mixture_layers(model))


def test_awaken_really_changes_the_output() -> None:
    """The table is worthless if the experts it tests are silent."""
    model = mixture_model("llama", "everything", awake=False)
    with torch.no_grad():
        before = model(tokens()).logits
        awaken(model)
        assert largest(model(tokens()).logits, before) > 0.1
