"""The time steps and the decay of Mamba-2 before its scan, in one launch instead of six.

step = softplus(dt + dt_bias), within `dt_limit`, zero where a row has no token any more;  A = -exp(A_log)

The scan could take them on its way, as the kernels for few tokens do. But its tensor cores want a step in each of many threads,
which would all work it out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, cdiv, dense, on
from ._operator import operator
from .selective_state_update import ANY_STEP, decay_of, time_step

_SIZE = 2048  # steps of a program


@triton.jit
def _kernel(
    dt,
    dt_bias,
    A_log,
    lengths,
    step,
    decay,
    shortest,
    longest,
    length,
    heads,
    dt_batch,
    dt_seq,
    PADDED: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    h = tl.arange(0, H)
    a, shift = decay_of(A_log, dt_bias, tl.minimum(h, heads - 1), True)
    tl.store(decay + h, a, mask=(h < heads) & (tl.program_id(0) == 0) & (batch == 0))
    inside = (t < length)[:, None] & (h < heads)[None, :]
    value = tl.load(dt + batch * dt_batch + t[:, None] * dt_seq + h[None, :], mask=inside, other=0.0)
    value = time_step(value, shift[None, :], shortest, longest, True)
    if PADDED:
        value = tl.where((t < tl.load(lengths + batch))[:, None], value, 0.0)
    tl.store(step + (batch * length + t)[:, None] * heads + h[None, :], value, mask=inside)


@operator("step_and_decay")
def _step_and_decay(
    dt: Tensor, dt_bias: Tensor, A_log: Tensor, shortest: float, longest: float, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, heads = dt.shape
    step = torch.empty(dt.shape, dtype=torch.float32, device=dt.device)
    decay = torch.empty(heads, dtype=torch.float32, device=dt.device)
    dt, size = dense(dt), block(heads, 1)
    positions = max(1, _SIZE // size)
    with on(dt):
        _kernel[(max(1, cdiv(length, positions)), batch)](
            dt,
            dt_bias.contiguous(),
            A_log.contiguous(),
            decay if lengths is None else lengths.contiguous(),
            step,
            decay,
            shortest,
            longest,
            length,
            heads,
            dt.stride(0),
            dt.stride(1),
            lengths is not None,
            positions,
            size,
            num_warps=4,
        )
    return step, decay


@_step_and_decay.register_fake
def _(dt, dt_bias, A_log, shortest, longest, lengths):
    return dt.new_empty(dt.shape, dtype=torch.float32), A_log.new_empty(A_log.shape, dtype=torch.float32)


def step_and_decay(
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    dt_limit: tuple[float, float] = ANY_STEP,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the scan takes, from what a model projects and what it keeps. Has no gradient.

    Args:
        dt: (batch, seq, heads), bfloat16 or float32, such as a slice of a projection; at least one row.
        dt_bias, A_log: (heads,).
        dt_limit: the shortest and the longest step.
        lengths: (batch,) integers, the tokens of each row, behind which steps are zero; or None where all are tokens.

    Returns:
        Steps (batch, seq, heads) and A (heads,), negative; float32.
    """
    return _step_and_decay(dt, dt_bias, A_log, *dt_limit, lengths)
