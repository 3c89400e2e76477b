"""A few recorded tokens through convolution and recurrence, from states that stay as they were or take some of them in.

The same mathematics as for a sequence: `conv` and `scan` say what computes it, so that what serves a sequence serves here too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .ssd_chunk_scan import ssd_chunk_scan
from .time_step import ANY_STEP, decay, time_step


def causal_conv1d_replay(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    settled: int = 0,
    conv: Callable[..., Tensor] = causal_conv1d,
) -> Tensor:
    """The convolution's outputs for a few tokens behind `state`.

    Args:
        state: (batch, channels, kernel), the last `kernel` inputs, oldest first; advanced in place by the first `settled`
            tokens.
        x: (batch, tokens, channels).
        weight, bias: as in `causal_conv1d`.
        settled: 0 to tokens.

    Returns:
        (batch, tokens, channels) in the dtype of x.
    """
    out = conv(x, weight, bias, state)
    if settled:
        state.copy_(torch.cat([state, x[:, :settled].transpose(1, 2).to(state.dtype)], -1)[..., settled:])
    return out


def selective_state_replay(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    settled: int = 0,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = ANY_STEP,
    scan: Callable[..., tuple[Tensor, Tensor]] = ssd_chunk_scan,
) -> Tensor:
    """The recurrence's outputs for a few tokens behind `state`.

    Args:
        state: (batch, heads, head_dim, state_size); advanced in place by the first `settled` tokens.
        x: (batch, tokens, heads, head_dim).
        dt: (batch, tokens, heads), after softplus; 0 leaves the state as it is. With `dt_bias` what is projected.
        A: (heads,), negative. With `dt_bias` as the model keeps it, log(-A).
        B, C: (batch, tokens, groups, state_size).
        D: (heads,).
        settled: 0 to tokens.
        dt_bias, dt_limit: as in `selective_state_update`.

    Returns:
        (batch, tokens, heads, head_dim) in the dtype of x.
    """
    if dt_bias is not None:
        dt, A = time_step(dt, dt_bias, dt_limit), decay(A)
    y, last = scan(x, dt, A, B, C, D, initial_state=state)
    if settled:
        if settled < x.shape[1]:
            x, dt, B, C = (t[:, :settled] for t in (x, dt, B, C))
            last = scan(x, dt, A, B, C, D, initial_state=state)[1]
        state.copy_(last)
    return y
