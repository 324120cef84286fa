"""The fused arithmetic: one product for everything that reads an input, one accumulation into a site's output.

It computes what the experts' own ``change`` methods compute, which stay as the definition. What it saves: the input is
read once however many experts and routers read it, gates touch vectors of the bottleneck's size alone, the change is
added in place of the frozen output, and the backward pass keeps the input, or what the frozen model keeps anyway, and
little else.

Sizes: M tokens (all leading sizes flattened), D_in and D_out of a site, K rows of all stacked down-projections, N copies of an
expert, r size of its bottleneck.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moa_peft.products import at_least_float32


class Term(NamedTuple):
    """One expert's part of the change at a site: ``up (gate * scale * inner)``."""

    inner: Tensor | None
    """Float, [..., N * r], or [..., r] where the copies share it; None for a gated bias, whose inner is 1."""
    gate: Tensor | None
    """Float32, broadcastable to [..., N]; None for 1."""
    up: Tensor
    """Float of any dtype, [D_out, N * r]."""
    scale: float = 1.0


ALIGNMENT = 64
"""Bytes; where torch's own allocator puts a tensor."""

FEW_ROWS = 32
"""Below so many rows of a weight, a CPU's matrix product is up to four times faster with the weight on the left."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with ``x`` are made: its own, or the one that autocast asks for."""
    device = x.device.type
    asked = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # autocast leaves float64 alone
    return torch.get_autocast_dtype(device) if asked else x.dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast where there is something to cast: asking first is cheaper."""
    return x if x.dtype == dtype else x.to(dtype)


def stacked(weights: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> Tensor:
    """Join weights to one, in the dtype of the products.

    A single weight is copied where it lies askew in memory, as loaded files leave it: a CPU's products round it otherwise,
    and an adapter would not come back bit-equal.
    """
    if len(weights) == 1 and not _lies_askew(weights[0]):
        return cast(weights[0], dtype)
    return cast(torch.cat(tuple(weights), dim), dtype)


def _lies_askew(weight: Tensor) -> bool:
    in_memory = type(weight) in (Tensor, nn.Parameter)  # a tensor that stands for another has no address
    return in_memory and weight.data_ptr() % ALIGNMENT != 0


def thin_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply tokens by a weight of few rows: ``x @ weight.T``.

    Args:
        x: Float, [M, D].
        weight: Float, [K, D], of the same dtype, contiguous or not.

    Returns:
        [M, K], not always contiguous.
    """
    if len(weight) < FEW_ROWS and x.device.type == "cpu":
        return (weight @ x.t()).t()
    return x @ weight.t()


