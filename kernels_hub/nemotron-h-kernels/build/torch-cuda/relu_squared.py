"""relu(x)^2 in one pass, and its gradient, 2 relu(x) times the incoming one, in another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, empty_like, on
from ._operator import operator


@triton.jit
def _relu(x):
    return tl.where(x < 0.0, 0.0, x)  # what is not a number stays so


@triton.jit
def _forward_kernel(x, out, count, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = _relu(tl.load(x + i, mask=i < count, other=0.0).to(tl.float32))
    tl.store(out + i, (value * value).to(out.dtype.element_ty), mask=i < count)


@triton.jit
def _backward_kernel(grad, x, grad_x, count, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = _relu(tl.load(x + i, mask=i < count, other=0.0).to(tl.float32))
    g = tl.load(grad + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(grad_x + i, (2.0 * value * g).to(grad_x.dtype.element_ty), mask=i < count)


def _size(count: int) -> int:
    """Elements of a program: fewer where there would not be a program for every multiprocessor."""
    return 4096 if count >= 1 << 20 else 1024


def relu_squared_into(x: Tensor, out: Tensor) -> Tensor:
    """Write relu(x)^2 to `out`, which may be x; both contiguous."""
    count = x.numel()
    if count:
        size = _size(count)
        with on(x):
            _forward_kernel[(cdiv(count, size),)](x, out, count, size, num_warps=size // 512)
    return out


@operator("relu_squared")
def _relu_squared(x: Tensor) -> Tensor:
    return relu_squared_into(x.contiguous(), empty_like(x))


@_relu_squared.register_fake
def _(x):
    return x.new_empty(x.shape)


@operator("relu_squared_backward")
def _relu_squared_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad_x = empty_like(x)
    count = x.numel()
    if count:
        size = _size(count)
        with on(x):
            _backward_kernel[(cdiv(count, size),)](
                grad.contiguous(), x.contiguous(), grad_x, count, size, num_warps=size // 512
            )
    return grad_x


@_relu_squared_backward.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    return _relu_squared_backward(grad, *ctx.saved_tensors)


_relu_squared.register_autograd(_autograd, setup_context=_setup_context)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 of any shape, bfloat16 or float32, in the dtype of x: squared in float32 and rounded once."""
    return _relu_squared(x)
