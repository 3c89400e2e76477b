"""x times the transpose of a frozen weight in FP8 or NVFP4, differentiable with respect to x.

One vector reads the weight as a stream. Up to 64 read it once, on tensor cores; where a weight has few rows, several programs share
the length of one. More vectors than that take longer than unpacking the weight, which is then left to cuBLAS; so is the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._epilogue import finished, fits
from ._launch import rows_of
from ._operator import operator, watched
from ._packed import FEW, Packed, few, in_pairs, shape_of, stream, tiles, unpack

_IN_TILES = 64


def _multiply(
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


@operator("quantized_linear")
def _linear(x: Tensor, weight: Tensor, block_scale: Tensor | None, scale: Tensor) -> Tensor:
    return _multiply(x, weight, block_scale, scale)


@_linear.register_fake
def _(x, weight, block_scale, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@operator("quantized_linear_backward")
def _backward(grad: Tensor, weight: Tensor, block_scale: Tensor | None, scale: Tensor) -> Tensor:
    return grad @ unpack((weight, None if block_scale is None else block_scale.view(torch.uint8), scale), grad.dtype)


@_backward.register_fake
def _(grad, weight, block_scale, scale):
    return grad.new_empty(*grad.shape[:-1], shape_of((weight, block_scale, scale))[1])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _autograd(ctx, grad):
    return _backward(grad, *ctx.saved_tensors), None, None, None


_linear.register_autograd(_autograd, setup_context=_setup_context)


def _product(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    scale: Tensor,
    relu2: bool,
    plus: tuple[Tensor, ...],
) -> Tensor:
    if watched() or torch.is_grad_enabled():
        return finished(_linear(x, weight, block_scale, scale), relu2, plus)
    return _multiply(x, weight, block_scale, scale, relu2, plus)


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
