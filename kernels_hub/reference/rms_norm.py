"""Root-mean-square normalisation, plain and gated in groups, with a gradient that keeps only its inputs.

    rms_norm(x)            = w * x / sqrt(mean(x^2) + eps)
    gated_rms_norm(y, z)   = w * v / sqrt(mean over the group of v^2 + eps),   v = y * silu(z)

The gate comes before the norm (mamba-ssm's `norm_before_gate=False`). Both compute in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import as_operator


def _gated(y: Tensor, z: Tensor | None, group_size: int, work: torch.dtype) -> Tensor:
    """y * silu(z), seen as (..., groups, group_size)."""
    v = y.to(work)
    if z is not None:
        v = F.silu(z.to(work)).mul_(v)
    return v.unflatten(-1, (-1, group_size))


def _norm(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    work = torch.promote_types(y.dtype, torch.float32)
    if z is None:
        return F.rms_norm(y.to(work), (group_size,), weight.to(work), eps).to(y.dtype)
    normed = F.rms_norm(_gated(y, z, group_size, work), (group_size,), eps=eps)
    return (normed.flatten(-2) * weight.to(work)).to(y.dtype)


@torch.library.custom_op("nemotron_super::gated_rms_norm", mutates_args=())
def _norm_op(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    return _norm(y, z, weight, eps, group_size)


@_norm_op.register_fake
def _(y, z, weight, eps, group_size):
    return y.new_empty(y.shape)


@torch.library.custom_op("nemotron_super::gated_rms_norm_backward", mutates_args=())
def _norm_backward_op(
    grad: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(y.dtype, torch.float32)
    v = _gated(y, z, group_size, work)
    scale = torch.linalg.vector_norm(v, dim=-1, keepdim=True).square_().div_(group_size).add_(eps).rsqrt_()
    grad = grad.to(work).unflatten(-1, (-1, group_size))
    normed = v * scale
    grad_weight = (grad * normed).reshape(-1, y.shape[-1]).sum(0)
    g = grad * weight.to(work).view(-1, group_size)
    # d v = scale * (g - normed * mean(g * normed))
    along = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(group_size)
    grad_v = g.addcmul_(normed, along, value=-1).mul_(scale).flatten(-2)
    if z is None:
        return grad_v.to(y.dtype), grad_v.new_empty(0), grad_weight.to(weight.dtype)
    z_work = z.to(work)
    grad_y = grad_v * F.silu(z_work)
    grad_z = torch.ops.aten.silu_backward(grad_v.mul_(y.to(work)), z_work)
    return grad_y.to(y.dtype), grad_z.to(z.dtype), grad_weight.to(weight.dtype)


@_norm_backward_op.register_fake
def _(grad, y, z, weight, eps, group_size):
    return y.new_empty(y.shape), y.new_empty(0) if z is None else z.new_empty(z.shape), torch.empty_like(weight)


def _setup_context(ctx, inputs, output) -> None:
    y, z, weight, eps, group_size = inputs
    ctx.save_for_backward(y, z, weight)
    ctx.eps, ctx.group_size = eps, group_size


def _autograd(ctx, grad):
    y, z, weight = ctx.saved_tensors
    grad_y, grad_z, grad_weight = torch.ops.nemotron_super.gated_rms_norm_backward(
        grad, y, z, weight, ctx.eps, ctx.group_size
    )
    return grad_y, None if z is None else grad_z, grad_weight, None, None


_norm_op.register_autograd(_autograd, setup_context=_setup_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension of x (..., width); weight (width,). Returns the dtype of x."""
    return (_norm_op if as_operator() else _norm)(x, None, weight, eps, x.shape[-1])


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """RMS norm of y * silu(z) in groups of `group_size`; y, z (..., width); weight (width,). Returns the dtype of y."""
    return (_norm_op if as_operator() else _norm)(y, z, weight, eps, group_size)
