"""torch.compile: one graph, with the numbers of the eager pass."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moa_peft.mixture.token_watch import prompt_lengths
from tiny import CASES, FAMILIES, largest, mixture_model, tokens

COMPILED = [(family, "everything") for family in FAMILIES] + [
    (family, method) for family, method in CASES if family == "llama" and method != "everything"
]


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
