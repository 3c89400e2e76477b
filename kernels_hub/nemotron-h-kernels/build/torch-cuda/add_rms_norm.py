"""The residual add and the norm behind it, in one pass: the stream is read once and written once.

    h = x + residual;  out = w * h / sqrt(mean(h^2) + eps)

The sum is rounded to its dtype before it is normed, as it would be in two steps. The backward is that of `rms_norm.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, empty_like, on, rows_of
from ._operator import operator
from .rms_norm import norm_backward


@triton.jit
def _kernel(x, residual, weight, out, total, x_stride, residual_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    h = tl.load(x + row * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    h += tl.load(residual + row * residual_stride + i, mask=inside, other=0.0).to(tl.float32)
    rounded = h.to(total.dtype.element_ty)
    tl.store(total + row * WIDTH + i, rounded, mask=inside)
    h = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 0) / WIDTH + eps)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + i, (h * scale * w).to(out.dtype.element_ty), mask=inside)


@operator("add_rms_norm")
def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = (empty_like(x) for _ in range(2))
    flat, other = rows_of(x), rows_of(residual)
    if out.numel():
        size = block(x.shape[-1])
        with on(x):
            _kernel[(flat.shape[0],)](
                flat,
                other,
                weight.contiguous(),
                out,
                total,
                flat.stride(0),
                other.stride(0),
                eps,
                x.shape[-1],
                size,
                num_warps=min(16, max(1, size // 512)),
            )
    return out, total


@_add_norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _autograd(ctx, grad_out, grad_total):
    total, weight = ctx.saved_tensors
    grad, _, grad_weight = norm_backward(grad_out, total, None, weight, ctx.eps, total.shape[-1])
    grad = grad + grad_total
    return grad, grad, grad_weight, None


_add_norm.register_autograd(_autograd, setup_context=_setup_context)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise over the last dimension.

    Args:
        x, residual: (..., width), of one dtype.
        weight: (width,).

    Returns:
        The normed sum and the sum, both (..., width) in the dtype of x.
    """
    return _add_norm(x, residual, weight, eps)
