"""Routed experts whose frozen weights are in FP8 or NVFP4: down(relu(up(x))^2), weighted and summed over the chosen experts.

Few tokens read each chosen expert as a stream, one program for a few rows of one token's one expert. Many are sorted by expert
and multiplied in tiles, which unpack what they need. For more, without gradients, experts are unpacked in memory, some at a time,
and multiplied as in bfloat16 (`grouped_experts.py`). Nothing waits for the host. Gradients reach the tokens and their experts'
weights; the backward multiplies by the same packed matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._launch import cdiv, on
from ._operator import operator
from ._packed import Packed, in_pairs, shape_of, stream, tiles, unpack_into
from .grouped_experts import grouped_experts, serves
from .moe_experts import SortedPairs, _between_products_kernel, _combine, sort_pairs
from .relu_squared import relu_squared_into

# Tokens up to which every pair reads weights of its own, by the bits of these: for more, a block of each expert's pairs is faster.
_FEW = {4: 32, 8: 20}
# Pairs an expert has on average from which its weights are unpacked in memory; tiles unpack them again for every block of 128.
# Of Super's experts in NVFP4 on an H200 (2026-12-01) tiles took 2.6 ms at 88 pairs and 7.2 ms at 352. Unpacking took 1.75 ms at
# both, and the products 1.75 and 4.25 ms, 3.5 and 6.0 ms together: lines through these meet between 170 and 200.
_MANY = 192
# Bytes for unpacked weights, of as many experts at a time as fit: 128 of Super's. All 512 would take 2.8 GB, which the model does
# not leave of 80 GB; 128 still keep a GPU busy.
_ROOM = 672 << 20


def _matrices(codes: Tensor, block_scale: Tensor | None, scale: Tensor) -> Packed:
    return codes, None if block_scale is None else block_scale.view(torch.uint8), scale


def _block(pairs: int, experts: int) -> int:
    """Vectors in a block: somewhat more than an expert has on average, since a second block unpacks its weights again."""
    each = pairs // experts
    return 16 if each <= 12 else 32 if each <= 24 else 64 if each <= 48 else 128


def _few_tokens(x: Tensor, index: Tensor, weights: Tensor, up: Packed, down: Packed) -> Tensor:
    tokens, top_k = index.shape
    which = index.reshape(-1)
    hidden = stream(x.contiguous(), which, up, shared=top_k, relu2=True)
    y = stream(hidden, which, down, apart=True, known=True)
    return _combine(y, None, weights, tokens, top_k, x)


def _many_tokens(
    x: Tensor, pairs: SortedPairs, weights: Tensor, up: Packed, down: Packed, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """The output and, if kept, what the sorted pairs have before their activation."""
    tokens, top_k = weights.shape
    order, inverse, ends = pairs
    size = _block(order.numel(), ends.numel())
    hidden = tiles(x.contiguous(), up, (order, ends, top_k, size), gather=True, relu2=not keep_hidden)
    squared = relu_squared_into(hidden, torch.empty_like(hidden)) if keep_hidden else hidden
    y = tiles(squared, down, (order, ends, 1, size))
    return _combine(y, inverse, weights, tokens, top_k, x), hidden


def _in_parts(packed: Packed, room: Tensor) -> Iterator[Tensor]:
    """The numbers of a stack, as many matrices at a time as `room` (matrices, numbers of one) holds, all in that one place."""
    codes, block_scale, scale = packed
    rows, width, _ = shape_of(packed)
    for first in range(0, scale.numel(), room.shape[0]):
        part = slice(first, first + room.shape[0])
        some = codes[part], None if block_scale is None else block_scale[part], scale[part]
        yield unpack_into(some, room[: some[2].numel()].view(-1, rows, width))


def _very_many_tokens(x: Tensor, index: Tensor, weights: Tensor, up: Packed, down: Packed) -> Tensor:
    experts, (inner, width, _) = up[2].numel(), shape_of(up)
    parts = cdiv(experts, max(1, _ROOM // (inner * width * x.element_size())))
    room = torch.empty(cdiv(experts, parts), inner * width, dtype=x.dtype, device=x.device)
    y, place = grouped_experts(x, index, _in_parts(up, room), _in_parts(down, room), experts, inner)
    return _combine(y, place, weights, *index.shape, x)


@operator("quantized_experts")
def _experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    up_block_scale: Tensor | None,
    up_scale: Tensor,
    down: Tensor,
    down_block_scale: Tensor | None,
    down_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward wants: the pairs' hidden activations and their order."""
    up_packed, down_packed = _matrices(up, up_block_scale, up_scale), _matrices(down, down_block_scale, down_scale)
    pairs = sort_pairs(index, up.shape[0])
    return *_many_tokens(x, pairs, weights, up_packed, down_packed, keep_hidden=True), *pairs


