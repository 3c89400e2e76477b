"""RMS norm, plain and gated in groups: one pass over the inputs forward, one backward.

    rms_norm(x)          = w * x / sqrt(mean(x^2) + eps)
    gated_rms_norm(y, z) = w * v / sqrt(mean over the group of v^2 + eps),   v = y * silu(z)

The backward recomputes everything from the inputs. The weight's gradient is summed by a fixed set of programs, each over
its own rows, then over the programs: the same result in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, empty_like, on, rows_of
from ._operator import operator
from ._overlap import next_may_begin, overlap, previous_done

_WARPS = 132 * 16  # of all the backward's programs: what an H100 holds at once, at the 115 registers they take


@triton.jit
def _forward_kernel(
    y,
    z,
    weight,
    out,
    y_stride,
    z_stride,
    width,
    eps,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < GROUP
    column = tl.program_id(1) * GROUP + i
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    v = tl.load(y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(z + row * z_stride + column, mask=inside, other=0.0).to(tl.float32)
        v = v * gate * tl.sigmoid(gate)
    scale = tl.rsqrt(tl.sum(v * v, 0) / GROUP + eps)
    tl.store(out + row * width + column, (v * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad,
    y,
    z,
    weight,
    grad_y,
    grad_z,
    partial,
    grad_stride,
    y_stride,
    z_stride,
    rows,
    width,
    eps,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
):
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < GROUP
    column = tl.program_id(1) * GROUP + i
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    step = tl.num_programs(0)
    row = program.to(tl.int64)
    y_next = tl.load(y + row * y_stride + column, mask=inside, other=0.0)
    g_next = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0)
    if GATED:
        gate_next = tl.load(z + row * z_stride + column, mask=inside, other=0.0)
    for _ in range(program, rows, step):
        y_row, g = y_next.to(tl.float32), g_next.to(tl.float32)
        # The next row is on its way while this one waits for its sums.
        ahead = row + step
        more = inside & (ahead < rows)
        y_next = tl.load(y + ahead * y_stride + column, mask=more, other=0.0)
        g_next = tl.load(grad + ahead * grad_stride + column, mask=more, other=0.0)
        v = y_row
        if GATED:
            gate = gate_next.to(tl.float32)
            gate_next = tl.load(z + ahead * z_stride + column, mask=more, other=0.0)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            v = y_row * silu
        along = v * g
        scale = tl.rsqrt(tl.sum(v * v, 0) / GROUP + eps)
        mean = tl.sum(along * w, 0) / GROUP  # of g w v: it does not wait for the scale
        grad_weight += along * scale
        grad_v = scale * (g * w - v * (scale * scale * mean))
        if GATED:
            slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(grad_z + row * width + column, (grad_v * y_row * slope).to(grad_z.dtype.element_ty), mask=inside)
            grad_v = grad_v * silu
        tl.store(grad_y + row * width + column, grad_v.to(grad_y.dtype.element_ty), mask=inside)
        row = ahead
    tl.store(partial + program * width + column, grad_weight, mask=inside)


def _warps(size: int) -> int:
    return min(16, max(1, size // 512))


def _backward_warps(size: int) -> int:
    """Eight values a thread, of three inputs, while that takes no more than eight warps."""
    return max(_warps(size), min(8, size // 256))


@operator("rms_norm")
def _norm(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    out = empty_like(y)
    width = y.shape[-1]
    flat = rows_of(y)
    gate = flat if z is None else rows_of(z)
    if flat.shape[0] == 0:
        return out
    size = block(group_size)
    with on(y):
        _forward_kernel[(flat.shape[0], width // group_size)](
            flat,
            gate,
            weight.contiguous(),
            out,
            flat.stride(0),
            gate.stride(0),
            width,
            eps,
            group_size,
            size,
            z is not None,
            num_warps=_warps(size),
            **overlap(y),
        )
    return out


@_norm.register_fake
def _(y, z, weight, eps, group_size):
    return y.new_empty(y.shape)


@operator("rms_norm_backward")
def norm_backward(
    grad: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    width = y.shape[-1]
    flat, flat_grad = rows_of(y), rows_of(grad)
    gate = flat if z is None else rows_of(z)
    rows = flat.shape[0]
    grad_y = empty_like(y)
    grad_z = y.new_empty(0) if z is None else empty_like(z)
    if rows == 0:
        return grad_y, grad_z, torch.zeros_like(weight)
    size, groups = block(group_size), width // group_size
    warps = _backward_warps(size)
    programs = min(rows, max(1, _WARPS // (warps * groups)))
    partial = torch.empty(programs, width, dtype=torch.float32, device=y.device)
    with on(y):
        _backward_kernel[(programs, groups)](
            flat_grad,
            flat,
            gate,
            weight.contiguous(),
            grad_y,
            grad_z,
            partial,
            flat_grad.stride(0),
            flat.stride(0),
            gate.stride(0),
            rows,
            width,
            eps,
            group_size,
            size,
            z is not None,
            num_warps=warps,
        )
    return grad_y, grad_z, partial.sum(0).to(weight.dtype)


@norm_backward.register_fake
def _(grad, y, z, weight, eps, group_size):
    return y.new_empty(y.shape), y.new_empty(0) if z is None else z.new_empty(z.shape), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    y, z, weight, eps, group_size = inputs
    ctx.save_for_backward(y, z, weight)
    ctx.eps, ctx.group_size = eps, group_size


def _autograd(ctx, grad):
    y, z, weight = ctx.saved_tensors
    grad_y, grad_z, grad_weight = norm_backward(grad, y, z, weight, ctx.eps, ctx.group_size)
    return grad_y, None if z is None else grad_z, grad_weight, None, None


_norm.register_autograd(_autograd, setup_context=_setup_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension of x (..., width); weight (width,). Returns the dtype of x."""
    return _norm(x, None, weight, eps, x.shape[-1])


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMS norm of y * silu(z) in groups of `group_size`; y, z (..., width); weight (width,). Returns the dtype of y."""
    return _norm(y, z, weight, eps, group_size)
