"""A few recorded tokens through convolution and recurrence, from states that stay as they were or take some of the tokens in.

What rollback needs: drafted tokens are kept as inputs, and every call runs them again from the last settled state. The state
is read once, whatever the number of tokens; it is written only where the first `settled` of them go into it. How many of those
a row has kept may be known to the device alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, cdiv, dense, on, power_of_2
from ._operator import operator
from ._overlap import next_may_begin, overlap, prefetch, previous_done
from .selective_state_update import ANY_STEP, decay_of, prefetch_state, time_step

_ROWS = 16  # of the state a program advances, as for one token
_TOKENS, _CHANNELS = 8, 128  # that a program convolves at once
# Tokens whose inputs are on their way together: one after another, each would wait for its own.
_AHEAD = tl.constexpr(4)


@triton.jit
def _taken(kept, batch, settled, HAS_KEPT: tl.constexpr):
    """How many of the settled tokens a row has."""
    count = settled
    if HAS_KEPT:
        count = tl.minimum(tl.load(kept + batch), settled).to(tl.int32)
    return count


@triton.jit
def _inputs(window, drafts, drafts_seq, x, x_seq, c, source, needed, in_window, taken, KERNEL: tl.constexpr):
    """(sources, columns): a row's inputs, numbered from its first draft on; those before lie in the window."""
    held = needed & ((source >= 0) & (source < taken))[:, None]
    value = tl.load(drafts + source[:, None] * drafts_seq + c[None, :], mask=held, other=0.0).to(tl.float32)
    new = needed & (source >= taken)[:, None]
    value += tl.load(x + (source - taken)[:, None] * x_seq + c[None, :], mask=new, other=0.0).to(tl.float32)
    past = needed & in_window[None, :] & (source < 0)[:, None]
    value += tl.load(window + c[None, :] * KERNEL + (KERNEL + source)[:, None], mask=past, other=0.0).to(tl.float32)
    return value


