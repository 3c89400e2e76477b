"""The residual add and the norm behind it: `h = x + residual;  w * h / sqrt(mean(h^2) + eps)`, and h itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .rms_norm import rms_norm


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, norm: Callable[..., Tensor] = rms_norm
) -> tuple[Tensor, Tensor]:
    """Add, then normalise over the last dimension.

    Args:
        x, residual: (..., width), of one dtype.
        weight: (width,).

    Returns:
        The normed sum and the sum, both (..., width) in the dtype of x. The norm is taken of the sum as it is returned,
        rounded: the result is that of the two steps.
    """
    total = x + residual
    return norm(total, weight, eps), total
