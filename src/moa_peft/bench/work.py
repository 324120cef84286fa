"""The pieces of work that are timed, and what is counted of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moa_peft.bench.subjects import trainable
from moa_peft.mixture.token_watch import prompt_lengths


def synchronise(model: nn.Module) -> None:
    """Wait for the model's device."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


def random_tokens(model: nn.Module, batch_size: int, length: int) -> Tensor:
    """The same random token ids for every method, [B, T]."""
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]  # every language model's
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (batch_size, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def training_step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward, the embeddings' output with a gradient, for the frozen model too; no optimiser."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)  # type: ignore[operator]  # a language model's
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    for parameter in trainable(model):
        parameter.grad = None


@torch.inference_mode()
def decode(model: nn.Module, ids: Tensor, new_tokens: int) -> None:
    """Read prompts and continue each by so many greedy tokens with a cache."""
    model.generate(  # type: ignore[operator]  # a language model's
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a batch, in evaluation mode."""
    was_training = model.training
    model.eval()
    found = model(input_ids=ids, use_cache=False, **prompt_lengths(model, [ids.shape[1]])).logits
    model.train(was_training)
    return found


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass: each storage once, parameters and buffers excluded."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor.detach()  # a node that held its own output would never be freed

    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)  # type: ignore[operator]  # a language model's
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
    del loss
    return sum(storage.nbytes() for storage in seen.values())


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's
        result = func(*args, **(kwargs or {}))
        self.all += 1
        self.kernels += not ((func.is_view or func in _VIEWS) and _is_of(result, args[0]))
        return result


_VIEWS = (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)


def _is_of(result: Any, given: Any) -> bool:
    """Whether a view is one: a cast or a change of layout, which could have given its input back, may have copied."""
    first = result[0] if isinstance(result, (list, tuple)) else result
    return first.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def operators(model: nn.Module, ids: Tensor) -> tuple[int, int]:
    """Operators of a training forward pass, all and without views."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)  # type: ignore[operator]  # a language model's
    with _Operators() as count:
        model(inputs_embeds=embedded, labels=ids, use_cache=False)
    return count.all, count.kernels


def decoding_operators(model: nn.Module, ids: Tensor) -> tuple[int, int]:
    """Operators of one step of cached generation, all and without views: what a third new token adds to two."""
    counts: list[_Operators] = []
    for new_tokens in (2, 3):
        with _Operators() as count:
            decode(model, ids, new_tokens)
        counts.append(count)
    two, three = counts
    return three.all - two.all, three.kernels - two.kernels


def flops(work: Callable[[], None]) -> float:
    """Floating-point operations of matrix products and attention in a piece of work."""
    with FlopCounterMode(display=False) as count:
        work()
    return float(count.get_total_flops())