@triton.jit
def _conv_kernel(
    state,
    x,
    weight,
    bias,
    drafts,
    kept,
    out,
    new,
    channels,
    width,
    settled,
    x_batch,
    x_seq,
    drafts_batch,
    drafts_seq,
    state_batch,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DRAFTS: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    next_may_begin(OVERLAP)
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside, convolved = c < width, c < channels
    window = state + batch * state_batch
    prefetch(window + tl.minimum(c, channels - 1) * KERNEL, OVERLAP)
    shift = tl.zeros([C], tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + c, mask=convolved, other=0.0).to(tl.float32)
    taps = ()
    for k in tl.static_range(KERNEL):
        taps += (tl.load(weight + c * KERNEL + k, mask=convolved, other=0.0).to(tl.float32),)
    previous_done(OVERLAP)
    taken = _taken(kept, batch, settled, HAS_KEPT)
    tokens = settled + new
    x += batch * x_batch
    drafts += batch * drafts_batch
    wide = tl.full((), 0, tl.int64)
    x_seq, drafts_seq = x_seq + wide, drafts_seq + wide
    out += batch * tokens * width
    if HAS_DRAFTS:
        slot = tl.arange(0, TAPS)
        used = (slot < KERNEL)[:, None] & convolved[None, :]
        source = taken - KERNEL + slot
        moved = _inputs(window, drafts, drafts_seq, x, x_seq, c, source, used, convolved, taken, KERNEL)
    for first in range(0, tokens, T):
        t = first + tl.arange(0, T)
        there = (t < taken) | ((t >= settled) & (t < tokens))
        needed = there[:, None] & inside[None, :]
        place = t - tl.where(t < settled, 0, settled - taken)
        newest = tl.zeros([T, C], tl.float32)
        total = newest + shift[None, :]
        for k in tl.static_range(KERNEL):
            before = place - (KERNEL - 1) + k
            newest = _inputs(window, drafts, drafts_seq, x, x_seq, c, before, needed, convolved, taken, KERNEL)
            total += newest * taps[k][None, :]
        y = tl.where(convolved[None, :], total * tl.sigmoid(total), newest)
        written = (t < tokens)[:, None] & inside[None, :]
        y = tl.where(needed, y, 0.0).to(out.dtype.element_ty)
        tl.store(out + t[:, None] * width + c[None, :], y, mask=written)
    if HAS_DRAFTS:
        # Every thread has read old window and old drafts before any writes new ones.
        tl.debug_barrier()
        tl.store(window + c[None, :] * KERNEL + slot[:, None], moved.to(state.dtype.element_ty), mask=used)
        for first in range(0, new, T):
            t = first + tl.arange(0, T)
            held = (t < new)[:, None] & inside[None, :]
            value = tl.load(x + t[:, None] * x_seq + c[None, :], mask=held)
            tl.store(drafts + t[:, None] * drafts_seq + c[None, :], value, mask=held)


@triton.jit
def _read(x, dt, B, x_seq, dt_seq, B_seq, first, end, shift, p, n, p_in, n_in, shortest, longest, RAW: tl.constexpr):
    """x, time step and B of a few tokens from `first` on; from `end` on the step is zero, which leaves a state as it is."""
    xs, steps, Bs = (), (), ()
    for i in tl.static_range(_AHEAD):
        t, there = first + i, first + i < end
        xs += (tl.load(x + t * x_seq + p, mask=p_in & there, other=0.0).to(tl.float32),)
        step = time_step(tl.load(dt + t * dt_seq, mask=there, other=0.0), shift, shortest, longest, RAW)
        steps += (tl.where(there, step, 0.0),)
        Bs += (tl.load(B + t * B_seq + n, mask=n_in & there, other=0.0).to(tl.float32),)
    return xs, steps, Bs


@triton.jit
def _advanced(h, x_p, step, B_n, a):
    """The state behind one token."""
    return h * tl.exp(step * a) + (step * x_p)[:, None] * B_n[None, :]


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
    state += batch * state_batch + head * state_head
    place = state + p[:, None] * N + n[None, :]
    a, shift = decay_of(A, dt_bias, head, RAW)
    skip = tl.load(D + head).to(tl.float32)
    next_may_begin(OVERLAP)
    prefetch_state(state, p, P, N, BN, OVERLAP)
    previous_done(OVERLAP)
    h = tl.load(place, mask=both, other=0.0).to(tl.float32)
    x += batch * x_batch + head * x_head
    dt += batch * dt_batch + head
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    y += (batch * (tokens - settled) * heads + head) * P
    wide = tl.full((), 0, tl.int64)
    x_seq, dt_seq, B_seq, C_seq = x_seq + wide, dt_seq + wide, B_seq + wide, C_seq + wide
    taken = _taken(kept, batch, settled, HAS_KEPT)
    for first in range(0, taken, _AHEAD):
        xs, steps, Bs = _read(
            x, dt, B, x_seq, dt_seq, B_seq, first, taken, shift, p, n, p_in, n_in, shortest, longest, RAW
        )
        for i in tl.static_range(_AHEAD):
            h = _advanced(h, xs[i], steps[i], Bs[i], a)
    if settled > 0:
        tl.store(place, h.to(state.dtype.element_ty), mask=both)
    for first in range(settled, tokens, _AHEAD):
        xs, steps, Bs = _read(
            x, dt, B, x_seq, dt_seq, B_seq, first, tokens, shift, p, n, p_in, n_in, shortest, longest, RAW
        )
        Cs = ()
        for i in tl.static_range(_AHEAD):
            there = first + i < tokens
            Cs += (tl.load(C + (first + i) * C_seq + n, mask=n_in & there, other=0.0).to(tl.float32),)
        for i in tl.static_range(_AHEAD):
            h = _advanced(h, xs[i], steps[i], Bs[i], a)
            out = tl.sum(h * Cs[i][None, :], 1) + skip * xs[i]
            to = y + (first + i - settled) * heads * P + p
            tl.store(to, out.to(y.dtype.element_ty), mask=p_in & (first + i < tokens))


@operator("causal_conv1d_replay", mutates_args=("state", "drafts"))
def _conv(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    drafts: Tensor | None,
    settled: int,
    kept: Tensor | None,
) -> Tensor:
    batch, new, width = x.shape
    channels, kernel = weight.shape
    out = torch.empty(batch, settled + new, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = dense(x), weight.contiguous()
    held = x if drafts is None else drafts
    with on(x):
        _conv_kernel[(batch, cdiv(width, _CHANNELS))](
            state,
            x,
            weight,
            weight if bias is None else bias.contiguous(),
            held,
            weight if kept is None else kept.contiguous(),
            out,
            new,
            channels,
            width,
            settled,
            *x.stride()[:2],
            *held.stride()[:2],
            state.stride(0),
            kernel,
            power_of_2(kernel),
            bias is not None,
            drafts is not None,
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
    x, dt, B, C = dense(x), dense(dt), dense(B), dense(C)
    y = torch.empty(batch, tokens - settled, heads, head_dim, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows = min(_ROWS, power_of_2(head_dim))
    with on(x):
        _state_kernel[(batch * heads, cdiv(head_dim, rows))](
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
def _(state, x, weight, bias, drafts, settled, kept):
    return x.new_empty(x.shape[0], settled + x.shape[1], x.shape[2])


@_state.register_fake
def _(state, x, dt, A, B, C, D, settled, kept, dt_bias, shortest, longest):
    return x.new_empty(x.shape[0], x.shape[1] - settled, *x.shape[2:])


def causal_conv1d_replay(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    drafts: Tensor | None = None,
    settled: int = 0,
    kept: Tensor | None = None,
) -> Tensor:
    """The convolution's outputs for a few tokens behind `state` and behind drafts. Has no gradient.

    Args:
        state: (batch, channels, kernel), the last `kernel` inputs, oldest first; dense in its last two dimensions. Advanced
            in place by the settled tokens.
        x: (batch, tokens, width), the new tokens. What is in columns behind the first `channels` is passed on as it is.
        weight, bias: as in `causal_conv1d`.
        drafts: (batch, room, width) or None. The first `settled` tokens in it come before x; then it holds x in their place.
        settled: 0 to room.
        kept: (batch,) integers, or None for all: how many of the settled tokens a row has. To it, the others never came.

    Returns:
        (batch, settled + tokens, width) in the dtype of x; 0 for tokens that a row has not.
    """
    return _conv(state, x, weight, bias, drafts, settled, kept)


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
        kept: (batch,) integers, or None for all: how many of the settled tokens a row has. To it, the others never came.
        dt_bias, dt_limit: as in `selective_state_update`.

    Returns:
        (batch, tokens - settled, heads, head_dim) in the dtype of x: of the tokens behind those settled.
    """
    return _state(state, x, dt, A, B, C, D, settled, kept, dt_bias, *dt_limit)
