"""Routed experts without a gate: down(relu(up(x))^2), weighted and summed over the chosen experts.

Three ways, chosen by the number of tokens:

- Few tokens read each chosen expert's weights as a stream: one program for a few rows of one token's one expert. Nothing is
  sorted, nothing waits for the host, and the time is that of the bytes.
- Some, up to some thousands, without gradients: see `grouped_experts.py`.
- Many tokens are sorted by expert and multiplied by `torch.nn.functional.grouped_mm`. Around it, one kernel each for the
  activation, the weighted sum back in the tokens' order, and everything the backward does between its products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, dense, on, power_of_2
from ._operator import operator
from ._overlap import next_may_begin, overlap, prefetch, previous_done
from .grouped_experts import grouped_experts, serves
from .relu_squared import relu_squared_into

# Tokens up to which each pair reads weights of its own: pairs rarely share an expert (512 experts, top-22). Beyond `_FEWEST` not where
# `grouped_experts.py` serves. On an H200 (2026-12-01) a step of 16 rows of Super's slice took 6.2 ms as a stream, one of 24 grouped 4.7.
_FEW, _FEWEST = 16, 8
# Pairs an expert has on average, up to which `grouped_experts.py` is faster: 12,288 tokens of Super. Beyond, both take the same to a few
# percent. On an H200 (2026-12-01) 8,192 tokens took 4.2 to 4.7 ms against 5.0 to 5.8, 12,288 took 6.6 against 7.1.
_MOST = 528


@triton.jit
def _stream_up_kernel(
    x,
    index,
    up,
    hidden,
    width,
    inner,
    x_stride,
    TOP_K: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[pair] = relu(up[expert] x[token])^2, R rows of it."""
    previous_done(OVERLAP)
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(index + pair)
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    rows = up + (expert * inner + r)[:, None] * width
    total = tl.zeros([R, K], tl.float32)
    for start in range(0, width, K):
        inside = start + k < width
        token = tl.load(x + (pair // TOP_K) * x_stride + start + k, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(rows + (start + k)[None, :], mask=(r < inner)[:, None] & inside[None, :], other=0.0)
        total += w.to(tl.float32) * token[None, :]
    next_may_begin(OVERLAP)
    active = tl.maximum(tl.sum(total, 1), 0.0)
    tl.store(hidden + pair * inner + r, active * active, mask=r < inner)


@triton.jit
def _stream_down_kernel(hidden, index, down, y, width, inner, R: tl.constexpr, K: tl.constexpr, OVERLAP: tl.constexpr):
    """y[pair] = down[expert] hidden[pair], R rows of it."""
    pair = tl.program_id(1).to(tl.int64)
    # Before `previous_done`: the previous kernel reads it too, and lets this one begin later.
    expert = tl.load(index + pair)
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    rows = down + (expert * width + r)[:, None] * inner
    early = tl.minimum(tl.arange(0, 8) * 64, inner - 1)
    prefetch(down + (expert * width + tl.minimum(r, width - 1))[:, None] * inner + early[None, :], OVERLAP)
    previous_done(OVERLAP)
    total = tl.zeros([R, K], tl.float32)
    for start in range(0, inner, K):
        inside = start + k < inner
        h = tl.load(hidden + pair * inner + start + k, mask=inside, other=0.0)
        w = tl.load(rows + (start + k)[None, :], mask=(r < width)[:, None] & inside[None, :], other=0.0)
        total += w.to(tl.float32) * h[None, :]
    next_may_begin(OVERLAP)
    tl.store(y + pair * width + r, tl.sum(total, 1), mask=r < width)


@triton.jit
def _combine_kernel(
    y,
    place,
    weights,
    out,
    width,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    PLACED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[token] = sum over its pairs of weight * y[place[pair]], each in PARTS, K at a time, in float32 and always in the same order."""
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * W + tl.arange(0, W)
    total = tl.zeros([W], tl.float32)
    for first in range(0, TOP_K, K):
        k = first + tl.arange(0, K)
        pair, there = token * TOP_K + k, k < TOP_K
        inside = there[:, None] & (c < width)[None, :]
        row = pair
        if PLACED:
            row = tl.load(place + pair, mask=there, other=0)
        at = (row * PARTS * width)[:, None] + c[None, :]
        value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            value += tl.load(y + at + part * width, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + pair, mask=there, other=0.0)[:, None]
        total += tl.sum(value, 0)
    tl.store(out + token * width + c, total.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _between_products_kernel(hidden, back, pair_weights, squared, grad_hidden, grad_pairs, inner, K: tl.constexpr):
    """From hidden and back = grad down: the weighted relu(hidden)^2, the gradient of hidden, and that of the pair's weight."""
    pair = tl.program_id(0).to(tl.int64)
    weight = tl.load(pair_weights + pair)
    k = tl.arange(0, K)
    total = tl.zeros([K], tl.float32)
    for start in range(0, inner, K):
        i = pair * inner + start + k
        inside = start + k < inner
        active = tl.maximum(tl.load(hidden + i, mask=inside, other=0.0).to(tl.float32), 0.0)
        g = tl.load(back + i, mask=inside, other=0.0).to(tl.float32)
        square = active * active
        total += g * square
        tl.store(squared + i, (weight * square).to(squared.dtype.element_ty), mask=inside)
        tl.store(grad_hidden + i, (g * (2.0 * weight) * active).to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(grad_pairs + pair, tl.sum(total, 0))


def _combine(y: Tensor, place: Tensor | None, weights: Tensor | None, tokens: int, top_k: int, like: Tensor) -> Tensor:
    width = y.shape[-1]
    out = torch.empty(tokens, width, dtype=like.dtype, device=y.device)
    # Few tokens wait for memory: more programs, each with all its rows on their way at once.
    few = tokens <= 64
    size = min(32 if few else 1024, power_of_2(width))
    if tokens:
        with on(y):
            _combine_kernel[(tokens, cdiv(width, size))](
                y,
                y if place is None else place,
                y if weights is None else weights.contiguous(),
                out,
                width,
                top_k,
                y.shape[1] if y.dim() == 3 else 1,
                place is not None,
                weights is not None,
                min(32, power_of_2(top_k)) if few else 1,
                size,
                num_warps=4,
                **overlap(y),
            )
    return out


def _few_tokens(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    tokens, top_k = index.shape
    inner, width = up.shape[1:]
    x, index = dense(x), index.contiguous()
    pairs = tokens * top_k
    hidden = torch.empty(pairs, inner, dtype=torch.float32, device=x.device)
    y = torch.empty(pairs, width, dtype=torch.float32, device=x.device)
    rows, columns = 8, 512
    with on(x):
        _stream_up_kernel[(cdiv(inner, rows), pairs)](
            x, index, up, hidden, width, inner, x.stride(0), top_k, rows, columns, num_warps=4, **overlap(x)
        )
        _stream_down_kernel[(cdiv(width, rows), pairs)](
            hidden, index, down, y, width, inner, rows, columns, num_warps=4, **overlap(x)
        )
    return _combine(y, None, weights, tokens, top_k, x)


class SortedPairs(NamedTuple):
    """The flattened (tokens * top_k) pairs by expert."""

    order: Tensor  # (pairs,) int64: the pair of each sorted row
    inverse: Tensor  # (pairs,) int64: the sorted row of each pair
    ends: Tensor  # (experts,) int32: the row behind each expert's last

    @classmethod
    def like(cls, index: Tensor, experts: int) -> SortedPairs:
        """Of the right shapes and dtypes, for compilers."""
        order, inverse = (index.new_empty(index.shape[0] * index.shape[1]) for _ in range(2))
        return cls(order, inverse, index.new_empty(experts, dtype=torch.int32))


def sort_pairs(index: Tensor, experts: int) -> SortedPairs:
    # Radix sort takes a pass for every few bits of the key.
    keys, order = index.reshape(-1).to(torch.int16).sort(stable=True)
    ends = torch.searchsorted(keys, torch.arange(experts, dtype=torch.int16, device=keys.device), right=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return SortedPairs(order, inverse, ends.to(torch.int32))


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times that expert's weight (experts, out, in)."""
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def _many_tokens(
    x: Tensor, pairs: SortedPairs, weights: Tensor, up: Tensor, down: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """The output and, if kept, what the sorted pairs have before their activation."""
    tokens, top_k = weights.shape
    order, inverse, ends = pairs
    hidden = _grouped(x[order // top_k], up, ends)
    squared = relu_squared_into(hidden, torch.empty_like(hidden) if keep_hidden else hidden)
    return _combine(_grouped(squared, down, ends), inverse, weights, tokens, top_k, x), hidden


@operator("moe_experts")
def _experts(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward wants: the pairs' hidden activations and their order."""
    pairs = sort_pairs(index, up.shape[0])
    return *_many_tokens(x, pairs, weights, up, down, keep_hidden=True), *pairs


@_experts.register_fake
def _(x, index, weights, up, down):
    hidden = x.new_empty(index.shape[0] * index.shape[1], up.shape[1])
    return x.new_empty(x.shape), hidden, *SortedPairs.like(index, up.shape[0])


@operator("moe_experts_inference")
def _inference(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    experts, inner = up.shape[:2]
    if x.shape[0] > _FEWEST and index.numel() <= _MOST * experts and serves(x, experts, up, down):
        return _combine(*grouped_experts(x, index, (up,), (down,), experts, inner), weights, *index.shape, x)
    if x.shape[0] <= _FEW or x.dtype == torch.float32:
        return _few_tokens(x, index, weights, up, down)
    return _many_tokens(x, sort_pairs(index, experts), weights, up, down, keep_hidden=False)[0]


@_inference.register_fake
def _(x, index, weights, up, down):
    return x.new_empty(x.shape)


@operator("moe_experts_backward")
def _experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    hidden: Tensor,
    order: Tensor,
    inverse: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, top_k = weights.shape
    rows = order // top_k
    pair_weights = weights.reshape(-1)[order]
    pairs, inner = order.numel(), up.shape[1]
    grad_rows = grad.contiguous()[rows]
    back = _grouped(grad_rows, down.transpose(-2, -1), ends)
    squared, grad_hidden = torch.empty_like(hidden), torch.empty_like(hidden)
    grad_pairs = torch.empty(pairs, dtype=torch.float32, device=x.device)
    with on(x):
        _between_products_kernel[(pairs,)](
            hidden, back, pair_weights, squared, grad_hidden, grad_pairs, inner, 1024, num_warps=4
        )
    grad_weights = torch.empty_like(grad_pairs)
    grad_weights[order] = grad_pairs
    del back
    grad_down = F.grouped_mm(grad_rows.t(), squared, offs=ends)
    del grad_rows, squared
    grad_up = F.grouped_mm(grad_hidden.t(), x[rows], offs=ends)
    grad_x = _combine(_grouped(grad_hidden, up.transpose(-2, -1), ends), inverse, None, tokens, top_k, x)
    return grad_x, grad_weights.view_as(weights), grad_up, grad_down


@_experts_backward.register_fake
def _(grad, x, weights, up, down, hidden, order, inverse, ends):
    return x.new_empty(x.shape), weights.new_empty(weights.shape), torch.empty_like(up), torch.empty_like(down)


def _setup_context(ctx, inputs, output) -> None:
    x, _, *others = inputs
    _, *kept = output
    ctx.save_for_backward(x, *others, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for `hidden` would be as large as it is


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    grad_x, grad_weights, grad_up, grad_down = _experts_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_weights, grad_up, grad_down


_experts.register_autograd(_autograd, setup_context=_setup_context)


def moe_experts(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs.

    Args:
        x: (tokens, width), bfloat16 (float32 too, for up to 128 tokens without gradients).
        index: (tokens, top_k) int64, chosen experts.
        weights: (tokens, top_k) float32, their weights.
        up: (experts, intermediate, width), contiguous.
        down: (experts, width, intermediate), contiguous.

    Returns:
        (tokens, width) in the dtype of x; the sum over experts is taken in float32.
    """
    if torch.is_grad_enabled():
        return _experts(x, index, weights, up, down)[0]
    return _inference(x, index, weights, up, down)
