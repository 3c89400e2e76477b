"""What comes before an op: whether its plain function will do, whether its arguments fit together, what autocast leaves alone."""

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


def refuse(reason: str | None) -> None:
    """
    Raises:
        ValueError: a reason is given.
    """
    if reason is not None:
        raise ValueError(f"{reason}.")


def own_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """For products that an op promises in float32, or in the dtype of its inputs: autocast would take them in 16 bits."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
