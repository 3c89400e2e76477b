"""The Mamba-2 chunked scan and its gradient: a program walks one head of one row through the whole sequence.

    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T          y_t = H_t C_t + D x_t

(Dao & Gu 2024, "Transformers are SSMs", section 6.) What is notable here:

- The state stays in registers from chunk to chunk, so the forward reads every input once and writes only y. Separate
  kernels for chunk states and state passing write and read 4 bytes x heads x head_dim x state_size a chunk instead, several
  times the inputs. A row of Super has 128 heads: one program for nearly every multiprocessor of an H100.
- The state, in both directions, and what becomes float32 gradients keep 16 bits at least: where one operand of a matrix
  product is float32, it enters as the sum of two bfloat16 numbers, in two products.
- The backward walks forward for the state that enters each chunk and, side by side, back for the gradient of the one that
  leaves it. Then all chunks at once give their gradients. A program there takes the heads of a group one after another and
  adds their gradients of B and C up in its registers: apart, they would be heads_per_group times as large as B and C.
- The backward takes a segment of the sequence at a time, so that scratch memory does not grow with the length.
- `seq_idx` separates packed documents: no decay path crosses a change of document.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, cdiv, dense, empty_like, on
from ._operator import operator

# head_dim and state_size that are served compiled: blocks without a rest, no smaller than tensor cores want them. 64 and 128 are those
# of all published models, for which everything here is tuned.
HEAD_DIMS, STATE_SIZES = (16, 32, 64), (16, 32, 64, 128)
# Tensor cores are busy from chunks of 64 positions on; exponentials cost chunk^2.
_CHUNK, _BACKWARD_CHUNK = 64, 64
# The forward: rows of a state (of head_dim) that a program carries along at most, warps, pipeline stages.
_ROWS, _WARPS, _STAGES = 32, 4, 3
# The backward's walks: columns of a state (of state_size) that a program carries along, warps, pipeline stages.
_WALK_COLUMNS, _WALK_WARPS, _WALK_STAGES = 128, 4, 2
_TOGETHER = 16  # heads of a group whose gradients of B and C a program of the backward adds up, at most
_QUERIES, _KEYS = (4, 2), (4, 1)  # warps and pipeline stages of these kernels
LOG2_E = tl.constexpr(math.log2(math.e))
_SEGMENT = 4096  # rows times positions of the backward whose states and partial gradients exist at once


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    """a @ b in float32: tensor cores for bfloat16, plain arithmetic for float32."""
    if EXACT:
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def _add_product(a, b, total, EXACT: tl.constexpr):
    """total + a @ b."""
    if EXACT:
        total = tl.dot(a, b, total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def _halves(value, EXACT: tl.constexpr):
    """A float32 number as the sum of two bfloat16 ones, which hold 16 of its 24 bits; with EXACT itself, twice."""
    if EXACT:
        high, low = value, value
    else:
        high = value.to(tl.bfloat16)
        low = (value - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def _product_left_halves(high, low, b, EXACT: tl.constexpr):
    """(high + low) @ b."""
    product = _product(high, b, EXACT)
    if not EXACT:
        product = tl.dot(low, b, product)
    return product


@triton.jit
def _product_right_halves(a, high, low, EXACT: tl.constexpr):
    """a @ (high + low)."""
    product = _product(a, high, EXACT)
    if not EXACT:
        product = tl.dot(a, low, product)
    return product


@triton.jit
def _tile(base, t, t_stride, inside_t, j, inside_j):
    return tl.load(
        base + t.to(tl.int64)[:, None] * t_stride + j[None, :], mask=inside_t[:, None] & inside_j[None, :], other=0.0
    )


@triton.jit
def _ids(seq_idx, start, end, i, L: tl.constexpr, PACKED: tl.constexpr):
    """Document ids of a chunk's positions, of the position before it and of its last one."""
    if PACKED:
        ids = tl.load(seq_idx + tl.minimum(start + i, end - 1))
        # A state handed in from outside belongs to the first document of the call.
        before = tl.load(seq_idx + tl.maximum(start - 1, 0))
        last = tl.load(seq_idx + tl.minimum(start + L, end) - 1)
    else:
        ids, before, last = i, start, start
    return ids, before, last


