"""One step of the Mamba-2 recurrence, for decoding: the state is read and written once.

H <- exp(dt A) H + dt x B^T          y = H C + D x
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, on
from ._operator import operator

_ROWS = 16  # of the state a program advances: small enough for hundreds of programs at batch 1


@triton.jit
def _update_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    y,
    heads,
    per_group,
    state_batch,
    state_head,
    x_batch,
    x_head,
    dt_batch,
    B_batch,
    B_group,
    C_batch,
    C_group,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    both = p_in[:, None] & n_in[None, :]
    place = state + batch * state_batch + head * state_head + p[:, None] * N + n[None, :]
    old = tl.load(place, mask=both, other=0.0).to(tl.float32)
    x_p = tl.load(x + batch * x_batch + head * x_head + p, mask=p_in, other=0.0).to(tl.float32)
    step = tl.load(dt + batch * dt_batch + head).to(tl.float32)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    B_n = tl.load(B + batch * B_batch + group * B_group + n, mask=n_in, other=0.0).to(tl.float32)
    C_n = tl.load(C + batch * C_batch + group * C_group + n, mask=n_in, other=0.0).to(tl.float32)
    new = old * decay + (step * x_p)[:, None] * B_n[None, :]
    tl.store(place, new.to(state.dtype.element_ty), mask=both)
    out = tl.sum(new * C_n[None, :], 1) + tl.load(D + head).to(tl.float32) * x_p
    tl.store(y + (batch * heads + head) * P + p, out.to(y.dtype.element_ty), mask=p_in)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@operator("selective_state_update", mutates_args=("state",))
def _update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    batch, heads, head_dim, state_size = state.shape
    x, dt, B, C = _dense(x), _dense(dt), _dense(B), _dense(C)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = min(_ROWS, triton.next_power_of_2(head_dim))
    with on(x):
        _update_kernel[(batch * heads, triton.cdiv(head_dim, rows))](
            state,
            x,
            dt,
            A.contiguous(),
            B,
            C,
            D.contiguous(),
            y,
            heads,
            heads // B.shape[1],
            state.stride(0),
            state.stride(1),
            x.stride(0),
            x.stride(1),
            dt.stride(0),
            B.stride(0),
            B.stride(1),
            C.stride(0),
            C.stride(1),
            head_dim,
            state_size,
            rows,
            block(state_size, 1),
            num_warps=2,
        )
    return y


@_update.register_fake
def _(state, x, dt, A, B, C, D):
    return x.new_empty(x.shape)


def selective_state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Advance `state` in place by one token and return its output. Has no gradient.

    Args:
        state: (batch, heads, head_dim, state_size), dense in its last two dimensions; updated in its own dtype.
        x: (batch, heads, head_dim).
        dt: (batch, heads), float32, after softplus; 0 leaves the state as it is (padding).
        A: (heads,), negative, float32.
        B, C: (batch, groups, state_size).
        D: (heads,).

    Returns:
        y: (batch, heads, head_dim) in the dtype of x.
    """
    return _update(state, x, dt, A, B, C, D)
