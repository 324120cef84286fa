"""Two processes over gloo: DDP, FSDP1 and FSDP2."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from moa_peft import parameter_groups
from ranks import (
    DDP_CASES,
    FSDP1_METHODS,
    FSDP_CASES,
    RANKS,
    answer_tokens,
    global_batch,
    reloaded,
    run_all,
    summed_loss,
)
from tiny import mixture_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes saved."""
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_all, (str(path),), nprocs=RANKS)
    return path


def check_gradients(theirs: dict[str, Tensor | None], family: str, method: str) -> None:
    """Compare two processes' gradients with those of one that has the whole batch."""
    model = mixture_model(family, method).train()
    ids, labels = global_batch()
    (summed_loss(model(input_ids=ids).logits, labels) / answer_tokens(labels)).backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    # A bias of one number is a sum of terms that cancel: its rounding is measured against the largest gradient.
    largest = max(gradient.abs().max().item() for gradient in ours.values() if gradient is not None)
    for name, gradient in ours.items():
        their = theirs[name]
        assert gradient is not None, name
        assert their is not None, name
        assert (their - gradient).abs().max().item() <= 1e-6 * max(gradient.abs().max().item(), largest), name


@pytest.mark.parametrize(("family", "method"), DDP_CASES)
def test_ddp_gradients_equal_the_single_processs_with_unequal_answers_and_no_unused_parameters(
    folder: Path, family: str, method: str
) -> None:
    check_gradients(torch.load(folder / f"ddp-{family}-{method}.pt"), family, method)


@pytest.mark.parametrize("method", FSDP1_METHODS)
def test_fsdp1_with_pefts_wrap_policy_gives_the_gradients_of_a_single_process(
    folder: Path, method: str
) -> None:
    """Routers were once linear modules, each a unit of the policy that was never called and so never gathered."""
    saved = torch.load(folder / f"fsdp1-{method}.pt")
    assert len(saved["units"]) == 3  # the model and its two blocks
    check_gradients(saved["gradients"], "llama", method)


@pytest.mark.parametrize(("method", "dtype"), FSDP_CASES)
def test_fsdp2_trains_and_saves_a_full_adapter_that_reloads_equal(
    folder: Path, method: str, dtype: torch.dtype
) -> None:
    saved = torch.load(folder / f"fsdp-{method}-{dtype}.pt")
    assert saved["losses"][-1] < saved["losses"][0]
    model = reloaded(method, dtype, saved["adapter"])
    ids, _ = global_batch()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.equal(logits, saved["logits"])
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(saved["adapter"]) == len(state)
    groups = parameter_groups(model, learning_rate=0.1)
    assert saved["groups"] == {one["name"]: [name for name, _ in one["params"]] for one in groups}
