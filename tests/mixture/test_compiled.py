"""torch.compile: one graph, with the numbers of the eager pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CompileConfig

from moa_peft.mixture.token_watch import prompt_lengths
from tiny import CASES, largest, mixture_model, tokens

WITHOUT_ROUTER = ("lora", "parallel-adapter", "prompt-tuning")
COMPILED = [(family, "everything") for family in ("llama", "gemma3", "phi3", "gpt_neox", "gpt2")] + [
    (family, method)
    for family, method in CASES
    if family == "llama"
    and method not in ("everything", "exact-start", "hydralora", "unipeft", "instance-kinds", *WITHOUT_ROUTER)
]
"""Families with projections of each form, and methods with arithmetic of their own; "everything" has the experts of those without a
router."""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), COMPILED)
def test_the_forward_compiles_without_a_graph_break_and_its_backward_runs(family: str, method: str) -> None:
    torch._dynamo.reset()
    ids = tokens()
    model = mixture_model(family, method)
    model.train()

    def outside_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    call = {"input_ids": ids, **prompt_lengths(model, [ids.shape[1]])}
    eager = model(**call).logits
    outside_loss(eager).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**call).logits
    outside_loss(compiled).backward()
    assert largest(compiled, eager) < 1e-5 * max(1.0, eager.abs().max().item())
    size = max(one.abs().max().item() for one in expected.values() if one is not None)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            theirs, ours = expected[name], parameter.grad
            assert theirs is not None, name
            assert ours is not None, name
            # a threshold's bias is one number, a sum of terms that cancel
            assert largest(ours, theirs) <= 1e-4 * max(theirs.abs().max().item(), 1e-2 * size), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soft-moa", "everything", "instance-moa"])
def test_generation_on_a_static_cache_compiles_without_a_graph_break_and_gives_the_same_tokens(
    method: str, note_run: Callable[..., None]
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = mixture_model("llama", method), tokens(2, 7)
    common = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    eager = model.generate(**common, pad_token_id=0)
    whole = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    whole._compile_all_devices = True  # on a CPU too
    static = model.generate(**common, pad_token_id=0, cache_implementation="static", compile_config=whole)
    assert torch.equal(static, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    ran = 'generation, `cache_implementation="static"`, `CompileConfig(fullgraph=True, backend="aot_eager")`'
    note_run(
        "torch.compile, static cache",
        f"llama {method}",
        ran=ran,
        compared="tokens",
        difference=0.0,
        limit=0.0,
    )
