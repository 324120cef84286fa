"""What only a CUDA device shows: joined experts make the numbers of single ones there, and no pass waits for the device."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from moa_peft.bench.subjects import one_by_one
from tiny import METHODS, base_model, cached, mixture_model, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


def joined_and_apart(model: PeftModel, what: Callable[[], Any]) -> tuple[Any, Any]:
    joined = what()
    with one_by_one(model):
        return joined, what()


@pytest.mark.parametrize("method", METHODS)
def test_output_and_every_gradient_equal_those_of_experts_asked_one_by_one(method: str) -> None:
    model = mixture_model("llama", method).to(DEVICE).train()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    ids = tokens().to(DEVICE)

    def step() -> tuple[Tensor, ...]:
        output = model(input_ids=ids, labels=ids, use_cache=False)
        gradients = torch.autograd.grad(output.loss, list(trained.values()), allow_unused=True)
        return output.logits.detach(), *[torch.zeros(()) if one is None else one for one in gradients]

    for name, one, other in zip(["logits", *trained], *joined_and_apart(model, step), strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("soft-moa", torch.float32),
        ("sparse-moa", torch.float32),  # in half precision a score near its threshold may fall on either side
        ("soft-moa", torch.bfloat16),
        ("molora", torch.bfloat16),
        ("lora", torch.bfloat16),
    ],
)
def test_cached_steps_equal_those_of_experts_asked_one_by_one(method: str, dtype: torch.dtype) -> None:
    model = mixture_model("llama", method, dtype=dtype).to(DEVICE)
    ids = tokens().to(DEVICE)

    @torch.no_grad()
    def decoded() -> Tensor:
        past = cached(model(ids, use_cache=True))
        steps = [model(ids[:, :1], **past, use_cache=True).logits.float() for _ in range(4)]
        return torch.cat(steps, 1)

    one, other = joined_and_apart(model, decoded)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(other.abs().max())
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Collect where the host waits for the device."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
            found += [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_is_seen() -> None:
    with waits() as found:
        torch.ones((), device=DEVICE).item()
    assert found


@pytest.mark.parametrize("method", METHODS)
def test_a_mixture_waits_no_more_often_for_the_device_than_the_frozen_model(method: str) -> None:
    ids = tokens().to(DEVICE)

    def passes(model: Any) -> int:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with waits() as found:
            model.train()(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
            model.eval()
            with torch.no_grad():
                past = cached(model(ids, use_cache=True))
                for _ in range(2):
                    model(ids[:, :1], **past, use_cache=True)
        return len(found)

    assert passes(mixture_model("llama", method).to(DEVICE)) <= passes(base_model("llama").to(DEVICE))
