"""The NVFP4 format: four-bit floats (E2M1), a scale in float8_e4m3fn for every 16 of them, and one float32 scale above.

    value = e2m1(code) * block_scale * global_scale

A code is sign (1 bit), exponent (2), mantissa (1): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Two codes share a byte,
the earlier one in the low half. Everything here is in float32, as NVIDIA ModelOpt computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # smallest positive float8_e4m3fn, a subnormal
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_e2m1(x: Tensor) -> Tensor:
    """Nearest code of each value, ties to the even code, magnitudes above 6 to 6. float32 -> uint8 in 0..15."""
    # A magnitude on a border takes the lower code. Where that is odd, the border lies just below the tie.
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=x.device)
    borders[1::2] = torch.nextafter(borders[1::2], torch.zeros_like(borders[1::2]))
    code = torch.bucketize(x.abs(), borders, out_int32=True).to(torch.uint8)
    return code | (x < 0).to(torch.uint8) << 3


def pack(codes: Tensor) -> Tensor:
    """Codes (..., n) uint8 -> bytes (..., n / 2), the even positions in the low halves."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Bytes (..., n / 2) -> codes (..., n); the inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block scales of `x` under a given global scale.

    A block's scale is amax / (6 * global_scale), rounded to float8_e4m3fn within [2^-9, 448]; a block of zeros has scale 1.

    Args:
        x: (..., n), finite, n a multiple of 16.
        global_scale: float32, positive, broadcastable to the leading axes of x.

    Returns:
        Packed codes (..., n / 2) uint8 and block scales (..., n / 16) float8_e4m3fn.

    Raises:
        ValueError: n is not a multiple of 16.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(
            f"NVFP4 has blocks of {BLOCK}: the last axis of a tensor of shape {tuple(x.shape)} does not fit."
        )
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    global_scale = global_scale.float().unsqueeze(-1)
    scale = blocks.abs().amax(-1) / (E2M1_MAX * global_scale)
    scale = torch.where(scale == 0, 1.0, scale).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    step = scale.float() * global_scale
    # A step that underflows to zero can hold nothing but zeros.
    step = torch.where(step == 0, torch.inf, step).unsqueeze(-1)
    return pack(encode_e2m1(blocks / step).flatten(-2)), scale


def dequantize_nvfp4(packed: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of packed codes.

    Args:
        packed: (..., n / 2) uint8; scale: (..., n / 16) float8_e4m3fn; global_scale: float32, broadcastable to the
            leading axes.

    Returns:
        (..., n) in `dtype`, rounded once, from float32.
    """
    table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=packed.device)
    values = table[unpack(packed).int()].unflatten(-1, (-1, BLOCK))
    return (values * (scale.float() * global_scale.unsqueeze(-1)).unsqueeze(-1)).flatten(-2).to(dtype)