def shared_product(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    factors: tuple[Tensor, Tensor] | None = None,
    joined: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Multiply an input by several weights in one product.

    Args:
        x: Float, [..., D_in]; it is never cast upwards.
        weights: Each [K_i, D_in], of any float dtype; gradients flow to them and to ``x``.
        factors: Two tensors whose product is ``x``, which the frozen model keeps for its own backward pass; they are
            kept then instead of ``x``.
        joined: The weights as `stacked` joins them, where the caller has them already; only without gradients.

    Returns:
        One [..., K_i] for each weight, in the dtype of the products.
    """
    if torch.is_grad_enabled():
        return _SharedProduct.apply(x, factors, *weights)
    return _product(x, weights, compute_dtype(x), joined)


def _product(
    x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, joined: Tensor | None = None
) -> tuple[Tensor, ...]:
    joined = stacked(weights, dtype) if joined is None else joined
    product = thin_product(cast(x, dtype).reshape(-1, x.shape[-1]), joined)
    product = product.view(*x.shape[:-1], -1)  # [..., K]
    if len(weights) == 1:
        return (product,)
    return torch.split_with_sizes(product, [len(one) for one in weights], -1)


class _SharedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: tuple[Tensor, Tensor] | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dtype = compute_dtype(x)
        x = cast(x, ctx.dtype)
        ctx.num_kept = 1 if factors is None else 2
        ctx.save_for_backward(*((x,) if factors is None else factors), *weights)
        return _product(x, weights, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch calls it by position
        saved = ctx.saved_tensors
        weights = saved[ctx.num_kept :]
        x = saved[0] if ctx.num_kept == 1 else cast(saved[0] * saved[1], ctx.dtype)
        above = gradients[0] if len(gradients) == 1 else torch.cat(gradients, -1)
        above = above.reshape(-1, above.shape[-1])  # [M, K]
        to_weights = (above.t() @ x.reshape(-1, x.shape[-1])).split_with_sizes([len(one) for one in weights])
        to_x = (above @ stacked(weights, ctx.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, *map(_in_dtype_of, to_weights, weights)


def _in_dtype_of(gradient: Tensor, weight: Tensor) -> Tensor:
    return cast(gradient, weight.dtype)


def add_gated(
    output: Tensor,
    terms: Sequence[Term],
    *,
    columns: tuple[int, int] | None = None,
    joined: Tensor | None = None,
) -> Tensor:
    """Add the gated changes of a site's experts to its output, in place, in one accumulating product.

    Args:
        output: Float, contiguous, [..., D_out], the frozen layer's own; it is overwritten.
        terms: The experts' parts; gradients flow to inner, gate and up of each.
        columns: Start and end of the columns of ``output`` that the change is for; None for all.
        joined: The terms' ups as `stacked` joins them along their columns, where the caller has them already; only
            without gradients.

    Returns:
        ``output``.
    """
    if torch.is_grad_enabled():
        tensors = [tensor for term in terms for tensor in term[:3]]
        return _AddGated.apply(output, columns, [term.scale for term in terms], *tensors)
    _accumulate(output, columns, terms, joined)
    return output


def _accumulate(
    output: Tensor, columns: tuple[int, int] | None, terms: Sequence[Term], joined: Tensor | None = None
) -> None:
    joined = stacked([term.up for term in terms], output.dtype, 1) if joined is None else joined
    _columns(output, columns).addmm_(_gated_columns(terms, output), joined.t())


def _columns(output: Tensor, columns: tuple[int, int] | None) -> Tensor:
    """View an output as [M, D_out], its own columns only."""
    flat = output.view(-1, output.shape[-1])
    return flat if columns is None else flat[:, columns[0] : columns[1]]


def _gated_columns(terms: Sequence[Term], output: Tensor) -> Tensor:
    """Gate the inner vectors of all terms side by side: [M, K], in the dtype of the output."""
    gated = [_gated(term, output) for term in terms]
    joined = gated[0] if len(gated) == 1 else torch.cat(gated, -1)
    return cast(joined, output.dtype).reshape(-1, joined.shape[-1])


def _gated(term: Term, output: Tensor) -> Tensor:
    """Give ``gate * scale * inner``: [..., N * r], float32 where there is a gate."""
    inner, gate, up, scale = term
    if gate is None:
        assert inner is not None, "a bias without a gate would need a term of its own"
        return inner if scale == 1 else inner * scale
    gate = gate if scale == 1 else gate * scale
    if inner is None:
        return gate.expand(*output.shape[:-1], gate.shape[-1])
    if gate.shape[-1] == 1:
        return inner * gate
    inner = _by_copy(inner, gate, up) * gate.unsqueeze(-1)
    return inner.reshape(*inner.shape[:-2], -1)


def _by_copy(inner: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """View inner vectors as [..., N or 1, r]."""
    return inner.reshape(*inner.shape[:-1], -1, up.shape[1] // gate.shape[-1])


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        columns: tuple[int, int] | None,
        scales: Sequence[float],
        *tensors: Tensor | None,
    ) -> Tensor:
        _accumulate(output, columns, _terms(scales, tensors))
        ctx.mark_dirty(output)
        ctx.save_for_backward(*tensors)
        ctx.columns, ctx.scales = columns, scales
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch calls it by position
        gradient = gradient.contiguous()
        terms = _terms(ctx.scales, ctx.saved_tensors)
        joined = stacked([term.up for term in terms], gradient.dtype, 1)  # [D_out, K]
        above = _columns(gradient, ctx.columns)  # [M, D_out]
        to_ups = (_gated_columns(terms, gradient).t() @ above).t()  # [D_out, K]
        to_gated = thin_product(above, joined.t()).view(*gradient.shape[:-1], -1)
        if len(terms) == 1:
            found = [*_to_inner_and_gate(terms[0], to_gated), cast(to_ups, terms[0].up.dtype)]
            return gradient, None, None, *found
        sizes = [term.up.shape[1] for term in terms]
        parts = zip(
            terms, to_gated.split_with_sizes(sizes, -1), to_ups.split_with_sizes(sizes, 1), strict=True
        )
        found = [
            one
            for term, to_term, to_up in parts
            for one in (*_to_inner_and_gate(term, to_term), cast(to_up, term.up.dtype))
        ]
        return gradient, None, None, *found


def _terms(scales: Sequence[float], tensors: Sequence[Tensor | None]) -> list[Term]:
    """Put the terms together again from the flat list that autograd keeps."""
    return [Term(*tensors[3 * i : 3 * i + 3], scale) for i, scale in enumerate(scales)]  # type: ignore[arg-type]  # ups are never None


def _to_inner_and_gate(term: Term, above: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Pass a gradient [..., N * r] on through ``gate * scale * inner``."""
    inner, gate, up, scale = term
    above = at_least_float32(above) if scale == 1 else at_least_float32(above) * scale
    if gate is None:
        return above if inner is None else cast(above, inner.dtype), None
    if inner is None:
        return None, _summed_to(above, gate)
    if gate.shape[-1] == 1:
        return cast(above * gate, inner.dtype), _summed_to((above * inner).sum(-1, keepdim=True), gate)
    above, by_copy = _by_copy(above, gate, up), _by_copy(inner, gate, up)
    to_inner = (above * gate.unsqueeze(-1)).sum_to_size(by_copy.shape).reshape(inner.shape)
    return cast(to_inner, inner.dtype), _summed_to((above * by_copy).sum(-1), gate)


def _summed_to(gradient: Tensor, gate: Tensor) -> Tensor:
    """Sum over the tokens that share a gate."""
    return gradient if gradient.shape == gate.shape else gradient.sum_to_size(gate.shape)
