"""The fused arithmetic: one product for everything that reads an input, one accumulation into a site's output.

It computes what the experts' own ``change`` methods compute, which stay as the definition. What it saves: the input is
read once however many experts and routers read it, gates touch vectors of the bottleneck's size alone, the change is
added in place of the frozen output, and the backward pass keeps the input, or what the frozen model keeps anyway, and
little else.

Small vectors lie as rows with a column for each token: a part of a product is then contiguous, and a CPU multiplies by a
weight of few rows faster with the weight on the left.

Sizes: B rows, T tokens of a row, M = B * T, D_in and D_out of a site, K rows of all stacked down-projections, H heads of size D,
P vectors of a prompt, N copies of an expert.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa_peft.experts.base import Prompt
from moa_peft.products import aligned, at_least_float32, cast, exact

PIECE = 128
"""Tokens of an input that are made again at once."""

Backward = Callable[..., tuple[Tensor | None, ...]]


def _differentiable_once(backward: Backward) -> Backward:
    """Do what torch's decorator does, which each call pays for, only where somebody asks for a graph of the backward pass."""
    guarded: Backward = once_differentiable(backward)

    def as_asked(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return as_asked


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with ``x`` are made: its own, or the one that autocast asks for."""
    device = x.device.type
    asked = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # autocast leaves float64 alone
    return torch.get_autocast_dtype(device) if asked else x.dtype


def stacked(weights: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> Tensor:
    """Join weights to one, in the dtype of the products."""
    return cast(aligned(weights[0]) if len(weights) == 1 else torch.cat(tuple(weights), dim), dtype)


def rows_of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply an input by a weight: ``weight @ x.T + bias``.

    Args:
        x: Float, [..., D_in]; cast to the weight's dtype, which is never a higher one.
        weight: Float, [K, D_in], in the dtype of the products; gradients flow to all three.
        bias: Float32, [K, 1], added in float32; None for none.

    Returns:
        [K, M], in the dtype of the weight, or of the bias if that is higher.
    """
    flat = cast(x, weight.dtype)
    if flat.dim() > 2:
        flat = flat.reshape(-1, x.shape[-1])
    if bias is None:
        return F.linear(weight, flat)
    if bias.dtype == weight.dtype:
        return torch.addmm(bias, weight, flat.t())
    return F.linear(weight, flat) + bias


class Joined(NamedTuple):
    """Weights that multiply one input, joined to one, and their biases.

    Gradients flow to the two tensors, or, where there is a ``cut``, to the parameters whose data they have.
    """

    weight: Tensor
    """In the dtype of the products, [K, D_in]."""
    bias: Tensor | None = None
    """Float32, [K, 1], zero for who has none; None where nobody has one."""
    parameters: Sequence[Tensor] = ()
    """Weights, then biases."""
    cut: Callable[[Tensor, Tensor | None], list[Tensor]] | None = None
    """Cuts the gradients of the two tensors into those of the parameters."""


class Into(NamedTuple):
    """The module that an input, which has a gradient, is on its way into."""

    factors: tuple[Tensor, Tensor] | None = None
    """Two tensors whose product is the input, which the frozen model keeps for its own backward pass; they are kept then
    instead of the input."""
    in_place: bool = False
    """Whether the gradient that the module gives its input is nobody else's, so that it may be added to in place."""


def multiply(x: Tensor, joined: Joined) -> Tensor:
    """Do what `rows_of` does with weights that are joined."""
    if joined.cut is None or not torch.is_grad_enabled():
        return rows_of(x, joined.weight, joined.bias)
    return _Product.apply(x, *joined[:2], None, None, None, joined.cut, *joined.parameters)


def multiply_through(x: Tensor, joined: Joined, into: Into) -> tuple[Tensor, Tensor]:
    """Do what `multiply` does with an input on its way into a module.

    The gradient that the module gives its input comes back here, and that of the product is added to it: there are no two of
    them, each of the input's size, for autograd to add.

    Returns:
        What the module is to read, and the product.
    """
    one, other = into.factors or (None, None)
    return _Product.apply(x, *joined[:2], one, other, into, joined.cut, *joined.parameters)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        one: Tensor | None,
        other: Tensor | None,
        into: Into | None,
        cut: Callable[[Tensor, Tensor | None], list[Tensor]] | None,
        *parameters: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.has_bias, ctx.into, ctx.cut = bias is not None, into, cut
        # The parameters are only kept for torch to notice if they are changed before the backward pass.
        ctx.save_for_backward(x if one is None else one, other, weight, *parameters)
        product = rows_of(x, weight, bias)
        return product if into is None else (x.view_as(x), product)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        to_x, to_rows = gradients if ctx.into is not None else (None, *gradients)
        one, other, weight, *parameters = ctx.saved_tensors
        to_weight = to_bias = None
        to_parameters: Sequence[Tensor | None] = [None] * len(parameters)
        if to_rows is not None:
            asks_x, *asks_joined = ctx.needs_input_grad[:3]
            rows = cast(to_rows, weight.dtype)
            if any(asks_joined) or any(ctx.needs_input_grad[7:]):
                to_weight = rows @ _flat(one, rows.dtype) if other is None else _by_factors(rows, one, other)
                to_bias = to_rows.sum(1, keepdim=True) if ctx.has_bias else None
                if ctx.cut is not None:
                    to_parameters = ctx.cut(cast(to_weight, parameters[0].dtype), to_bias)
            if asks_x:
                in_place = ctx.into is not None and ctx.into.in_place
                to_x = _plus_product(to_x, rows.t(), weight, like=one, in_place=in_place)
        return to_x, to_weight, to_bias, None, None, None, None, *to_parameters


def _plus_product(
    total: Tensor | None, one: Tensor, other: Tensor, *, like: Tensor, in_place: bool
) -> Tensor:
    """Add a product [M, D] to a tensor shaped [..., D] as ``like`` is; None is 0."""
    if total is None:
        return cast(one @ other, like.dtype).view(like.shape)
    if not in_place or total.dtype != other.dtype or not total.is_contiguous():
        return total + (one @ other).view(total.shape)
    total.view(-1, total.shape[-1]).addmm_(one, other)
    return total


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """View (or copy) [..., D] as [M, D]."""
    return cast(x, dtype).reshape(-1, x.shape[-1])


def _by_factors(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """``rows @ (one * other)`` for [K, M] and twice [..., D]; on a CPU piece by piece, each small enough for its caches."""
    one, other = one.reshape(-1, one.shape[-1]), other.reshape(-1, other.shape[-1])
    if rows.device.type != "cpu":
        return rows @ cast(one * other, rows.dtype)
    rows32 = at_least_float32(rows)  # of half precision, sums of pieces would be rounded one by one
    total = rows32.new_zeros((len(rows), one.shape[1]))
    for start in range(0, len(one), PIECE):
        piece = slice(start, start + PIECE)
        total.addmm_(rows32[:, piece], at_least_float32(one[piece] * other[piece]))
    return cast(total, rows.dtype)


def add_rows(output: Tensor, rows: Tensor, up: Tensor, columns: tuple[int, int] | None = None) -> Tensor:
    """Add ``rows.T @ up.T`` to a site's output, in place.

    Args:
        output: Float, contiguous, [..., D_out], the frozen layer's own; it is overwritten.
        rows: Of its dtype, [K, M], gated; gradients flow to them.
        up: Float, [D_out, K], likewise; cast to the dtype of ``output``.
        columns: Start and end of the columns of ``output`` that the change is for; None for all.

    Returns:
        ``output``.
    """
    if torch.is_grad_enabled():
        return _AddRows.apply(output, rows, up, columns)
    _columns(output, columns).t().addmm_(cast(up, output.dtype), rows)
    return output


def _columns(output: Tensor, columns: tuple[int, int] | None) -> Tensor:
    """View an output as [M, D_out], its own columns only."""
    flat = output.view(-1, output.shape[-1])
    return flat if columns is None else flat[:, columns[0] : columns[1]]


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, rows: Tensor, up: Tensor, columns: tuple[int, int] | None
    ) -> Tensor:
        ctx.mark_dirty(output)
        ctx.columns, ctx.up_dtype = columns, up.dtype
        up = cast(up, output.dtype)
        ctx.save_for_backward(rows, up)
        _columns(output, columns).t().addmm_(up, rows)
        return output

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, up = ctx.saved_tensors
        above = _columns(gradient.contiguous(), ctx.columns)  # [M, D_out]
        to_up = torch.mm(rows, above).t()
        if ctx.up_dtype != up.dtype:  # one copy that casts and lies as a parameter's gradient shall lie
            to_up = torch.empty(up.shape, dtype=ctx.up_dtype, device=up.device).copy_(to_up)
        return gradient, torch.mm(up.t(), above.t()), to_up, None


def add_attended(
    output: Tensor, query: Tensor, prompt: Prompt, gate: Tensor | None, scaling: float
) -> Tensor:
    """Let queries attend to a prompt, and add the gated result to what the attention gave.

    Vectors of scores lie as rows with a column for each token, which a CPU's softmax takes many times faster.

    Args:
        output: Float, [B, T, H, D], the attention's; not overwritten, since its own backward pass needs it.
        query: Float, [B, H, T, D], after rotary embedding.
        prompt: Keys and values in the dtype of the products.
        gate: Float32, [N, M]; None for 1. Gradients flow to it and to all the others.
        scaling: Factor of the attention scores.

    Returns:
        [B, T, H, D], contiguous, in the dtype of ``output``. Only the arguments are kept for the backward pass.
    """
    keys, values, head_scale = prompt
    weight = at_least_float32(head_scale).view(-1, 1, 1)
    if gate is not None:
        weight = weight * gate  # [H, N, M]
    return _AddAttended.apply(output, cast(query, keys.dtype), keys, values, weight, scaling)


class _AddAttended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, query: Tensor, keys: Tensor, values: Tensor, weight: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(query, keys, values, weight)
        ctx.scaling = scaling
        gated = _weighted(prompt_shares(_token_vectors(query), keys, scaling), weight)
        total = output.clone(memory_format=torch.contiguous_format)
        by_head = total.view(-1, *total.shape[-2:]).transpose(0, 1)  # [H, M, D]
        by_head.baddbmm_(cast(gated, total.dtype).transpose(1, 2), cast(values, total.dtype))
        return total

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, weight = ctx.saved_tensors
        vectors, dtype = _token_vectors(query), keys.dtype
        shares = prompt_shares(vectors, keys, ctx.scaling)
        above = cast(gradient, dtype).reshape(-1, *gradient.shape[-2:]).transpose(0, 1)  # [H, M, D]
        to_values = torch.bmm(cast(_weighted(shares, weight), dtype), above)
        to_gated = at_least_float32(torch.bmm(values, above.transpose(1, 2)))  # [H, P, M]
        to_weight = (to_gated * shares).unflatten(1, (weight.shape[1], -1)).sum(2)  # [H, N, M]
        to_shares = _weighted(to_gated, weight)
        mean = (to_weight * weight).sum(1, keepdim=True)  # of the gradient of the shares, over the prompt
        to_scores = cast(shares * (to_shares - mean), dtype)
        to_query = _scaled_product(to_scores.transpose(1, 2), keys, ctx.scaling)  # [H, M, D]
        to_query = to_query.view(len(keys), len(query), -1, keys.shape[-1]).transpose(0, 1)
        to_keys = _scaled_product(to_scores, vectors, ctx.scaling)
        return gradient, to_query, to_keys, to_values, to_weight, None


def _token_vectors(query: Tensor) -> Tensor:
    """View (or copy) [B, H, T, D] as [H, M, D]."""
    return query.transpose(0, 1).flatten(1, 2)


def prompt_shares(vectors: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Softmax over a prompt for each token and head: float32, [H, P, M], of [H, M, D] and [H, P, D]."""
    scores = _scaled_product(keys, vectors.transpose(1, 2), scaling)
    return scores.softmax(1, dtype=exact(scores.dtype))


def _scaled_product(one: Tensor, other: Tensor, scaling: float) -> Tensor:
    """``scaling * (one @ other)`` for two batches of matrices, rounded once."""
    return torch.baddbmm(one.new_empty(()), one, other, beta=0, alpha=scaling)


def _weighted(shares: Tensor, weight: Tensor) -> Tensor:
    """Multiply the part [H, P / N, M] of each copy by its weight [H, N, M]."""
    if weight.shape[1] == 1:
        return shares * weight
    return (shares.unflatten(1, (weight.shape[1], -1)) * weight.unsqueeze(2)).flatten(1, 2)
