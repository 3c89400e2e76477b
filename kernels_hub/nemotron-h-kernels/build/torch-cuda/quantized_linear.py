"""x times the transpose of a frozen weight in FP8 or NVFP4, differentiable with respect to x.

One vector reads the weight as a stream. Up to 64 read it once, on tensor cores; where a weight has few rows, several programs share
the length of one. More vectors than that take longer than unpacking the weight, which is then left to cuBLAS; so is the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._epilogue import finished, fits
from ._launch import as_operator, rows_of
from ._ops import add_op_namespace_prefix, ops
from ._packed import FEW, Packed, few, in_pairs, shape_of, stream, tiles, unpack

_IN_TILES = 64


def _linear(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    scale: Tensor,
    relu2: bool = False,
    plus: tuple[Tensor, ...] = (),
) -> Tensor:
    packed: Packed = (weight, None if block_scale is None else block_scale.view(torch.uint8), scale)
    rows = rows_of(x)
    if rows.shape[0] <= FEW and in_pairs(rows, packed) and fits(plus, x):
        rows = rows.contiguous()
        product = stream(rows, None, packed, 1, relu2, plus) if rows.shape[0] == 1 else few(rows, packed, relu2, plus)
        return product.view(*x.shape[:-1], product.shape[-1])
    if rows.shape[0] <= _IN_TILES:
        out = tiles(rows.contiguous(), packed)
    else:
        out = F.linear(rows, unpack(packed, x.dtype))
    return finished(out.view(*x.shape[:-1], out.shape[-1]), relu2, plus)


@torch.library.custom_op(add_op_namespace_prefix("quantized_linear"), mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, block_scale: Tensor | None, scale: Tensor) -> Tensor:
    return _linear(x, weight, block_scale, scale)


@_linear_op.register_fake
def _(x, weight, block_scale, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(add_op_namespace_prefix("quantized_linear_backward"), mutates_args=())
def _backward_op(grad: Tensor, weight: Tensor, block_scale: Tensor | None, scale: Tensor) -> Tensor:
    return grad @ unpack((weight, None if block_scale is None else block_scale.view(torch.uint8), scale), grad.dtype)


@_backward_op.register_fake
def _(grad, weight, block_scale, scale):
    return grad.new_empty(*grad.shape[:-1], shape_of((weight, block_scale, scale))[1])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _autograd(ctx, grad):
    return ops.quantized_linear_backward(grad, *ctx.saved_tensors), None, None, None


_linear_op.register_autograd(_autograd, setup_context=_setup_context)


def _product(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    scale: Tensor,
    relu2: bool,
    plus: tuple[Tensor, ...],
) -> Tensor:
    if as_operator():
        return finished(_linear_op(x, weight, block_scale, scale), relu2, plus)
    return _linear(x, weight, block_scale, scale, relu2, plus)


def nvfp4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    relu2: bool = False,
    plus: tuple[Tensor, ...] = (),
) -> Tensor:
    """x @ W^T with W in NVFP4.

    Args:
        x: (..., in), bfloat16 or float32.
        packed: (out, in / 2) uint8; scale: (out, in / 16) float8_e4m3fn; global_scale: () float32; all contiguous.
        relu2: return relu(...)^2.
        plus: tensors like the result, added to it one after another, each sum rounded.

    Returns:
        (..., out) in the dtype of x.
    """
    return _product(x, packed, scale, global_scale, relu2, plus)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, relu2: bool = False, plus: tuple[Tensor, ...] = ()) -> Tensor:
    """x @ W^T with W in FP8.

    Args:
        x: (..., in), bfloat16 or float32; `in` a multiple of 8.
        weight: (out, in) float8_e4m3fn, contiguous; scale: () float32.
        relu2, plus: as in `nvfp4_linear`.

    Returns:
        (..., out) in the dtype of x.
    """
    return _product(x, weight, None, scale, relu2, plus)
