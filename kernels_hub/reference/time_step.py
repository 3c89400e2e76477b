"""The time step and the decay of Mamba-2, from what a model projects and what it keeps.

step = softplus(dt + dt_bias), within `dt_limit`;  A = -exp(A_log)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ANY_STEP = (0.0, float("inf"))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def time_step(dt: Tensor, dt_bias: Tensor, dt_limit: tuple[float, float] = ANY_STEP) -> Tensor:
    """(..., heads) of any dtype and (heads,) -> (..., heads) in float32 or, from float64, in float64."""
    step = F.softplus(dt + _wide(dt_bias))  # a sum in float32 at least, whatever dt comes in
    return step if tuple(dt_limit) == ANY_STEP else step.clamp(*dt_limit)


def decay(A_log: Tensor) -> Tensor:
    """(heads,) -> (heads,), negative, in float32 or, from float64, in float64."""
    return -torch.exp(_wide(A_log))


def step_and_decay(
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    dt_limit: tuple[float, float] = ANY_STEP,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both, as the scan takes them.

    Args:
        dt: (batch, seq, heads).
        dt_bias, A_log: (heads,).
        dt_limit: the shortest and the longest step.
        lengths: (batch,) integers, the tokens of each row, behind which steps are zero; or None where all are tokens.

    Returns:
        Steps (batch, seq, heads), as of `time_step`, and A (heads,), as of `decay`.
    """
    step = time_step(dt, dt_bias, dt_limit)
    if lengths is not None:
        # A time step of zero leaves the state as it is.
        padding = torch.arange(dt.shape[1], device=dt.device) >= lengths.unsqueeze(1)
        step = step.masked_fill(padding.unsqueeze(-1), 0)
    return step, decay(A_log)
