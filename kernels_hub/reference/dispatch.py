"""When an op must go through its registered operator, and when its plain function will do."""

from __future__ import annotations

import torch


def as_operator() -> bool:
    """Whether autograd or a compiler has to see the op. Otherwise the plain function saves the operator's overhead,
    which at one decoded token outweighs the arithmetic."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()
