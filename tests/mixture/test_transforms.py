"""What torch makes of a mixture beside a forward and a backward pass: it is plain torch, so each works as for any module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from moa_peft.mixture.token_watch import prompt_lengths
from tiny import METHODS, largest, mixture_model, tokens

FEW = ("soft-moa", "sparse-moa", "copies", "instance-moa", "topk-moe-lora", "extra-kinds")


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def loss_of(model: PeftModel, parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
    call = {"use_cache": False, **prompt_lengths(model, [ids.shape[1]])}
    logits = functional_call(model, parameters, (ids,), call).logits
    return logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean().neg()


LIMIT = 1e-4


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Give the largest difference of a tensor, relative to it or to a hundredth of the largest one."""
    size = max(one.abs().max().item() for one in expected.values())
    assert found.keys() == expected.keys()
    apart = {
        name: largest(found[name], one) / max(one.abs().max().item(), 1e-2 * size)
        for name, one in expected.items()
    }
    assert not {name: one for name, one in apart.items() if one > LIMIT}
    return max(apart.values())


def backward_gradients(model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    names = trained(model)
    found = torch.autograd.grad(loss_of(model, dict(names), ids), list(names.values()), allow_unused=True)
    return {
        name: torch.zeros_like(names[name]) if one is None else one
        for name, one in zip(names, found, strict=True)
    }


@pytest.mark.parametrize("method", FEW)
def test_func_grad_gives_the_gradients_of_backward(method: str, note_run: Callable[..., None]) -> None:
    """It once ended in "Cannot access data pointer"."""
    model = mixture_model("llama", method).train()
    ids = tokens(2, 6)
    found = grad(lambda given: loss_of(model, given, ids))(trained(model))
    apart = close(found, backward_gradients(model, ids))
    ran = "`torch.func.grad` of a loss by `functional_call`"
    note_run(
        "torch.func.grad", f"llama {method}", ran=ran, compared="gradients", difference=apart, limit=LIMIT
    )


def test_gradients_of_single_samples_are_those_of_single_calls() -> None:
    model = mixture_model("llama", "sparse-moa", attention="eager").train()
    ids = tokens(3, 6)
    one_by_one = [backward_gradients(model, row[None]) for row in ids]

    def of_sample(given: dict[str, Tensor], row: Tensor) -> Tensor:
        return loss_of(model, given, row[None])

    found = vmap(grad(of_sample), in_dims=(None, 0))(trained(model), ids)
    for row, expected in enumerate(one_by_one):
        close({name: one[row] for name, one in found.items()}, expected)


@pytest.mark.parametrize("method", FEW)
def test_a_second_backward_pass_reaches_every_parameter_that_the_first_one_does(method: str) -> None:
    model = mixture_model(
        "llama", method, attention="eager"
    ).train()  # sdpa has no second derivative on a CPU
    names = trained(model)
    first = torch.autograd.grad(
        loss_of(model, dict(names), tokens(2, 6)), list(names.values()), create_graph=True, allow_unused=True
    )
    size = sum(one.square().sum() for one in first if one is not None)
    assert isinstance(size, Tensor)
    size.backward()
    unreached = [
        name
        for (name, one), gradient in zip(names.items(), first, strict=True)
        if gradient is not None and (one.grad is None or not one.grad.isfinite().all())
    ]
    assert not unreached


@pytest.mark.parametrize("method", ["soft-moa", "soft-moa-hydra", "instance-moa", "molora"])
def test_second_derivatives_equal_differences_of_first_ones(
    method: str, note_run: Callable[..., None]
) -> None:
    model = (
        mixture_model("gpt2", method, attention="eager").double().train()
    )  # Llama's norm is float32 always
    ids = tokens(2, 5)
    names = trained(model)
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in names.values()]

    def first() -> list[Tensor]:
        loss = loss_of(model, dict(names), ids)
        return list(torch.autograd.grad(loss, list(names.values()), create_graph=True))

    slope = sum((one * way).sum() for one, way in zip(first(), along, strict=True))
    assert isinstance(slope, Tensor)
    found = torch.autograd.grad(slope, list(names.values()), allow_unused=True)
    step = 1e-6
    ends: list[list[Tensor]] = []
    for sign in (1, -1):
        for one, way in zip(names.values(), along, strict=True):
            one.data.add_(way, alpha=sign * step)
        ends.append([one.detach() for one in first()])
        for one, way in zip(names.values(), along, strict=True):
            one.data.sub_(way, alpha=sign * step)
    expected = {name: (up - down) / (2 * step) for name, up, down in zip(names, *ends, strict=True)}
    second = {n: torch.zeros(()) if one is None else one for n, one in zip(names, found, strict=True)}
    apart = close(second, expected)
    ran = "second derivatives by `create_graph=True` in float64, and by differences of first ones"
    note_run(
        "Double backward", f"gpt2 {method}", ran=ran, compared="derivatives", difference=apart, limit=LIMIT
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_exported_program_gives_the_models_logits(method: str, note_run: Callable[..., None]) -> None:
    model: Any = mixture_model("llama", method).requires_grad_(False)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False, **prompt_lengths(model, [ids.shape[1]])).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (tokens(),)).module()
        apart = max(largest(program(ids), model(ids).logits) for ids in (tokens(), tokens(seed=5)))
    assert apart <= 1e-5
    ran = "`torch.export.export` of the forward pass, called with other tokens"
    note_run("torch.export", f"llama {method}", ran=ran, compared="logits", difference=apart, limit=1e-5)
