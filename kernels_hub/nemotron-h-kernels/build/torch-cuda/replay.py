"""A few recorded tokens through convolution and recurrence, from states that stay as they were or take some of the tokens in.

What rollback needs: drafted tokens are kept as inputs, and every call runs them again from the last settled state. The state
is read once, whatever the number of tokens; it is written only where the first `settled` of them go into it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, on
from ._operator import operator
from ._overlap import next_may_begin, overlap, previous_done
from .selective_state_update import ANY_STEP, decay_of, time_step

_ROWS = 16  # of the state a program advances, as for one token
_CHANNELS = 128


@triton.jit
def _conv_kernel(
    state,
    x,
    weight,
    bias,
    out,
    tokens,
    channels,
    settled,
    x_batch,
    x_seq,
    state_batch,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside = c < channels
    x += batch * x_batch
    x_seq += tl.full((), 0, tl.int64)
    out += batch * tokens * channels
    window = state + batch * state_batch + c * KERNEL
    for t in range(0, tokens):
        total = tl.zeros([C], tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(KERNEL):
            source = t - (KERNEL - 1) + k
            new = tl.load(x + source * x_seq + c, mask=inside & (source >= 0), other=0.0).to(tl.float32)
            old = tl.load(window + (KERNEL + source), mask=inside & (source < 0), other=0.0).to(tl.float32)
            total += (new + old) * tl.load(weight + c * KERNEL + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + t * channels + c, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=inside)
    if settled > 0:
        slot = tl.arange(0, TAPS)
        source = settled - KERNEL + slot
        used = inside[:, None] & (slot < KERNEL)[None, :]
        new = tl.load(x + source[None, :] * x_seq + c[:, None], mask=used & (source >= 0)[None, :], other=0.0)
        old = tl.load(window[:, None] + (KERNEL + source)[None, :], mask=used & (source < 0)[None, :], other=0.0)
        moved = tl.where((source >= 0)[None, :], new.to(state.dtype.element_ty), old)
        # Every thread has read the old window before any writes the new one.
        tl.debug_barrier()
        tl.store(window[:, None] + slot[None, :], moved, mask=used)


@triton.jit
def _state_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    y,
    shortest,
    longest,
    tokens,
    settled,
    heads,
    per_group,
    state_batch,
    state_head,
    x_batch,
    x_seq,
    x_head,
    dt_batch,
    dt_seq,
    B_batch,
    B_seq,
    B_group,
    C_batch,
    C_seq,
    C_group,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    RAW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    both = p_in[:, None] & n_in[None, :]
    place = state + batch * state_batch + head * state_head + p[:, None] * N + n[None, :]
    a, shift = decay_of(A, dt_bias, head, RAW)
    skip = tl.load(D + head).to(tl.float32)
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    h = tl.load(place, mask=both, other=0.0).to(tl.float32)
    x += batch * x_batch + head * x_head
    dt += batch * dt_batch + head
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    y += (batch * tokens * heads + head) * P
    wide = tl.full((), 0, tl.int64)
    x_seq, dt_seq, B_seq, C_seq = x_seq + wide, dt_seq + wide, B_seq + wide, C_seq + wide
    for t in range(0, tokens):
        x_p = tl.load(x + t * x_seq + p, mask=p_in, other=0.0).to(tl.float32)
        step = time_step(tl.load(dt + t * dt_seq), shift, shortest, longest, RAW)
        B_n = tl.load(B + t * B_seq + n, mask=n_in, other=0.0).to(tl.float32)
        C_n = tl.load(C + t * C_seq + n, mask=n_in, other=0.0).to(tl.float32)
        h = h * tl.exp(step * a) + (step * x_p)[:, None] * B_n[None, :]
        out = tl.sum(h * C_n[None, :], 1) + skip * x_p
        tl.store(y + t * heads * P + p, out.to(y.dtype.element_ty), mask=p_in)
        if t == settled - 1:
            tl.store(place, h.to(state.dtype.element_ty), mask=both)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@operator("causal_conv1d_replay", mutates_args=("state",))
def _conv(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, settled: int) -> Tensor:
    batch, tokens, channels = x.shape
    kernel = weight.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = _dense(x), weight.contiguous()
    with on(x):
        _conv_kernel[(batch, triton.cdiv(channels, _CHANNELS))](
            state,
            x,
            weight,
            weight if bias is None else bias,
            out,
            tokens,
            channels,
            settled,
            x.stride(0),
            x.stride(1),
            state.stride(0),
            kernel,
            triton.next_power_of_2(kernel),
            bias is not None,
            _CHANNELS,
            num_warps=2,
            **overlap(x),
        )
    return out


@operator("selective_state_replay", mutates_args=("state",))
def _state(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    settled: int,
    dt_bias: Tensor | None,
    shortest: float,
    longest: float,
) -> Tensor:
    batch, tokens, heads, head_dim = x.shape
    state_size = state.shape[3]
    x, dt, B, C = _dense(x), _dense(dt), _dense(B), _dense(C)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = min(_ROWS, triton.next_power_of_2(head_dim))
    with on(x):
        _state_kernel[(batch * heads, triton.cdiv(head_dim, rows))](
            state,
            x,
            dt,
            A.contiguous(),
            B,
            C,
            D.contiguous(),
            D if dt_bias is None else dt_bias.contiguous(),
            y,
            shortest,
            longest,
            tokens,
            settled,
            heads,
            heads // B.shape[2],
            *state.stride()[:2],
            *x.stride()[:3],
            *dt.stride()[:2],
            *B.stride()[:3],
            *C.stride()[:3],
            head_dim,
            state_size,
            rows,
            block(state_size, 1),
            dt_bias is not None,
            num_warps=2,
            **overlap(x),
        )
    return y


@_conv.register_fake
def _(state, x, weight, bias, settled):
    return x.new_empty(x.shape)


@_state.register_fake
def _(state, x, dt, A, B, C, D, settled, dt_bias, shortest, longest):
    return x.new_empty(x.shape)


def causal_conv1d_replay(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, settled: int = 0
) -> Tensor:
    """The convolution's outputs for a few tokens behind `state`. Has no gradient.

    Args:
        state: (batch, channels, kernel), the last `kernel` inputs, oldest first; dense in its last two dimensions. Advanced
            in place by the first `settled` tokens.
        x: (batch, tokens, channels).
        weight, bias: as in `causal_conv1d`.
        settled: 0 to tokens.

    Returns:
        (batch, tokens, channels) in the dtype of x.
    """
    return _conv(state, x, weight, bias, settled)


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
) -> Tensor:
    """The recurrence's outputs for a few tokens behind `state`. Has no gradient.

    Args:
        state: (batch, heads, head_dim, state_size), dense in its last two dimensions. Advanced in place by the first
            `settled` tokens, and rounded to its dtype only then.
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
    return _state(state, x, dt, A, B, C, D, settled, dt_bias, *dt_limit)
