"""FP8 with one scale for a whole tensor: value = float8_e4m3fn * scale, with |float8| up to 448."""

from __future__ import annotations

import torch
from torch import Tensor

from .nvfp4 import E4M3_MAX


def quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale rounded to float8_e4m3fn, ties to even; what lies beyond 448 becomes 448 instead of NaN.

    The quotient is rounded to the dtype of x on its way, as ModelOpt exports weights: from bfloat16 the bytes are the same.

    Args:
        scale: float32, positive, broadcastable to x.
    """
    return (x.float() / scale).to(x.dtype).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a float8_e4m3fn tensor, in `dtype`, rounded once, from float32."""
    return (x.float() * scale).to(dtype)
