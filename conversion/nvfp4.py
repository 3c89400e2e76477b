"""Weights to NVFP4 and FP8 as NVIDIA ModelOpt exports them, byte for byte, without data.

    NVFP4: weight_scale_2 = amax / (6 * 448), weight_scale = e4m3(block amax / (6 * weight_scale_2))
    FP8:   weight_scale = amax / 448

Readers multiply q, k and v of one attention in one product, so in NVFP4 these share one `weight_scale_2`: pass the largest
of their amax. The formats themselves are in `kernels_hub/reference/`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels_hub.reference.fp8 import quantize_fp8
from ..kernels_hub.reference.nvfp4 import BLOCK, quantize_nvfp4
from ..modeling.quantized_layers import WeightFormat

# What a module's input scale is where nobody measured its inputs: their own unit.
NO_INPUT_SCALE = 1.0


def weight_amax(weight: Tensor, name: str) -> Tensor:
    """Largest magnitude of a weight, float32 ().

    Raises:
        ValueError: `weight`, called `name`, holds NaN or infinity.
    """
    amax = weight.abs().amax().float()
    if not amax.isfinite():
        raise ValueError(f"{name} holds NaN or infinity and cannot be quantised. Is the checkpoint damaged?")
    return amax


def quantize_weight(
    weight: Tensor, weight_format: WeightFormat, name: str, amax: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds for one linear map.

    Args:
        weight: (out, in).
        name: of the weight, for messages.
        amax: () float32, at least the largest magnitude in `weight`; by default that.

    Returns:
        `weight`, `weight_scale`, in NVFP4 `weight_scale_2`, and `input_scale`, which is 1 until it is calibrated.

    Raises:
        ValueError: NaN or infinity in `weight`; rows that NVFP4's blocks of 16 do not divide.
    """
    own = weight_amax(weight, name)
    scale = (own if amax is None else amax.float()) / weight_format.divisor
    # A weight of zeros, or so small that its scale underflows, is a weight of zeros under any scale.
    scale = torch.where(scale > 0, scale, 1.0)
    input_scale = torch.tensor(NO_INPUT_SCALE, device=weight.device)
    if weight_format.name == "FP8":
        return {"weight": quantize_fp8(weight, scale), "weight_scale": scale, "input_scale": input_scale}
    check_rows(weight.shape[-1], name)
    packed, block_scale = quantize_nvfp4(weight, scale)
    return {"weight": packed, "weight_scale": block_scale, "weight_scale_2": scale, "input_scale": input_scale}


def check_rows(length: int, name: str) -> None:
    """Refuse rows whose length is not a multiple of NVFP4's block size.

    Raises:
        ValueError: naming the weight.
    """
    if length % BLOCK:
        raise ValueError(
            f"{name} has rows of {length}, which NVFP4's blocks of {BLOCK} do not divide: leave it unquantised, or use FP8."
        )