@_experts.register_fake
def _(x, index, weights, up, up_block_scale, up_scale, down, down_block_scale, down_scale):
    hidden = x.new_empty(index.shape[0] * index.shape[1], up.shape[1])
    return x.new_empty(x.shape), hidden, *SortedPairs.like(index, up.shape[0])


@operator("quantized_experts_inference")
def _inference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    up_block_scale: Tensor | None,
    up_scale: Tensor,
    down: Tensor,
    down_block_scale: Tensor | None,
    down_scale: Tensor,
) -> Tensor:
    up_packed, down_packed = _matrices(up, up_block_scale, up_scale), _matrices(down, down_block_scale, down_scale)
    if x.shape[0] <= _FEW[shape_of(up_packed)[2]] and in_pairs(x, up_packed, down_packed):
        return _few_tokens(x, index, weights, up_packed, down_packed)
    experts = up.shape[0]
    if index.numel() >= _MANY * experts and serves(x, experts):
        return _very_many_tokens(x, index, weights, up_packed, down_packed)
    pairs = sort_pairs(index, experts)
    return _many_tokens(x, pairs, weights, up_packed, down_packed, keep_hidden=False)[0]


@_inference.register_fake
def _(x, index, weights, up, up_block_scale, up_scale, down, down_block_scale, down_scale):
    return x.new_empty(x.shape)


@operator("quantized_experts_backward")
def _backward(
    grad: Tensor,
    weights: Tensor,
    up: Tensor,
    up_block_scale: Tensor | None,
    up_scale: Tensor,
    down: Tensor,
    down_block_scale: Tensor | None,
    down_scale: Tensor,
    hidden: Tensor,
    order: Tensor,
    inverse: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor]:
    tokens, top_k = weights.shape
    size = _block(order.numel(), up.shape[0])
    pair_weights = weights.reshape(-1)[order]
    down_packed, up_packed = _matrices(down, down_block_scale, down_scale), _matrices(up, up_block_scale, up_scale)
    grad = grad.contiguous()
    back = tiles(grad, down_packed, (order, ends, top_k, size), gather=True, transposed=True)
    grad_hidden, grad_pairs = torch.empty_like(hidden), torch.empty_like(pair_weights)
    pairs, inner = hidden.shape
    if pairs:
        with on(grad):
            # Squares are for a gradient of `down`, which there is none of: they go where `back` has been read.
            _between_products_kernel[(pairs,)](
                hidden, back, pair_weights, back, grad_hidden, grad_pairs, inner, 1024, num_warps=4
            )
    grad_weights = torch.empty_like(grad_pairs)
    grad_weights[order] = grad_pairs
    grad_x = tiles(grad_hidden, up_packed, (order, ends, 1, size), transposed=True)
    return _combine(grad_x, inverse, None, tokens, top_k, grad), grad_weights.view_as(weights)


@_backward.register_fake
def _(grad, weights, *others):
    return grad.new_empty(grad.shape), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, *kept = output
    ctx.save_for_backward(*inputs[2:], *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for `hidden` would be as large as it is


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    grads = _backward(grad, *ctx.saved_tensors)
    return grads[0], None, grads[1], *(None,) * 6


_experts.register_autograd(_autograd, setup_context=_setup_context)


def _served(x: Tensor, index: Tensor, weights: Tensor, up: tuple, down: tuple) -> Tensor:
    if torch.is_grad_enabled():
        return _experts(x, index, weights, *up, *down)[0]
    return _inference(x, index, weights, *up, *down)


def nvfp4_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: tuple[Tensor, Tensor, Tensor],
    down: tuple[Tensor, Tensor, Tensor],
    input_scales: None = None,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs, weights in NVFP4; differentiable in `x` and `weights`.

    Args:
        x: (tokens, width), bfloat16 or float32.
        index: (tokens, top_k) int64, chosen experts; weights: (tokens, top_k) float32.
        up: codes (experts, intermediate, width / 2) uint8, block scales (experts, intermediate, width / 16)
            float8_e4m3fn, global scales (experts,) float32; all contiguous.
        down: the same for (experts, width, intermediate).
        input_scales: None; inputs are not rounded here.

    Returns:
        (tokens, width) in the dtype of x; the sum over experts is taken in float32.
    """
    return _served(x, index, weights, up, down)


def fp8_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    input_scales: None = None,
) -> Tensor:
    """As `nvfp4_experts` with weights in FP8: float8_e4m3fn, rows of a multiple of 8, and (experts,) float32 scales."""
    return _served(x, index, weights, (up[0], None, up[1]), (down[0], None, down[1]))
