"""Depthwise causal convolution followed by SiLU, over a sequence and for one token.

    out_t = silu(bias + sum_k weight_k x_{t - (K - 1) + k})

A program of the forward takes a tile of positions by channels as they lie in (batch, seq, channels), strided rows included,
so the input is read where the projection wrote it. One of the backward walks a few channels along a stretch of positions.
The last inputs, and the gradients of them that are not complete yet, are in its registers: everything is read and written
once, and nothing between. Where a state was handed in, its inputs are the first to complete.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, dense, empty_like, on, power_of_2
from ._operator import operator
from ._overlap import next_may_begin, overlap, prefetch, previous_done

_POSITIONS, _CHANNELS = 32, 128  # of a tile
# A program of the backward: channels, warps, positions that loads run ahead.
_BACKWARD_CHANNELS, _BACKWARD_WARPS, _AHEAD = 128, 1, 4
# Along the sequence so many programs at most, or else so many positions each: a program reads a few of its neighbours'
# positions too, and has a share of the weight's gradient that is summed afterwards.
_BACKWARD_PROGRAMS, _STRETCH = 128, 32


@triton.jit
def _input(
    x, state, t, c, x_row, state_row, x_stride, length, inside_c, KERNEL: tl.constexpr, HAS_STATE: tl.constexpr
):
    """Inputs at positions `t` (may be negative: the state's; beyond the end: zero) and channels `c`, in float32."""
    inside = (t >= 0) & (t < length)
    value = tl.load(
        x + x_row + t.to(tl.int64)[:, None] * x_stride + c[None, :],
        mask=inside[:, None] & inside_c[None, :],
        other=0.0,
    ).to(tl.float32)
    if HAS_STATE:
        past = (t < 0) & (t > -KERNEL)
        value += tl.load(
            state + state_row + c[None, :] * KERNEL + (KERNEL + t)[:, None],
            mask=past[:, None] & inside_c[None, :],
            other=0.0,
        ).to(tl.float32)
    return value


@triton.jit
def _ids(seq_idx, row, t, length):
    """Document ids at positions `t`; what lies before the call belongs to its first document."""
    return tl.load(seq_idx + row + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit
def _forward_kernel(
    x,
    weight,
    bias,
    state,
    seq_idx,
    out,
    length,
    channels,
    x_batch,
    x_stride,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * T + tl.arange(0, T)
    c = tl.program_id(1) * C + tl.arange(0, C)
    inside_c = c < channels
    total = tl.zeros([T, C], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    if PACKED:
        here = _ids(seq_idx, batch * length, t, length)
    for k in tl.static_range(KERNEL):
        source = t - (KERNEL - 1) + k
        value = _input(
            x,
            state,
            source,
            c,
            batch * x_batch,
            batch * channels * KERNEL,
            x_stride,
            length,
            inside_c,
            KERNEL,
            HAS_STATE,
        )
        if PACKED:
            same = _ids(seq_idx, batch * length, source, length) == here
            value = tl.where(same[:, None], value, 0.0)
        tap = tl.load(weight + c * KERNEL + k, mask=inside_c, other=0.0).to(tl.float32)
        total += tap[None, :] * value
    place = out + (batch * length + t)[:, None] * channels + c[None, :]
    result = total * tl.sigmoid(total)
    tl.store(place, result.to(out.dtype.element_ty), mask=(t < length)[:, None] & inside_c[None, :])


@triton.jit
def _backward_kernel(
    grad,
    x,
    weight,
    bias,
    state,
    seq_idx,
    grad_x,
    grad_state,
    partial,
    length,
    channels,
    x_batch,
    x_stride,
    stretch,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    C: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Input s fed the outputs s to s + K - 1, the last through tap 0: there its gradient is complete and written."""
    batch = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * C + tl.arange(0, C)
    inside = c < channels
    begin = tl.program_id(1) * stretch
    end = tl.minimum(begin + stretch, length)
    row = batch * length
    x += batch * x_batch + c
    grad += row * channels + c
    grad_x += row * channels + c
    state += batch * channels * KERNEL + c * KERNEL
    grad_state += batch * channels * KERNEL + c * KERNEL
    partial += ((batch * tl.num_programs(1) + tl.program_id(1)) * (KERNEL + 1)) * channels + c

    nothing = tl.zeros([C], tl.float32)
    constant = nothing
    if HAS_BIAS:
        constant += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    taps, sums, sum_bias = (), (), nothing
    for k in tl.static_range(KERNEL):
        taps += (tl.load(weight + c * KERNEL + k, mask=inside, other=0.0).to(tl.float32),)
        sums += (nothing,)
    # The K - 1 inputs before the next position, their documents, and what is known of their gradients.
    values, ids, pending = (), (), ()
    for k in tl.static_range(1, KERNEL):
        t = begin - KERNEL + k
        value = tl.load(x + tl.cast(t, tl.int64) * x_stride, mask=inside & (t >= 0), other=0.0).to(tl.float32)
        if HAS_STATE:
            value += tl.load(state + KERNEL + t, mask=inside & (t < 0), other=0.0).to(tl.float32)
        values += (value,)
        pending += (nothing,)
        if PACKED:
            ids += (_ids(seq_idx, row, t, length),)
    # Loads run a few positions ahead.
    next_x, next_grad = (), ()
    for ahead in tl.static_range(AHEAD):
        t = tl.cast(begin + ahead, tl.int64)
        there = inside & (t < length)
        next_x += (tl.load(x + t * x_stride, mask=there, other=0.0),)
        next_grad += (tl.load(grad + t * channels, mask=there, other=0.0),)
    for t in range(begin, end + KERNEL - 1):
        later = tl.cast(t + AHEAD, tl.int64)
        there = inside & (later < length)
        next_x += (tl.load(x + later * x_stride, mask=there, other=0.0),)
        next_grad += (tl.load(grad + later * channels, mask=there, other=0.0),)
        values += (next_x[0].to(tl.float32),)
        g = next_grad[0].to(tl.float32)
        if PACKED:
            ids += (_ids(seq_idx, row, t, length),)
        before_silu = constant
        for k in tl.static_range(KERNEL):
            tap = taps[k]
            if PACKED:
                tap = tl.where(ids[k] == ids[KERNEL - 1], tap, 0.0)
            before_silu += tap * values[k]
        sigmoid = tl.sigmoid(before_silu)
        g = g * sigmoid * (1.0 + before_silu * (1.0 - sigmoid))
        own = tl.where(t < end, g, 0.0)
        sum_bias += own
        new_sums, complete = (), ()
        pending += (nothing,)
        for k in tl.static_range(KERNEL):
            tap, value = taps[k], values[k]
            if PACKED:
                same = ids[k] == ids[KERNEL - 1]
                tap, value = tl.where(same, tap, 0.0), tl.where(same, value, 0.0)
            new_sums += (sums[k] + own * value,)
            complete += (pending[k] + tap * g,)
        sums = new_sums
        s = t - (KERNEL - 1)
        place = grad_x + tl.cast(s, tl.int64) * channels
        tl.store(place, complete[0].to(grad_x.dtype.element_ty), mask=inside & (s >= begin))
        if HAS_STATE:
            tl.store(grad_state + KERNEL + s, complete[0], mask=inside & (s < 0))
        next_x, next_grad = next_x[1:], next_grad[1:]
        values, ids, pending = values[1:], ids[1:], complete[1:]
    for k in tl.static_range(KERNEL):
        tl.store(partial + k * channels, sums[k], mask=inside)
    tl.store(partial + KERNEL * channels, sum_bias, mask=inside)


@triton.jit
def _update_kernel(
    state,
    x,
    weight,
    bias,
    out,
    channels,
    x_stride,
    state_batch,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    k = tl.arange(0, TAPS)
    inside_c = c < channels
    both = inside_c[:, None] & (k < KERNEL)[None, :]
    taps = tl.load(weight + c[:, None] * KERNEL + k[None, :], mask=both, other=0.0).to(tl.float32)
    shift = tl.zeros([C], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + c, mask=inside_c, other=0.0).to(tl.float32)
    next_may_begin(OVERLAP)
    state += batch * state_batch
    prefetch(state + tl.minimum(c, channels - 1) * KERNEL, OVERLAP)
    previous_done(OVERLAP)
    place = state + c[:, None] * KERNEL + k[None, :]
    new = tl.load(x + batch * x_stride + c, mask=inside_c, other=0.0)
    window = tl.load(place + 1, mask=inside_c[:, None] & (k < KERNEL - 1)[None, :], other=0.0)
    window = tl.where((k == KERNEL - 1)[None, :], new[:, None].to(window.dtype), window)
    # Every thread has read its shifted window before any writes: the lanes of a row may differ.
    tl.debug_barrier()
    tl.store(place, window, mask=both)
    total = tl.sum(window.to(tl.float32) * taps, 1) + shift
    tl.store(out + batch * channels + c, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=inside_c)


@operator("causal_conv1d")
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    batch, length, channels = x.shape
    out = empty_like(x)
    if out.numel() == 0:
        return out
    x, weight = dense(x), weight.contiguous()
    grid = (cdiv(length, _POSITIONS), cdiv(channels, _CHANNELS), batch)
    with on(x):
        _forward_kernel[grid](
            x,
            weight,
            weight if bias is None else bias.contiguous(),
            x if state is None else state.contiguous(),
            x if seq_idx is None else seq_idx.contiguous(),
            out,
            length,
            channels,
            x.stride(0),
            x.stride(1),
            weight.shape[1],
            bias is not None,
            state is not None,
            seq_idx is not None,
            _POSITIONS,
            _CHANNELS,
            num_warps=4,
        )
    return out


@_conv.register_fake
def _(x, weight, bias, state, seq_idx):
    return x.new_empty(x.shape)


@operator("causal_conv1d_backward")
def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    kernel = weight.shape[1]
    grad, x, weight = grad.contiguous(), dense(x), weight.contiguous()
    grad_x = empty_like(x)
    grad_state = torch.zeros((batch, channels, kernel), dtype=torch.float32, device=x.device)
    if grad_x.numel() == 0:
        return grad_x, torch.zeros_like(weight), weight.new_zeros(channels), grad_state
    stretch = max(_STRETCH, cdiv(length, _BACKWARD_PROGRAMS))
    programs = cdiv(length, stretch)
    partial = torch.empty((batch * programs, kernel + 1, channels), dtype=torch.float32, device=x.device)
    with on(x):
        _backward_kernel[(cdiv(channels, _BACKWARD_CHANNELS), programs, batch)](
            grad,
            x,
            weight,
            weight if bias is None else bias.contiguous(),
            x if state is None else state.contiguous(),
            x if seq_idx is None else seq_idx.contiguous(),
            grad_x,
            grad_state,
            partial,
            length,
            channels,
            x.stride(0),
            x.stride(1),
            stretch,
            kernel,
            bias is not None,
            state is not None,
            seq_idx is not None,
            _BACKWARD_CHANNELS,
            _AHEAD,
            num_warps=_BACKWARD_WARPS,
        )
    sums = partial.sum(0)
    grad_weight = sums[:kernel].t().contiguous().to(weight.dtype)
    return grad_x, grad_weight, sums[kernel].clone().to(weight.dtype), grad_state


@_conv_backward.register_fake
def _(grad, x, weight, bias, state, seq_idx):
    state_grad = x.new_empty((x.shape[0], *weight.shape), dtype=torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), state_grad


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    x, weight, bias, state, seq_idx = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_state = _conv_backward(grad, x, weight, bias, state, seq_idx)
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return grad_x, grad_weight, grad_bias, None if state is None else grad_state.to(state.dtype), None


_conv.register_autograd(_autograd, setup_context=_setup_context)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """Causal depthwise convolution and SiLU over a sequence.

    Args:
        x: (batch, seq, channels).
        weight: (channels, kernel); tap `kernel - 1` meets the current position.
        bias: (channels,) or None.
        state: (batch, channels, kernel), the last `kernel` inputs of an earlier call, oldest first, or None for zeros.
        seq_idx: (batch, seq) document ids; taps never reach into another document. Or None.

    Returns:
        (batch, seq, channels) in the dtype of x.
    """
    return _conv(x, weight, bias, state, seq_idx)


@operator("causal_conv1d_update", mutates_args=("state",))
def _update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, channels = x.shape
    kernel = weight.shape[1]
    out = empty_like(x)
    x, weight = dense(x), weight.contiguous()
    with on(x):
        _update_kernel[(batch, cdiv(channels, 128))](
            state,
            x,
            weight,
            weight if bias is None else bias.contiguous(),
            out,
            channels,
            x.stride(0),
            state.stride(0),
            kernel,
            power_of_2(kernel),
            bias is not None,
            128,
            num_warps=2,
            **overlap(x),
        )
    return out


@_update.register_fake
def _(state, x, weight, bias):
    return x.new_empty(x.shape)


def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Advance `state` in place by one token and return the convolution's output for it. Has no gradient.

    Args:
        state: (batch, channels, kernel), the last `kernel` inputs, oldest first; dense in its last two dimensions.
        x: (batch, channels).
        weight, bias: as in `causal_conv1d`.

    Returns:
        (batch, channels) in the dtype of x.
    """
    return _update(state, x, weight, bias)
