"""Rounding to a coarser float at random: up or down with the chances that make the mean exact.

A recurrent state that is stored after every token adds up thousands of small terms. Rounding to nearest drops each term that is
below half a step of the stored value, always, so slow states stop moving; rounding at random keeps their sum right on average.
(Croci et al. 2022, "Stochastic rounding: implementation, error analysis and applications".)
"""

from __future__ import annotations

import torch
from torch import Tensor

STOCHASTIC = (torch.bfloat16, torch.float16)


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """x in `dtype`, each value rounded to one of its two neighbours there, so that its expectation is x.

    What `dtype` represents stays as it is, NaN and infinities too; what rounding to nearest makes infinite becomes infinite. Draws
    one number for each value, from torch's own generator of the device unless one is given: `torch.manual_seed` repeats it. Has
    no gradient.

    Args:
        x: float32 or float64, any shape.
        dtype: bfloat16 or float16.
        generator: on the device of x.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in STOCHASTIC:
        raise ValueError(f"`dtype` is {dtype}: stochastic rounding is to {' or '.join(map(str, STOCHASTIC))}.")
    nearest = x.to(dtype)
    # As integers, floats of one sign are in the order of their magnitudes: one less is the next one towards zero.
    bits = nearest.view(torch.int16)
    low = (bits - (nearest.abs().to(x.dtype) > x.abs()).to(torch.int16)).view(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    low_x = low.to(x.dtype)
    # Exact: neighbours differ by a power of two, and x lies between them. NaN where x is not finite, which is never "above".
    share = (x - low_x) / (high.to(x.dtype) - low_x)
    draw = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return torch.where(nearest.isinf(), nearest, torch.where(draw < share, high, low))


def store_as(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """x as a recurrent state of `dtype` is stored: stochastically rounded where `dtype` has 16 bits."""
    if dtype in STOCHASTIC and x.dtype != dtype:
        return stochastic_round(x, dtype, generator)
    return x.to(dtype)
