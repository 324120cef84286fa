"""Counts what a method costs at the sizes of LLaMA-3.1-8B, without weights: parameters, and operations of the products."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

LLAMA_31_8B: Mapping[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""The sizes of LLaMA-3.1-8B, on which everything is counted."""

BLOCKS: int = LLAMA_31_8B["num_hidden_layers"]
ONE_BLOCK = {**LLAMA_31_8B, "num_hidden_layers": 1}
"""A model of one block. A method does the same in each, so one block's experts are counted."""

SEQUENCE = 1024
"""Tokens of the one sequence in which operations are counted."""

BASELINE = "lora"
"""The method that the others' operations are held against."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations (a multiplication and an addition are two) of all matrix products, for each token."""

    sequence: float
    """In a forward pass over one sequence of `SEQUENCE` tokens."""
    decoding: float
    """In the decoding step that follows, of one token with the sequence in its cache."""


@cache
def trainable_parameters(method: str, router_kind: str | None = None) -> int:
    """Count a method's trainable parameters; with a kind of router, those with its blocks' router changed to it."""
    changes = {} if router_kind is None else {"router": {"kind": router_kind}}
    parameters = _model(method, ONE_BLOCK, changes).parameters()
    return BLOCKS * sum(one.numel() for one in parameters if one.requires_grad)


@cache
def gate_parameters(method: str) -> int:
    """Count the parameters of one of a block router's gates, where the router is linear, in all blocks."""
    from moa_peft import mixture_layers

    ((_, layer),) = mixture_layers(_model(method, ONE_BLOCK, {}))
    (mixture,) = layer.mixtures().values()
    assert mixture.router is not None, f"{method} has no router of its blocks"
    parameters = sum(one.numel() for one in mixture.router.logits.parameters())
    assert parameters % len(mixture.gate_names) == 0, "a linear router has as many parameters for each gate"
    return BLOCKS * parameters // len(mixture.gate_names)


@cache
def added_operations(method: str) -> Operations:
    """Count what a method adds to the frozen model."""
    with_method, without = _count(_model(method, ONE_BLOCK, {})), _count(_model(None, ONE_BLOCK, {}))
    return Operations(
        sequence=BLOCKS * (with_method.sequence - without.sequence),
        decoding=BLOCKS * (with_method.decoding - without.decoding),
    )


@cache
def frozen_operations() -> Operations:
    """Count the frozen model's own, its head included."""
    return _count(_model(None, LLAMA_31_8B, {}))


def _model(method: str | None, sizes: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """Build the model, with a method unless it is None, on the meta device."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from moa_peft import MoAConfig

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**{**sizes, "attn_implementation": "eager"}))
    return base if method is None else get_peft_model(base, MoAConfig.preset(method, **changes))


def _count(model: Any) -> Operations:
    """Run a model on tensors that have sizes but no data, under torch's own counter."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from moa_peft import packed_weights
    from moa_peft.mixture.gate_cache import cache_of

    def operations(tokens: int, seen: int, past: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        mask = torch.zeros(
            1, 1, tokens, seen
        )  # four dimensions: what a token sees is not asked of its values
        with FlopCounterMode(display=False) as counter:
            output = model(
                input_ids=torch.zeros(1, tokens, dtype=torch.long),
                attention_mask=mask,
                use_cache=True,
                **past,
            )
        return counter.get_total_flops(), dict([cache_of(output)])

    with FakeTensorMode(), torch.no_grad(), packed_weights(model):  # as `generate` does
        for module in model.eval().modules():
            for held in (module._parameters, module._buffers):
                held.update({name: _fake(one) for name, one in held.items() if one is not None})
        sequence, past = operations(SEQUENCE, SEQUENCE, {})
        decoding, _ = operations(1, SEQUENCE + 1, past)
    return Operations(sequence=sequence / SEQUENCE, decoding=decoding)


def _fake(tensor: Any) -> Any:
    """A tensor on the CPU, of the same sizes and kind, without data: some code has no path for the meta device."""
    import torch

    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made