@triton.jit
def _decays(dt, a, i, ids, before, last, PACKED: tl.constexpr, L: tl.constexpr):
    """Log2 of the decay up to each position, decay from the incoming state, to the outgoing state, over the whole chunk."""
    # No float32 is as small as 2^-150: beyond, a step forgets all, and sums of larger logs would take later ones' digits.
    log = tl.cumsum(tl.maximum(dt * (a * LOG2_E), -150.0, propagate_nan=tl.PropagateNan.ALL), 0)
    total = tl.sum(tl.where(i == L - 1, log, 0.0), 0)
    from_start, to_end, across = tl.exp2(log), tl.exp2(total - log), tl.exp2(total)
    if PACKED:
        from_start = tl.where(ids == before, from_start, 0.0)
        to_end = tl.where(ids == last, to_end, 0.0)
        across = tl.where(last == before, across, 0.0)
    return log, from_start, to_end, across


@triton.jit
def _mask(log, i, ids, PACKED: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Decay over (key, query] where the query may see the key, else zero: [query, key] or [key, query]."""
    if KEYS_FIRST:
        visible, sums = i[:, None] <= i[None, :], log[None, :] - log[:, None]
    else:
        visible, sums = i[:, None] >= i[None, :], log[:, None] - log[None, :]
    if PACKED:
        visible = visible & (ids[:, None] == ids[None, :])
    return tl.exp2(tl.where(visible, sums, float("-inf")))


@triton.jit
def _scan_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    seq_idx,
    initial,
    y,
    final,
    begin,
    end,
    length,
    heads,
    per_group,
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
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    WITH_Y: tl.constexpr,
    EXACT: tl.constexpr,
):
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    i, p, n = tl.arange(0, L), tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    in_state = p[:, None] * N + n[None, :]
    state_mask = p_in[:, None] & n_in[None, :]
    x += batch * x_batch + head * x_head
    B += batch * B_batch + group * B_group
    dt += batch * dt_batch + head
    row = batch * heads + head
    y += batch * length * heads * P + head * P
    if WITH_Y:
        C += batch * C_batch + group * C_group
        skip = tl.load(D + head).to(tl.float32)
    a = tl.load(A + head).to(tl.float32)
    state = tl.zeros([BP, BN], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + row * (P * N) + in_state, mask=state_mask, other=0.0)
    seq_idx += batch * length if PACKED else 0
    next_x = _tile(x, begin + i, x_seq, begin + i < end, p, p_in)
    for start in tl.range(begin, end, L, disable_licm=True):
        t = start + i
        inside = t < end
        x_c, next_x = next_x, _tile(x, t + L, x_seq, t + L < end, p, p_in)
        dt_c = tl.load(dt + t.to(tl.int64) * dt_seq, mask=inside, other=0.0).to(tl.float32)
        ids, before, last = _ids(seq_idx, start, end, i, L, PACKED)
        log, from_start, to_end, across = _decays(dt_c, a, i, ids, before, last, PACKED, L)
        B_c = _tile(B, t, B_seq, inside, n, n_in)
        if WITH_Y:
            C_c = _tile(C, t, C_seq, inside, n, n_in)
            inner = _product(C_c, tl.trans(B_c), EXACT) * _mask(log, i, ids, PACKED, False) * dt_c[None, :]
            out = _product(C_c, tl.trans(state).to(C_c.dtype), EXACT) * from_start[:, None]
            out += _product(inner.to(x_c.dtype), x_c, EXACT)
            out += skip * x_c.to(tl.float32)
            place = y + t.to(tl.int64)[:, None] * (heads * P) + p[None, :]
            tl.store(place, out.to(y.dtype.element_ty), mask=inside[:, None] & p_in[None, :])
        high, low = _halves(tl.trans(x_c.to(tl.float32) * (dt_c * to_end)[:, None]), EXACT)
        state = state * across + _product_left_halves(high, low, B_c, EXACT)
    tl.store(final + row * (P * N) + in_state, state, mask=state_mask)


@triton.jit
def _walk(
    rows,
    rows_seq,
    columns,
    columns_seq,
    dt,
    dt_seq,
    a,
    seq_idx,
    state,
    states,
    begin,
    end,
    first_column,
    P: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BACK: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write the state that a walk along one head meets at each chunk, in halves; return the one behind the last chunk.

    Forward these are the states that enter chunks. Back, they are the gradients of those that leave.
    """
    i, p, n = tl.arange(0, L), tl.arange(0, BP), first_column + tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    state_mask = p_in[:, None] & n_in[None, :]
    halves: tl.constexpr = 1 if EXACT else 2
    chunks = (end - begin + L - 1) // L
    t = begin + (chunks - 1 if BACK else 0) * L + i
    next_rows = _tile(rows, t, rows_seq, t < end, p, p_in)
    for step in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - step if BACK else step
        start = begin + chunk * L
        t = start + i
        inside = t < end
        rows_c = next_rows.to(tl.float32)
        next_t = t - L if BACK else t + L
        next_rows = _tile(rows, next_t, rows_seq, (next_t >= begin) & (next_t < end), p, p_in)
        dt_c = tl.load(dt + t.to(tl.int64) * dt_seq, mask=inside, other=0.0).to(tl.float32)
        ids, before, last = _ids(seq_idx, start, end, i, L, PACKED)
        _, from_start, to_end, across = _decays(dt_c, a, i, ids, before, last, PACKED, L)
        columns_c = _tile(columns, t, columns_seq, inside, n, n_in)
        place = states + chunk * (halves * P * N) + p[:, None] * N + n[None, :]
        high, low = _halves(state, EXACT)
        tl.store(place, high, mask=state_mask)
        if not EXACT:
            tl.store(place + P * N, low, mask=state_mask)
        weight = from_start if BACK else dt_c * to_end
        high, low = _halves(tl.trans(rows_c * weight[:, None]), EXACT)
        state = state * across + _product_left_halves(high, low, columns_c, EXACT)
    return state


@triton.jit
def _walks_kernel(
    grad_y,
    x,
    dt,
    A,
    B,
    C,
    seq_idx,
    initial,
    grad_state,
    states,
    leaving,
    begin,
    end,
    length,
    heads,
    per_group,
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
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Both walks along a segment, side by side. A program takes one head and BN columns of its state, one way."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    row = batch * heads + head
    p, first = tl.arange(0, BP), tl.program_id(1) * BN
    n = first + tl.arange(0, BN)
    in_state = row * (P * N) + p[:, None] * N + n[None, :]
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    halves: tl.constexpr = 1 if EXACT else 2
    chunks_before = row * ((end - begin + L - 1) // L) * (halves * P * N)
    dt += batch * dt_batch + head
    seq_idx += batch * length if PACKED else 0
    a = tl.load(A + head).to(tl.float32)
    if tl.program_id(2) == 0:
        state = tl.zeros([BP, BN], tl.float32)
        if HAS_INITIAL:
            state += tl.load(initial + in_state, mask=state_mask, other=0.0)
        x += batch * x_batch + head * x_head
        B += batch * B_batch + group * B_group
        _walk(
            x,
            x_seq,
            B,
            B_seq,
            dt,
            dt_seq,
            a,
            seq_idx,
            state,
            states + chunks_before,
            begin,
            end,
            first,
            P,
            N,
            L,
            BP,
            BN,
            False,
            PACKED,
            EXACT,
        )
    else:
        state = tl.load(grad_state + in_state, mask=state_mask, other=0.0)
        grad_y += (batch * length * heads + head) * P
        C += batch * C_batch + group * C_group
        state = _walk(
            grad_y,
            heads * P,
            C,
            C_seq,
            dt,
            dt_seq,
            a,
            seq_idx,
            state,
            leaving + chunks_before,
            begin,
            end,
            first,
            P,
            N,
            L,
            BP,
            BN,
            True,
            PACKED,
            EXACT,
        )
        tl.store(grad_state + in_state, state, mask=state_mask)


@triton.jit
def _queries_kernel(
    grad_y,
    dt,
    A,
    C,
    seq_idx,
    states,
    leaving_states,
    part_log,
    part_C,
    begin,
    end,
    length,
    heads: tl.constexpr,
    per_group: tl.constexpr,
    dt_batch,
    dt_seq: tl.constexpr,
    C_batch,
    C_seq: tl.constexpr,
    C_group,
    P: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    TOGETHER: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """What positions of one chunk read from the state that enters it: that part of the gradients of C and of log decays.

    A program takes heads that share C one after another and adds their gradients of C up.
    """
    chunk = tl.program_id(0)
    blocks = heads // TOGETHER
    batch = (tl.program_id(1) // blocks).to(tl.int64)
    first = tl.program_id(1) % blocks * TOGETHER
    group = (first // per_group).to(tl.int64)
    i, p, n = tl.arange(0, L), tl.arange(0, BP), tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    state_mask = p_in[:, None] & n_in[None, :]
    in_state = p[:, None] * N + n[None, :]
    halves: tl.constexpr = 1 if EXACT else 2
    start = begin + chunk * L
    inside = start + i < end
    seq_idx += batch * length if PACKED else 0
    ids, before, last = _ids(seq_idx, start, end, i, L, PACKED)
    dt += batch * dt_batch + start.to(tl.int64) * dt_seq
    grad_y += (batch * length + start) * heads * P
    C_c = _tile(C + batch * C_batch + start.to(tl.int64) * C_seq + group * C_group, i, C_seq, inside, n, n_in)
    d_C = tl.zeros([L, BN], tl.float32)
    for head in tl.range(first, first + TOGETHER, disable_licm=True):  # what it hoists has no room in registers
        place = ((batch * heads + head) * tl.num_programs(0) + chunk) * (halves * P * N)
        a = tl.load(A + head).to(tl.float32)
        dt_c = tl.load(dt + i.to(tl.int64) * dt_seq + head, mask=inside, other=0.0).to(tl.float32)
        _, from_start, _, across = _decays(dt_c, a, i, ids, before, last, PACKED, L)
        dy = _tile(grad_y + head * P, i, heads * P, inside, p, p_in)
        high = tl.load(states + place + in_state, mask=state_mask, other=0.0)
        low = tl.load(states + place + (halves - 1) * P * N + in_state, mask=state_mask, other=0.0)
        leaving_high = tl.load(leaving_states + place + in_state, mask=state_mask, other=0.0)
        leaving_low = tl.load(leaving_states + place + (halves - 1) * P * N + in_state, mask=state_mask, other=0.0)
        # The product of both states, number by number: the diagonal of what tensor cores do fastest.
        both = _product_right_halves(leaving_high, tl.trans(high), tl.trans(low), EXACT)
        if not EXACT:
            both = tl.dot(leaving_low, tl.trans(high), both)
        through = tl.sum(tl.sum(tl.where(p[:, None] == p[None, :], both, 0.0), 1), 0)
        of_state = _product_right_halves(C_c, tl.trans(high), tl.trans(low), EXACT)
        dy_f = dy.to(tl.float32) * from_start[:, None]
        d_log = tl.cumsum(tl.sum(of_state * dy_f, 1), 0, reverse=True) + across * through
        tl.store(part_log + (batch * heads + head) * (end - begin) + chunk * L + i, d_log, mask=inside)
        d_C = _add_product(dy_f.to(C_c.dtype), high, d_C, EXACT)
    # Sums over the heads of a program lie as (parts of a group, batch, positions of the segment, groups, state_size).
    part = first % per_group // TOGETHER * (tl.num_programs(1) // blocks) + batch
    part = ((part * (end - begin) + chunk * L) * (heads // per_group) + group) * N
    place = part_C + part + i[:, None] * (heads // per_group * N) + n[None, :]
    tl.store(place, d_C, mask=inside[:, None] & n_in[None, :])


@triton.jit
def _keys_kernel(
    grad_y,
    x,
    dt,
    A,
    B,
    C,
    D,
    seq_idx,
    leaving_states,
    part_log,
    part_C,
    grad_x,
    grad_dt,
    sum_B,
    sum_C,
    part_A,
    part_D,
    begin,
    end,
    length,
    heads: tl.constexpr,
    per_group: tl.constexpr,
    x_batch,
    x_seq: tl.constexpr,
    x_head,
    dt_batch,
    dt_seq: tl.constexpr,
    B_batch,
    B_seq: tl.constexpr,
    B_group,
    C_batch,
    C_seq: tl.constexpr,
    C_group,
    origin,
    span,
    P: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    TOGETHER: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The rest: what positions give to later ones of their chunk and to the state that leaves it. Programs as above.

    Matrices of pairs of positions are [key, query]: the query's output hears of the key's input.
    """
    chunk = tl.program_id(0)
    blocks = heads // TOGETHER
    batch = (tl.program_id(1) // blocks).to(tl.int64)
    first = tl.program_id(1) % blocks * TOGETHER
    group = (first // per_group).to(tl.int64)
    i, p, n = tl.arange(0, L), tl.arange(0, BP), tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    state_mask = p_in[:, None] & n_in[None, :]
    in_state = p[:, None] * N + n[None, :]
    halves: tl.constexpr = 1 if EXACT else 2
    start = begin + chunk * L
    inside = start + i < end
    inside_n = inside[:, None] & n_in[None, :]
    seq_idx += batch * length if PACKED else 0
    ids, before, last = _ids(seq_idx, start, end, i, L, PACKED)
    dt += batch * dt_batch + start.to(tl.int64) * dt_seq
    x += batch * x_batch + start.to(tl.int64) * x_seq + first.to(tl.int64) * x_head
    grad_dt += (batch * length + start) * heads
    grad_y += (batch * length + start) * heads * P
    grad_x += (batch * length + start) * heads * P
    B_c = _tile(B + batch * B_batch + start.to(tl.int64) * B_seq + group * B_group, i, B_seq, inside, n, n_in)
    C_c = _tile(C + batch * C_batch + start.to(tl.int64) * C_seq + group * C_group, i, C_seq, inside, n, n_in)
    d_scores = tl.zeros([L, L], tl.float32)
    d_B = tl.zeros([L, BN], tl.float32)
    for head in tl.range(first, first + TOGETHER, disable_licm=True):  # what it hoists has no room in registers
        row = batch * heads + head
        place = (row * tl.num_programs(0) + chunk) * (halves * P * N)
        a = tl.load(A + head).to(tl.float32)
        dt_c = tl.load(dt + i.to(tl.int64) * dt_seq + head, mask=inside, other=0.0).to(tl.float32)
        log, _, to_end, _ = _decays(dt_c, a, i, ids, before, last, PACKED, L)
        x_c = _tile(x, i, x_seq, inside, p, p_in)
        x += x_head
        dy = _tile(grad_y + head * P, i, heads * P, inside, p, p_in)
        x_f, dy_f = x_c.to(tl.float32), dy.to(tl.float32)
        tl.store(part_D + row * tl.num_programs(0) + chunk, tl.sum(tl.sum(x_f * dy_f, 1), 0))

        # The state that leaves takes dt x B^T, weighted with the decay to the end.
        high = tl.load(leaving_states + place + in_state, mask=state_mask, other=0.0)
        low = tl.load(leaving_states + place + (halves - 1) * P * N + in_state, mask=state_mask, other=0.0)
        d_u = _product_right_halves(B_c, tl.trans(high), tl.trans(low), EXACT) * to_end[:, None]
        d_dt = tl.sum(d_u * x_f, 1)
        written = d_dt * dt_c
        d_B = _add_product((x_f * (to_end * dt_c)[:, None]).to(B_c.dtype), high, d_B, EXACT)

        # Inside the chunk: y = (S * decay)^T (dt x), with S = B C^T.
        decay = _mask(log, i, ids, PACKED, True)
        weights = _product(B_c, tl.trans(C_c), EXACT) * decay
        d_u = _add_product(weights.to(dy.dtype), dy, d_u, EXACT)
        d_x = d_u * dt_c[:, None] + tl.load(D + head).to(tl.float32) * dy_f
        place = grad_x + head * P + i[:, None] * (heads * P) + p[None, :]
        tl.store(place, d_x.to(grad_x.dtype.element_ty), mask=inside[:, None] & p_in[None, :])
        pairs = _product(x_c, tl.trans(dy), EXACT) * decay
        d_scores += pairs * dt_c[:, None]
        pairs *= _product(B_c, tl.trans(C_c), EXACT)  # once more, since there are no registers to keep it in
        d_dt += tl.sum(pairs, 1)

        # Gradient of dt_k A: every path from before k to k or after. Sums over j < k as products with a triangle of ones:
        # as differences of row and column sums they cancel badly where a position mostly sees itself.
        high, low = _halves(pairs * dt_c[:, None], EXACT)
        before_k = (i[:, None] > i[None, :]).to(tl.float32).to(x_c.dtype)
        crossing = _product_right_halves(before_k, high, low, EXACT)
        d_log = tl.sum(tl.where(i[:, None] <= i[None, :], crossing, written[None, :]), 1)
        d_log += tl.load(part_log + row * (end - begin) + chunk * L + i, mask=inside, other=0.0)
        tl.store(grad_dt + i * heads + head, (d_dt + d_log * a).to(grad_dt.dtype.element_ty), mask=inside)
        tl.store(part_A + row * tl.num_programs(0) + chunk, tl.sum(d_log * dt_c, 0))

    d_scores = d_scores.to(B_c.dtype)
    part = first % per_group // TOGETHER * (tl.num_programs(1) // blocks) + batch
    groups = heads // per_group
    in_rows = i[:, None] * (groups * N) + n[None, :]
    place = ((part * span + start - origin) * groups + group) * N + in_rows
    d_B = _add_product(d_scores, C_c, d_B, EXACT)
    tl.store(sum_B + place, d_B.to(sum_B.dtype.element_ty), mask=inside_n)
    d_C = tl.load(
        part_C + ((part * (end - begin) + chunk * L) * groups + group) * N + in_rows, mask=inside_n, other=0.0
    )
    d_C += _product(tl.trans(d_scores), B_c, EXACT)
    tl.store(sum_C + place, d_C.to(sum_C.dtype.element_ty), mask=inside_n)


class _Arguments:
    """The arguments both kernels share, checked and in order."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor | None):
        self.x, self.dt, self.B, self.C = dense(x), dense(dt), dense(B), dense(C)
        self.A, self.D = A.contiguous(), D.contiguous()
        self.packed = seq_idx is not None
        self.seq_idx = self.x if seq_idx is None else seq_idx.contiguous()
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state_size = B.shape[2:]
        if x.is_cuda and x.dtype != torch.bfloat16:
            raise ValueError(f"`x` is {x.dtype}: compiled, the scan serves bfloat16 only.")
        if x.is_cuda and not (self.head_dim in HEAD_DIMS and self.state_size in STATE_SIZES):
            raise ValueError(
                f"`x` has head_dim {self.head_dim} and `B` has state_size {self.state_size}: compiled, the scan serves "
                f"head_dim {HEAD_DIMS} with state_size {STATE_SIZES} only."
            )
        self.strides = (*self.x.stride()[:3], *self.dt.stride()[:2], *self.B.stride()[:3], *self.C.stride()[:3])
        self.sizes = (self.heads, self.heads // self.groups)
        self.blocks = (block(self.head_dim), block(self.state_size))
        self.exact = x.dtype == torch.float32

    @property
    def programs(self) -> tuple[int]:
        return (self.batch * self.heads,)

    def empty_state(self) -> Tensor:
        shape = (self.batch, self.heads, self.head_dim, self.state_size)
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def scan(
        self,
        begin: int,
        end: int,
        initial: Tensor | None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Run positions [begin, end), write y where given; the last state."""
        final = self.empty_state()
        rows = min(_ROWS, max(16, self.blocks[0] // 2))
        with on(self.x):
            _scan_kernel[(*self.programs, cdiv(self.head_dim, rows))](
                self.x,
                self.dt,
                self.A,
                self.B,
                self.C,
                self.D,
                self.seq_idx,
                final if initial is None else initial,
                self.x if y is None else y,
                final,
                begin,
                end,
                self.length,
                *self.sizes,
                *self.strides,
                self.head_dim,
                self.state_size,
                _CHUNK,
                rows,
                self.blocks[1],
                initial is not None,
                self.packed,
                y is not None,
                self.exact,
                num_warps=_WARPS,
                num_stages=_STAGES,
            )
        return final


@operator("ssd_chunk_scan")
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    arguments = _Arguments(x, dt, A, B, C, D, seq_idx)
    y = empty_like(x)
    initial = None if initial_state is None else initial_state.float().contiguous()
    return y, arguments.scan(0, x.shape[1], initial, y)


def _fake_state(x: Tensor, B: Tensor) -> Tensor:
    batch, _, heads, head_dim = x.shape
    return x.new_empty((batch, heads, head_dim, B.shape[3]), dtype=torch.float32)


@_scan.register_fake
def _(x, dt, A, B, C, D, initial_state, seq_idx):
    return x.new_empty(x.shape), _fake_state(x, B)


@operator("ssd_chunk_scan_backward")
def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = _Arguments(x, dt, A, B, C, D, seq_idx)
    batch, length, heads, _ = x.shape
    groups, state_size, chunk = B.shape[2], B.shape[3], _BACKWARD_CHUNK
    device = x.device
    grad_y = grad_y.contiguous()
    grad_x, grad_dt, grad_B, grad_C = (empty_like(t) for t in (x, dt, B, C))
    if grad_final is None:
        grad_state = arguments.empty_state().zero_()
    else:
        grad_state = grad_final.float().contiguous().clone()
    grad_A, grad_D = (torch.zeros(heads, dtype=torch.float32, device=device) for _ in range(2))

    segment = max(chunk, _SEGMENT // batch // chunk * chunk)
    spans = [(start, min(start + segment, length)) for start in range(0, length, segment)]
    entering = [None if initial_state is None else initial_state.float().contiguous()]
    for begin, end in spans[:-1]:
        entering.append(arguments.scan(begin, end, entering[-1]))
    halves, kept = (1, torch.float32) if arguments.exact else (2, torch.bfloat16)
    together = math.gcd(heads // groups, _TOGETHER)
    parts = heads // groups // together
    for begin, end in reversed(spans):
        chunks = cdiv(end - begin, chunk)
        wide = (2, batch, heads, chunks, halves, x.shape[3], state_size)
        states, leaving = torch.empty(wide, dtype=kept, device=device)
        scalars = torch.empty((2, batch, heads, chunks), dtype=torch.float32, device=device)
        part_log = torch.empty((batch, heads, end - begin), dtype=torch.float32, device=device)
        shape = (2, parts, batch, end - begin, groups, state_size)
        part_B, part_C = torch.empty(shape, dtype=torch.float32, device=device)
        sums, origin, span = ((grad_B, grad_C), 0, length) if parts == 1 else ((part_B, part_C), begin, end - begin)
        initial = entering.pop()
        columns = min(_WALK_COLUMNS, arguments.blocks[1])
        with on(x):
            _walks_kernel[(*arguments.programs, cdiv(state_size, columns), 2)](
                grad_y,
                arguments.x,
                arguments.dt,
                arguments.A,
                arguments.B,
                arguments.C,
                arguments.seq_idx,
                grad_state if initial is None else initial,
                grad_state,
                states,
                leaving,
                begin,
                end,
                length,
                *arguments.sizes,
                *arguments.strides,
                arguments.head_dim,
                state_size,
                chunk,
                arguments.blocks[0],
                columns,
                initial is not None,
                arguments.packed,
                arguments.exact,
                num_warps=_WALK_WARPS,
                num_stages=_WALK_STAGES,
            )
            grid = (chunks, batch * heads // together)
            _queries_kernel[grid](
                grad_y,
                arguments.dt,
                arguments.A,
                arguments.C,
                arguments.seq_idx,
                states,
                leaving,
                part_log,
                part_C,
                begin,
                end,
                length,
                *arguments.sizes,
                *arguments.dt.stride()[:2],
                *arguments.C.stride()[:3],
                arguments.head_dim,
                state_size,
                chunk,
                *arguments.blocks,
                together,
                arguments.packed,
                arguments.exact,
                num_warps=_QUERIES[0],
                num_stages=_QUERIES[1],
            )
            _keys_kernel[grid](
                grad_y,
                arguments.x,
                arguments.dt,
                arguments.A,
                arguments.B,
                arguments.C,
                arguments.D,
                arguments.seq_idx,
                leaving,
                part_log,
                part_C,
                grad_x,
                grad_dt,
                *sums,
                *scalars,
                begin,
                end,
                length,
                *arguments.sizes,
                *arguments.strides,
                origin,
                span,
                arguments.head_dim,
                state_size,
                chunk,
                *arguments.blocks,
                together,
                arguments.packed,
                arguments.exact,
                num_warps=_KEYS[0],
                num_stages=_KEYS[1],
            )
        if parts > 1:
            grad_B[:, begin:end], grad_C[:, begin:end] = part_B.sum(0), part_C.sum(0)
        grad_A += scalars[0].sum((0, 2))
        grad_D += scalars[1].sum((0, 2))
    return grad_x, grad_dt, grad_A.to(A.dtype), grad_B, grad_C, grad_D.to(D.dtype), grad_state


@_backward.register_fake
def _(grad_y, grad_final, x, dt, A, B, C, D, initial_state, seq_idx):
    return *(t.new_empty(t.shape) for t in (x, dt, A, B, C, D)), _fake_state(x, B)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)  # the final state rarely has one


def _autograd(ctx, grad_y, grad_final):
    if grad_y is None and grad_final is None:
        return (None,) * 8
    *tensors, initial_state, seq_idx = ctx.saved_tensors
    grad_y = torch.zeros_like(tensors[0]) if grad_y is None else grad_y
    *grads, grad_initial = _backward(grad_y, grad_final, *tensors, initial_state, seq_idx)
    return *grads, None if initial_state is None else grad_initial.to(initial_state.dtype), None


_scan.register_autograd(_autograd, setup_context=_setup_context)


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2 scan over a sequence.

    Args:
        x: (batch, seq, heads, head_dim), bfloat16, with head_dim 16, 32 or 64; in Triton's interpreter any up to 64, and float32.
        dt: (batch, seq, heads), time steps after softplus; 0 leaves the state as it is (padding).
        A: (heads,), negative, float32.
        B, C: (batch, seq, groups, state_size), with heads divisible by groups, in the dtype of x; state_size 16, 32, 64 or 128,
            in the interpreter any up to 128.
        D: (heads,), the skip connection.
        chunk_size: taken for the sake of the signature; the kernels have a chunk of their own. It does not set the result.
        initial_state: (batch, heads, head_dim, state_size) entering position 0, or None for zeros.
        seq_idx: (batch, seq) integer document ids, equal within a document, each document contiguous; or None.

    Returns:
        y (batch, seq, heads, head_dim) in the dtype of x, and the state after the last position,
        (batch, heads, head_dim, state_size), float32.
    """
    return _scan(x, dt, A, B, C, D, initial_state, seq_idx)
