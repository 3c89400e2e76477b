"""What comes before an op: whether its plain function will do, whether its arguments fit together, who wants a gradient."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def as_operator() -> bool:
    """Whether autograd or a compiler has to see the op. Otherwise the plain function saves the operator's overhead,
    which at one decoded token outweighs the arithmetic."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def misshapen(*expected: tuple[str, Tensor | None, tuple[int, ...]]) -> str | None:
    """The first of (name, tensor or None, shape) whose tensor has another shape, in words; or None."""
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            return f"`{name}` has shape {tuple(tensor.shape)}, the other arguments ask for {tuple(shape)}"
    return None


def no_gradient(*tensors: Tensor | None) -> str | None:
    """Of a kernel without a gradient: why it cannot serve where one of these wants one, or None."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "the kernel has no gradient: call it under `torch.no_grad()`"
    return None


def own_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """For products that an op promises in float32, or in the dtype of its inputs: autocast would take them in 16 bits."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
