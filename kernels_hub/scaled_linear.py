"""x times the transpose of a frozen weight with both operands quantised, on the tensor cores that multiply FP8 or FP4.

The input is rounded with its stored scale, as `simulate_*` of `reference/quantized_linear.py` round it, and torch's scaled product
takes the codes of both. The gradient passes straight through the rounding, to the dequantised weight.

FP8 is served by GPUs of compute capability 8.9 and later, and by torch on a CPU. FP4 needs Blackwell, which nobody ran this on:
its operands are tested bit for bit, its product is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from .reference.fp8 import dequantize_fp8, quantize_fp8
from .reference.nvfp4 import dequantize_nvfp4, quantize_nvfp4


def fp8_unsupported(device: torch.device, rows: int, width: int) -> str | None:
    """Why a device cannot multiply by a weight (rows, width) with both operands in FP8, or None."""
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        return f"{_called(device)} does not multiply FP8 operands: that takes compute capability 8.9 (Ada, Hopper), or a CPU"
    return _odd_sizes(rows, width, 16)


def nvfp4_unsupported(device: torch.device, rows: int, width: int) -> str | None:
    """Why a device cannot multiply by a weight (rows, width) with both operands in NVFP4, or None."""
    if not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)):
        return f"{_called(device)} does not multiply FP4 operands: that takes compute capability 10.0 (Blackwell)"
    return _odd_sizes(rows, width, 32)


def _odd_sizes(rows: int, width: int, multiple: int) -> str | None:
    if rows % multiple == 0 and width % multiple == 0:
        return None
    return f"a weight of shape ({rows}, {width}) does not fit the product, which takes multiples of {multiple}"


def _called(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the device {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def swizzle_scales(scale: Tensor) -> Tensor:
    """Block scales in the order tensor cores read them.

    Tiles of 128 rows and 4 blocks, one after another along a row of tiles; in a tile, row r and block b lie at
    16 (r mod 32) + 4 (r div 32) + b. See "1D Block Scaling Factors Layout" in NVIDIA's cuBLAS documentation.

    Args:
        scale: (rows, blocks), one byte each.

    Returns:
        One dimension, filled up with zeros to whole tiles.
    """
    rows, blocks = scale.shape
    padded = F.pad(scale.view(torch.uint8), (0, -blocks % 4, 0, -rows % 128))
    tiles = padded.view(-(-rows // 128), 4, 32, -(-blocks // 4), 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scale.dtype)


def nvfp4_operand(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, n) as torch's scaled product takes it: codes (rows, n / 2) of two FP4 numbers each, and swizzled scales."""
    packed, scale = quantize_nvfp4(x, global_scale)
    return packed.view(torch.float4_e2m1fn_x2), swizzle_scales(scale)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, multiply: Callable, dequantize: Callable, input_scale: Tensor, *stored: Tensor
    ) -> Tensor:
        ctx.dequantize = dequantize
        ctx.save_for_backward(*stored)
        return multiply(x, input_scale, *stored)

    @staticmethod
    def backward(ctx, grad):
        stored = ctx.saved_tensors
        return grad @ ctx.dequantize(*stored, dtype=grad.dtype), None, None, None, *(None for _ in stored)


def _multiply_fp8(x: Tensor, input_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows = quantize_fp8(x.reshape(-1, x.shape[-1]).float(), input_scale)
    each = ScalingType.TensorWise
    out = F.scaled_mm(rows, weight.t(), input_scale, each, scale, each, output_dtype=x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def _multiply_nvfp4(x: Tensor, input_scale: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    codes, blocks = nvfp4_operand(x.reshape(-1, x.shape[-1]), input_scale)
    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    out = F.scaled_mm(
        codes,
        packed.view(torch.float4_e2m1fn_x2).t(),
        [blocks, input_scale],
        recipe,
        [swizzle_scales(scale), global_scale],
        recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=x.dtype,
    )
    return out.view(*x.shape[:-1], packed.shape[0])


def scaled_fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor) -> Tensor:
    """x @ W^T with both rounded to FP8.

    Args:
        x: (..., in); weight: (out, in) float8_e4m3fn; scale, input_scale: () float32. `in` and `out` are multiples of 16.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a device without FP8 products; sizes they do not take.
    """
    _refuse(fp8_unsupported(x.device, *weight.shape))
    return _Scaled.apply(x, _multiply_fp8, dequantize_fp8, input_scale, weight, scale)


def scaled_nvfp4_linear(x: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor, input_scale: Tensor) -> Tensor:
    """x @ W^T with both rounded to NVFP4; of x the block scales are its own, the global scale is the stored one.

    Args:
        x: (..., in); packed, scale, global_scale: as in `nvfp4_linear`; input_scale: () float32. `in` and `out` are
            multiples of 32.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a device without FP4 products; sizes they do not take.
    """
    _refuse(nvfp4_unsupported(x.device, packed.shape[0], 2 * packed.shape[1]))
    return _Scaled.apply(x, _multiply_nvfp4, dequantize_nvfp4, input_scale, packed, scale, global_scale)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"The inputs of a linear map cannot be quantised: {reason}.")
