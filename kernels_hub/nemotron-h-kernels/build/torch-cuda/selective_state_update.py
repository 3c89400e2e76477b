"""One step of the Mamba-2 recurrence, for decoding: the state is read and written once.

H <- exp(dt A) H + dt x B^T          y = H C + D x

Given `dt_bias`, dt = softplus(dt + dt_bias) and A = -exp(A) are taken here: in a kernel each they would last as long as the step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, cdiv, dense, empty_like, on, power_of_2
from ._operator import operator
from ._overlap import next_may_begin, overlap, prefetch, previous_done

_ROWS = 16  # of the state a program advances: small enough for hundreds of programs at batch 1
ANY_STEP = (0.0, float("inf"))


@triton.jit
def decay_of(A, dt_bias, head, RAW: tl.constexpr):
    """A head's A and the bias of its time step, in float32."""
    a = tl.load(A + head).to(tl.float32)
    shift = a * 0.0
    if RAW:
        a = -tl.exp(a)
        shift = tl.load(dt_bias + head).to(tl.float32)
    return a, shift


@triton.jit
def time_step(dt, shift, shortest, longest, RAW: tl.constexpr):
    """The step that `dt` stands for; softplus(v) = max(v, 0) + log(1 + exp(-|v|)), exact where 1 + exp rounds to 1."""
    step = dt.to(tl.float32)
    if RAW:
        v = step + shift
        e = tl.exp(-tl.abs(v))
        u = 1.0 + e
        # log1p from log: what the sum has rounded off is put back.
        tail = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        step = tl.minimum(tl.maximum(tl.maximum(v, 0.0) + tail, shortest), longest)
    return step


@triton.jit
def prefetch_state(state, p, P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr):
    """Ask for the rows `p` of a head's state (P, N), which one step after another reads from memory."""
    LINE: tl.constexpr = 1024 // state.dtype.element_ty.primitive_bitwidth
    n = tl.minimum(tl.arange(0, BN // LINE if BN > LINE else 1) * LINE, N - 1)
    prefetch(state + tl.minimum(p, P - 1)[:, None] * N + n[None, :], OVERLAP)


@triton.jit
def _update_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    live,
    y,
    shortest,
    longest,
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
    RAW: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    both = p_in[:, None] & n_in[None, :]
    state += batch * state_batch + head * state_head
    place = state + p[:, None] * N + n[None, :]
    a, shift = decay_of(A, dt_bias, head, RAW)
    skip = tl.load(D + head).to(tl.float32)
    next_may_begin(OVERLAP)
    prefetch_state(state, p, P, N, BN, OVERLAP)
    previous_done(OVERLAP)
    old = tl.load(place, mask=both, other=0.0).to(tl.float32)
    x_p = tl.load(x + batch * x_batch + head * x_head + p, mask=p_in, other=0.0).to(tl.float32)
    step = time_step(tl.load(dt + batch * dt_batch + head), shift, shortest, longest, RAW)
    if HAS_LIVE:
        step *= tl.load(live + batch).to(tl.float32)
    decay = tl.exp(step * a)
    B_n = tl.load(B + batch * B_batch + group * B_group + n, mask=n_in, other=0.0).to(tl.float32)
    C_n = tl.load(C + batch * C_batch + group * C_group + n, mask=n_in, other=0.0).to(tl.float32)
    new = old * decay + (step * x_p)[:, None] * B_n[None, :]
    tl.store(place, new.to(state.dtype.element_ty), mask=both)
    out = tl.sum(new * C_n[None, :], 1) + skip * x_p
    tl.store(y + (batch * heads + head) * P + p, out.to(y.dtype.element_ty), mask=p_in)


@operator("selective_state_update", mutates_args=("state",))
def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    shortest: float,
    longest: float,
    live: Tensor | None,
) -> Tensor:
    batch, heads, head_dim, state_size = state.shape
    x, dt, B, C = dense(x), dense(dt), dense(B), dense(C)
    y = empty_like(x)
    rows = min(_ROWS, power_of_2(head_dim))
    with on(x):
        _update_kernel[(batch * heads, cdiv(head_dim, rows))](
            state,
            x,
            dt,
            A.contiguous(),
            B,
            C,
            D.contiguous(),
            D if dt_bias is None else dt_bias.contiguous(),
            D if live is None else live.contiguous(),
            y,
            shortest,
            longest,
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
            dt_bias is not None,
            live is not None,
            num_warps=2,
            **overlap(x),
        )
    return y


@_update.register_fake
def _(state, x, dt, A, B, C, D, dt_bias, shortest, longest, live):
    return x.new_empty(x.shape)


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
    """Advance `state` in place by one token and return its output. Has no gradient.

    Args:
        state: (batch, heads, head_dim, state_size), dense in its last two dimensions; updated in its own dtype.
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
    return _update(state, x, dt, A, B, C, D, dt_bias, *dt_limit, live)
