"""x times the transpose of a frozen quantised weight, differentiable with respect to x.

The weight is dequantised when it is used, forward and again backward, so that autograd holds on to nothing but the
packed tensors. Products are taken in the dtype of x. `simulate_*` round x as the hardware would that multiplies quantised
operands; their gradient passes straight through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import dequantize_fp8, quantize_fp8
from .linear import finished
from .nvfp4 import dequantize_nvfp4, quantize_nvfp4


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dequantize: Callable[..., Tensor], *stored: Tensor) -> Tensor:
        return F.linear(x, dequantize(*stored, dtype=x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.dequantize, *stored = inputs
        ctx.save_for_backward(*stored)

    @staticmethod
    def backward(ctx, grad):
        stored = ctx.saved_tensors
        return grad @ ctx.dequantize(*stored, dtype=grad.dtype), None, *(None for _ in stored)


def _times(x: Tensor, dequantize: Callable[..., Tensor], *stored: Tensor) -> Tensor:
    # Without gradients a compiler cannot trace the function with its setup apart.
    if torch.is_grad_enabled():
        return _FrozenLinear.apply(x, dequantize, *stored)
    return F.linear(x, dequantize(*stored, dtype=x.dtype))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


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
        x: (..., in); packed: (out, in / 2) uint8; scale: (out, in / 16) float8_e4m3fn; global_scale: () float32.
        relu2, plus: as in `small_batch_linear`.

    Returns:
        (..., out) in the dtype of x.
    """
    return finished(_times(x, dequantize_nvfp4, packed, scale, global_scale), relu2, plus)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, relu2: bool = False, plus: tuple[Tensor, ...] = ()) -> Tensor:
    """x @ W^T with W in FP8.

    Args:
        x: (..., in); weight: (out, in) float8_e4m3fn; scale: () float32.
        relu2, plus: as in `small_batch_linear`.

    Returns:
        (..., out) in the dtype of x.
    """
    return finished(_times(x, dequantize_fp8, weight, scale), relu2, plus)


def simulate_nvfp4(x: Tensor, global_scale: Tensor) -> Tensor:
    """x (..., n) as NVFP4 holds it: block scales from x itself, the global scale () as stored."""
    with torch.no_grad():
        rounded = dequantize_nvfp4(*quantize_nvfp4(x, global_scale), global_scale, x.dtype)
    return _StraightThrough.apply(x, rounded)


def simulate_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x as FP8 holds it, with the stored scale (): rounded once, as ModelOpt's simulation and readers of its checkpoints do."""
    with torch.no_grad():
        rounded = dequantize_fp8(quantize_fp8(x.float(), scale), scale, x.dtype)
    return _StraightThrough.apply(x, rounded)
