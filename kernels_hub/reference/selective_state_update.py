"""One step of the Mamba-2 recurrence, for decoding, in plain torch.

    H <- exp(dt A) H + dt x B^T          y = H C + D x

The same mathematics as `ssd_chunk_scan`, with no clamp of dt in either, so that prefill and decode agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import own_precision
from .stochastic_round import store_as
from .time_step import ANY_STEP, decay, time_step


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = ANY_STEP,
    live: Tensor | None = None,
) -> Tensor:
    """Advance `state` in place by one token and return its output.

    Args:
        state: (batch, heads, head_dim, state_size); updated in place, in its own dtype; one of 16 bits is
            rounded stochastically.
        x: (batch, heads, head_dim).
        dt: (batch, heads), after softplus; 0 leaves the state as it is. With `dt_bias` what is projected.
        A: (heads,), negative. With `dt_bias` as the model keeps it, log(-A).
        B, C: (batch, groups, state_size).
        D: (heads,).
        dt_bias: (heads,) or None; the step is then softplus(dt + dt_bias), in float32.
        dt_limit: the shortest and the longest step, with `dt_bias`.
        live: (batch,) or None; 0 leaves a row's state as it is (padding), 1 advances it.

    Returns:
        y: (batch, heads, head_dim) in the dtype of x.
    """
    if dt_bias is not None:
        dt, A = time_step(dt, dt_bias, dt_limit), decay(A)
    if live is not None:
        dt = dt * live.unsqueeze(-1)
    batch, heads, head_dim, state_size = state.shape
    groups = B.shape[1]
    rows = heads // groups * head_dim
    work = torch.promote_types(x.dtype, torch.float32)
    new = state.to(work).contiguous()  # the state itself, wherever it can be
    new.mul_(torch.exp(dt * A).to(work)[:, :, None, None])
    flat = new.view(batch * groups, rows, state_size)
    x_work = x.to(work)
    with own_precision(x):
        flat.baddbmm_(
            (x_work * dt.to(work).unsqueeze(-1)).reshape(batch * groups, rows, 1),
            B.to(work).reshape(batch * groups, 1, state_size),
        )
        y = torch.linalg.vecdot(flat, C.to(work).reshape(batch * groups, 1, state_size)).view(batch, heads, head_dim)
    if new is not state:
        state.copy_(store_as(new, state.dtype))
    return torch.addcmul(y, x_work, D.to(work).unsqueeze(-1)).to(x.dtype)
