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
_TOKENS, _CHANNELS = 8, 128  # that a program convolves at once


@triton.jit
def _taken(kept, batch, settled, HAS_KEPT: tl.constexpr):
    """How many of the settled tokens a row has."""
    count = settled
    if HAS_KEPT:
        count = tl.minimum(tl.load(kept + batch), settled).to(tl.int32)
    return count


@triton.jit
def _inputs(window, x, x_seq, c, source, needed, taken, refused, KERNEL: tl.constexpr):
    """(sources, channels): a row's inputs, numbered from its first token on as if those refused had never come."""
    row = source + tl.where(source < taken, 0, refused)
    new = tl.load(x + row[:, None] * x_seq + c[None, :], mask=needed & (source >= 0)[:, None], other=0.0)
    before = window + c[None, :] * KERNEL + (KERNEL + source)[:, None]
    old = tl.load(before, mask=needed & (source < 0)[:, None], other=0.0)
    return tl.where((source >= 0)[:, None], new.to(tl.float32), old.to(tl.float32))


@triton.jit
def _conv_kernel(
    state,
    x,
    weight,
    bias,
    kept,
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
    HAS_KEPT: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside = c < channels
    taken = _taken(kept, batch, settled, HAS_KEPT)
    refused = settled - taken
    x += batch * x_batch
    x_seq += tl.full((), 0, tl.int64)
    out += batch * tokens * channels
    window = state + batch * state_batch
    for first in range(0, tokens, T):
        t = first + tl.arange(0, T)
        there = (t < taken) | ((t >= settled) & (t < tokens))
        needed = there[:, None] & inside[None, :]
        place = t - tl.where(t < settled, 0, refused)
        total = tl.zeros([T, C], tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(KERNEL):
            tap = tl.load(weight + c * KERNEL + k, mask=inside, other=0.0).to(tl.float32)
            source = place - (KERNEL - 1) + k
            total += _inputs(window, x, x_seq, c, source, needed, taken, refused, KERNEL) * tap[None, :]
        y = tl.where(needed, total * tl.sigmoid(total), 0.0)
        written = (t < tokens)[:, None] & inside[None, :]
        tl.store(out + t[:, None] * channels + c[None, :], y.to(out.dtype.element_ty), mask=written)
    if settled > 0:
        slot = tl.arange(0, TAPS)
        used = (slot < KERNEL)[:, None] & inside[None, :]
        moved = _inputs(window, x, x_seq, c, taken - KERNEL + slot, used, taken, refused, KERNEL)
        # Every thread has read the old window before any writes the new one.
        tl.debug_barrier()
        tl.store(window + c[None, :] * KERNEL + slot[:, None], moved.to(state.dtype.element_ty), mask=used)


@triton.jit
def _advance(h, x, dt, B, a, shift, p, n, p_in, n_in, shortest, longest, RAW: tl.constexpr):
    """The state behind one token, and the token's x."""
    x_p = tl.load(x + p, mask=p_in, other=0.0).to(tl.float32)
    step = time_step(tl.load(dt), shift, shortest, longest, RAW)
    B_n = tl.load(B + n, mask=n_in, other=0.0).to(tl.float32)
    return h * tl.exp(step * a) + (step * x_p)[:, None] * B_n[None, :], x_p


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
    kept,
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
    HAS_KEPT: tl.constexpr,
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
    y += (batch * (tokens - settled) * heads + head) * P
    wide = tl.full((), 0, tl.int64)
    x_seq, dt_seq, B_seq, C_seq = x_seq + wide, dt_seq + wide, B_seq + wide, C_seq + wide
    for t in range(0, _taken(kept, batch, settled, HAS_KEPT)):
        h, _ = _advance(
            h, x + t * x_seq, dt + t * dt_seq, B + t * B_seq, a, shift, p, n, p_in, n_in, shortest, longest, RAW
        )
    if settled > 0:
        tl.store(place, h.to(state.dtype.element_ty), mask=both)
    for t in range(settled, tokens):
        h, x_p = _advance(
            h, x + t * x_seq, dt + t * dt_seq, B + t * B_seq, a, shift, p, n, p_in, n_in, shortest, longest, RAW
        )
        C_n = tl.load(C + t * C_seq + n, mask=n_in, other=0.0).to(tl.float32)
        out = tl.sum(h * C_n[None, :], 1) + skip * x_p
        tl.store(y + (t - settled) * heads * P + p, out.to(y.dtype.element_ty), mask=p_in)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@operator("causal_conv1d_replay", mutates_args=("state",))
def _conv(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, settled: int, kept: Tensor | None) -> Tensor:
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
            weight if kept is None else kept.contiguous(),
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
            kept is not None,
            _TOKENS,
            _CHANNELS,
            num_warps=4,
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
    kept: Tensor | None,
    dt_bias: Tensor | None,
    shortest: float,
    longest: float,
) -> Tensor:
    batch, tokens, heads, head_dim = x.shape
    state_size = state.shape[3]
    x, dt, B, C = _dense(x), _dense(dt), _dense(B), _dense(C)
    y = torch.empty(batch, tokens - settled, heads, head_dim, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
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
            D if kept is None else kept.contiguous(),
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
            kept is not None,
            num_warps=2,
            **overlap(x),
        )
    return y


@_conv.register_fake
def _(state, x, weight, bias, settled, kept):
    return x.new_empty(x.shape)


@_state.register_fake
def _(state, x, dt, A, B, C, D, settled, kept, dt_bias, shortest, longest):
    return x.new_empty(x.shape[0], x.shape[1] - settled, *x.shape[2:])


def causal_conv1d_replay(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    settled: int = 0,
    kept: Tensor | None = None,
) -> Tensor:
    """The convolution's outputs for a few tokens behind `state`. Has no gradient.

    Args:
        state: (batch, channels, kernel), the last `kernel` inputs, oldest first; dense in its last two dimensions. Advanced
            in place by the first `settled` tokens.
        x: (batch, tokens, channels).
        weight, bias: as in `causal_conv1d`.
        settled: 0 to tokens.
        kept: (batch,) integers, or None for all: how many of the settled tokens a row has. To it, the others never came.

    Returns:
        (batch, tokens, channels) in the dtype of x; 0 for tokens that a row has not.
    """
    return _conv(state, x, weight, bias, settled, kept)


def selective_state_replay(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    settled: int = 0,
    kept: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = ANY_STEP,
) -> Tensor:
    """The recurrence's outputs for the last of a few tokens behind `state`. Has no gradient.

    Args:
        state: (batch, heads, head_dim, state_size), dense in its last two dimensions. Advanced in place by the first
            `settled` tokens, and rounded to its dtype only then.
        x: (batch, tokens, heads, head_dim).
        dt: (batch, tokens, heads), after softplus; 0 leaves the state as it is. With `dt_bias` what is projected.
        A: (heads,), negative. With `dt_bias` as the model keeps it, log(-A).
        B, C: (batch, tokens, groups, state_size).
        D: (heads,).
        settled: 0 to tokens.
        kept: as in `causal_conv1d_replay`.
        dt_bias, dt_limit: as in `selective_state_update`.

    Returns:
        (batch, tokens - settled, heads, head_dim) in the dtype of x: of the tokens behind those settled.
    """
    return _state(state, x, dt, A, B, C, D, settled, kept, dt_bias, *dt_limit)
