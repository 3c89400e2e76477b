"""The Mamba-2 chunked scan and its gradient: one program walks one head of one row through the whole sequence.

    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T          y_t = H_t C_t + D x_t

(Dao & Gu 2024, "Transformers are SSMs", section 6.) What is notable here:

- The state stays in registers from chunk to chunk, so the forward reads every input once and writes only y. Separate
  kernels for chunk states and state passing write and read 4 bytes x heads x head_dim x state_size a chunk instead, several
  times the inputs. A row of Super has 128 heads: one program for nearly every multiprocessor of an H100.
- The state, in both directions, is as exact as float32: where one operand of a matrix product is float32, it enters as
  the sum of three bfloat16 numbers, in three products.
- The backward walks forward for the state that enters each chunk and back for the gradient of the one that leaves it; then
  all chunks at once give their gradients. It takes a segment of the sequence at a time, so that scratch memory does not
  grow with the length.
- `seq_idx` separates packed documents: no decay path crosses a change of document.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, on
from ._operator import operator

# head_dim and state_size of all published Nemotron-H models. Compiled by Triton 3.6 with smaller blocks, a product in the
# backward reads out of bounds (compute-sanitizer says so at 20 x 3), so other sizes are refused.
COMPILED_SIZES = (64, 128)
# Positions a chunk, warps and pipeline stages. Tensor cores are busy from 64 positions on; exponentials cost chunk^2.
_CHUNK, _WARPS, _STAGES = 64, 4, 2
_BACKWARD_CHUNK, _BACKWARD_WARPS = 64, 8
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
def _product_split_right(a, b, EXACT: tl.constexpr):
    """a @ b for a float32 b that has to keep its precision: three bfloat16 numbers hold all of its 24 bits."""
    if EXACT:
        product = tl.dot(a, b, input_precision="ieee")
    else:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(a, low, tl.dot(a, middle, tl.dot(a, high)))
    return product


@triton.jit
def _product_split_left(a, b, EXACT: tl.constexpr):
    """a @ b for a float32 a that has to keep its precision."""
    if EXACT:
        product = tl.dot(a, b, input_precision="ieee")
    else:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(low, b, tl.dot(middle, b, tl.dot(high, b)))
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
    """Log decay up to each position, decay from the incoming state, to the outgoing state, over the whole chunk."""
    log = tl.cumsum(dt * a, 0)
    total = tl.sum(tl.where(i == L - 1, log, 0.0), 0)
    from_start, to_end, across = tl.exp(log), tl.exp(total - log), tl.exp(total)
    if PACKED:
        from_start = tl.where(ids == before, from_start, 0.0)
        to_end = tl.where(ids == last, to_end, 0.0)
        across = tl.where(last == before, across, 0.0)
    return log, from_start, to_end, across


@triton.jit
def _mask(log, i, ids, PACKED: tl.constexpr):
    """exp(sum of dt A over (j, i]) where i may see j, else zero."""
    visible = i[:, None] >= i[None, :]
    if PACKED:
        visible = visible & (ids[:, None] == ids[None, :])
    return tl.exp(tl.where(visible, log[:, None] - log[None, :], float("-inf")))


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
    states,
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
    WITH_STATES: tl.constexpr,
    EXACT: tl.constexpr,
):
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    i, p, n = tl.arange(0, L), tl.arange(0, BP), tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    in_state = p[:, None] * N + n[None, :]
    state_mask = p_in[:, None] & n_in[None, :]
    x += batch * x_batch + head * x_head
    B += batch * B_batch + group * B_group
    dt += batch * dt_batch + head
    row = batch * heads + head
    y += batch * length * heads * P + head * P
    states += row * ((end - begin + L - 1) // L) * (P * N)
    if WITH_Y:
        C += batch * C_batch + group * C_group
        skip = tl.load(D + head).to(tl.float32)
    a = tl.load(A + head).to(tl.float32)
    state = tl.zeros([BP, BN], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + row * (P * N) + in_state, mask=state_mask, other=0.0)
    seq_idx += batch * length if PACKED else 0
    for start in range(begin, end, L):
        t = start + i
        inside = t < end
        dt_c = tl.load(dt + t.to(tl.int64) * dt_seq, mask=inside, other=0.0).to(tl.float32)
        ids, before, last = _ids(seq_idx, start, end, i, L, PACKED)
        log, from_start, to_end, across = _decays(dt_c, a, i, ids, before, last, PACKED, L)
        x_c = _tile(x, t, x_seq, inside, p, p_in)
        B_c = _tile(B, t, B_seq, inside, n, n_in)
        if WITH_STATES:
            tl.store(states + in_state, state, mask=state_mask)
            states += P * N
        if WITH_Y:
            C_c = _tile(C, t, C_seq, inside, n, n_in)
            inner = _product(C_c, tl.trans(B_c), EXACT) * _mask(log, i, ids, PACKED) * dt_c[None, :]
            out = _product(C_c, tl.trans(state).to(C_c.dtype), EXACT) * from_start[:, None]
            out += _product(inner.to(x_c.dtype), x_c, EXACT)
            out += skip * x_c.to(tl.float32)
            place = y + t.to(tl.int64)[:, None] * (heads * P) + p[None, :]
            tl.store(place, out.to(y.dtype.element_ty), mask=inside[:, None] & p_in[None, :])
        weighted = tl.trans(x_c.to(tl.float32) * (dt_c * to_end)[:, None])
        state = state * across + _product_split_left(weighted, B_c, EXACT)
    tl.store(final + row * (P * N) + in_state, state, mask=state_mask)


@triton.jit
def _leaving_kernel(
    grad_y,
    dt,
    A,
    C,
    seq_idx,
    grad_state,
    leaving_states,
    begin,
    end,
    length,
    heads,
    per_group,
    dt_batch,
    dt_seq,
    C_batch,
    C_seq,
    C_group,
    P: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """From the last chunk to the first: the gradient of the state each chunk hands on. One program walks one head."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    i, p, n = tl.arange(0, L), tl.arange(0, BP), tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    in_state = p[:, None] * N + n[None, :]
    state_mask = p_in[:, None] & n_in[None, :]
    row = batch * heads + head
    chunks = (end - begin + L - 1) // L
    dt += batch * dt_batch + head
    C += batch * C_batch + (head // per_group) * C_group
    grad_y += (batch * length * heads + head) * P
    leaving_states += row * chunks * (P * N)
    seq_idx += batch * length if PACKED else 0
    a = tl.load(A + head).to(tl.float32)
    leaving = tl.load(grad_state + row * (P * N) + in_state, mask=state_mask, other=0.0)
    for step in range(0, chunks):
        chunk = chunks - 1 - step
        start = begin + chunk * L
        t = start + i
        inside = t < end
        dt_c = tl.load(dt + t.to(tl.int64) * dt_seq, mask=inside, other=0.0).to(tl.float32)
        ids, before, last = _ids(seq_idx, start, end, i, L, PACKED)
        _, from_start, _, across = _decays(dt_c, a, i, ids, before, last, PACKED, L)
        C_c = _tile(C, t, C_seq, inside, n, n_in)
        dy = _tile(grad_y, t, heads * P, inside, p, p_in).to(tl.float32)
        tl.store(leaving_states + chunk * (P * N) + in_state, leaving, mask=state_mask)
        leaving = leaving * across + _product_split_left(tl.trans(dy * from_start[:, None]), C_c, EXACT)
    tl.store(grad_state + row * (P * N) + in_state, leaving, mask=state_mask)


@triton.jit
def _chunk_backward_kernel(
    grad_y,
    x,
    dt,
    A,
    B,
    C,
    D,
    seq_idx,
    states,
    leaving_states,
    grad_x,
    grad_dt,
    part_B,
    part_C,
    part_A,
    part_D,
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
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """All gradients of one chunk of one head, from the state that enters it and the gradient of the one that leaves."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    i, p, n = tl.arange(0, L), tl.arange(0, BP), tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    state_mask = p_in[:, None] & n_in[None, :]
    chunk = tl.program_id(1)
    place_in_sums = (batch * heads + head) * tl.num_programs(1) + chunk
    in_state = place_in_sums * (P * N) + p[:, None] * N + n[None, :]
    x += batch * x_batch + head * x_head
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    dt += batch * dt_batch + head
    grad_y += (batch * length * heads + head) * P
    grad_x += (batch * length * heads + head) * P
    grad_dt += batch * length * heads + head
    seq_idx += batch * length if PACKED else 0
    a = tl.load(A + head).to(tl.float32)
    start = begin + chunk * L
    t = start + i
    t64 = t.to(tl.int64)
    inside = t < end
    inside_n = inside[:, None] & n_in[None, :]
    # Partial gradients of B and C lie as (batch, position in the segment, heads, state_size).
    part = ((batch * (end - begin) + t64 - begin) * heads + head)[:, None] * N + n[None, :]
    dt_c = tl.load(dt + t64 * dt_seq, mask=inside, other=0.0).to(tl.float32)
    ids, before, last = _ids(seq_idx, start, end, i, L, PACKED)
    log, from_start, to_end, across = _decays(dt_c, a, i, ids, before, last, PACKED, L)
    x_c = _tile(x, t, x_seq, inside, p, p_in)
    dy = _tile(grad_y, t, heads * P, inside, p, p_in)
    B_c = _tile(B, t, B_seq, inside, n, n_in)
    C_c = _tile(C, t, C_seq, inside, n, n_in)

    # Inside the chunk: y = (S * decay) (dt x), with S = C B^T.
    decay = _mask(log, i, ids, PACKED)
    scores = _product(C_c, tl.trans(B_c), EXACT)
    d_u = _product(tl.trans((scores * decay).to(dy.dtype)), dy, EXACT)
    pairs = _product(dy, tl.trans(x_c), EXACT) * decay
    d_scores = (pairs * dt_c[None, :]).to(B_c.dtype)
    seen = pairs * scores
    d_dt = tl.sum(seen, 0)
    # Gradient of dt_k A: every path from before k to k or after. Sums over j < k as products with a triangle of ones: as
    # differences of row and column sums they cancel badly where a position mostly sees itself.
    crossing = tl.where(i[:, None] > i[None, :], seen * dt_c[None, :], 0.0)
    before_k = (i[:, None] < i[None, :]).to(tl.float32).to(x_c.dtype)
    crossing = _product_split_left(crossing, before_k, EXACT)

    leaving = tl.load(leaving_states + in_state, mask=state_mask, other=0.0)
    to_state = _product_split_right(x_c, leaving, EXACT)
    d_B = _product(tl.trans(d_scores), C_c, EXACT) + to_state * (to_end * dt_c)[:, None]
    tl.store(part_B + part, d_B, mask=inside_n)
    written = to_end * tl.sum(to_state * B_c.to(tl.float32), 1)
    d_dt += written
    d_log = tl.sum(tl.where(i[:, None] >= i[None, :], crossing, (written * dt_c)[:, None]), 0)

    d_u += _product(B_c, tl.trans(leaving).to(B_c.dtype), EXACT) * to_end[:, None]
    dy_f = dy.to(tl.float32)
    d_x = d_u * dt_c[:, None] + tl.load(D + head).to(tl.float32) * dy_f
    place = grad_x + t64[:, None] * (heads * P) + p[None, :]
    tl.store(place, d_x.to(grad_x.dtype.element_ty), mask=inside[:, None] & p_in[None, :])
    tl.store(part_D + place_in_sums, tl.sum(tl.sum(dy_f * x_c.to(tl.float32), 1), 0))

    state = tl.load(states + in_state, mask=state_mask, other=0.0)
    d_log += across * tl.sum(tl.sum(leaving * state, 1), 0)
    from_state = _product_split_right(dy, state, EXACT)
    d_C = _product(d_scores, B_c, EXACT) + from_state * from_start[:, None]
    tl.store(part_C + part, d_C, mask=inside_n)
    d_log += tl.cumsum(from_start * tl.sum(from_state * C_c.to(tl.float32), 1), 0, reverse=True)
    tl.store(grad_dt + t64 * heads, (d_dt + d_log * a).to(grad_dt.dtype.element_ty), mask=inside)
    tl.store(part_A + place_in_sums, tl.sum(d_log * dt_c, 0))


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


class _Arguments:
    """The arguments both kernels share, checked and in order."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor | None):
        self.x, self.dt, self.B, self.C = _dense(x), _dense(dt), _dense(B), _dense(C)
        self.A, self.D = A.contiguous(), D.contiguous()
        self.packed = seq_idx is not None
        self.seq_idx = self.x if seq_idx is None else seq_idx.contiguous()
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state_size = B.shape[2:]
        if x.is_cuda and x.dtype != torch.bfloat16:
            raise ValueError(f"`x` is {x.dtype}: compiled, the scan serves bfloat16 only.")
        if x.is_cuda and (self.head_dim, self.state_size) != COMPILED_SIZES:
            raise ValueError(
                f"`x` has head_dim {self.head_dim} and `B` has state_size {self.state_size}: compiled, the scan serves "
                f"head_dim {COMPILED_SIZES[0]} with state_size {COMPILED_SIZES[1]} only."
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
        states: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Run positions [begin, end), write y and the states entering each chunk where given; the last state."""
        final = self.empty_state()
        with on(self.x):
            _scan_kernel[self.programs](
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
                final if states is None else states,
                begin,
                end,
                self.length,
                *self.sizes,
                *self.strides,
                self.head_dim,
                self.state_size,
                chunk or _CHUNK,
                *self.blocks,
                initial is not None,
                self.packed,
                y is not None,
                states is not None,
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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
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
    grad_x, grad_dt, grad_B, grad_C = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (x, dt, B, C))
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
    for begin, end in reversed(spans):
        chunks = triton.cdiv(end - begin, chunk)
        wide = (2, batch, heads, chunks, x.shape[3], state_size)
        states, leaving = torch.empty(wide, dtype=torch.float32, device=device)
        arguments.scan(begin, end, entering.pop(), states=states, chunk=chunk)
        shape = (2, batch, end - begin, groups, heads // groups, state_size)
        parts = torch.empty(shape, dtype=torch.float32, device=device)
        scalars = torch.empty((2, batch, heads, chunks), dtype=torch.float32, device=device)
        with on(x):
            _leaving_kernel[arguments.programs](
                grad_y,
                arguments.dt,
                arguments.A,
                arguments.C,
                arguments.seq_idx,
                grad_state,
                leaving,
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
                arguments.packed,
                arguments.exact,
                num_warps=_WARPS,
                num_stages=_STAGES,
            )
            _chunk_backward_kernel[(*arguments.programs, chunks)](
                grad_y,
                arguments.x,
                arguments.dt,
                arguments.A,
                arguments.B,
                arguments.C,
                arguments.D,
                arguments.seq_idx,
                states,
                leaving,
                grad_x,
                grad_dt,
                parts[0],
                parts[1],
                scalars[0],
                scalars[1],
                begin,
                end,
                length,
                *arguments.sizes,
                *arguments.strides,
                arguments.head_dim,
                state_size,
                chunk,
                *arguments.blocks,
                arguments.packed,
                arguments.exact,
                num_warps=_BACKWARD_WARPS,
                num_stages=1,
            )
        grad_B[:, begin:end] = parts[0].sum(3)
        grad_C[:, begin:end] = parts[1].sum(3)
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
        x: (batch, seq, heads, head_dim), bfloat16; in Triton's interpreter float32 too.
        dt: (batch, seq, heads), time steps after softplus; 0 leaves the state as it is (padding).
        A: (heads,), negative, float32.
        B, C: (batch, seq, groups, state_size), with heads divisible by groups, in the dtype of x.
        D: (heads,), the skip connection.
        chunk_size: taken for the sake of the signature; the kernels have a chunk of their own. It does not set the result.
        initial_state: (batch, heads, head_dim, state_size) entering position 0, or None for zeros.
        seq_idx: (batch, seq) integer document ids, equal within a document, each document contiguous; or None.

    Returns:
        y (batch, seq, heads, head_dim) in the dtype of x, and the state after the last position,
        (batch, heads, head_dim, state_size), float32.
    """
    return _scan(x, dt, A, B, C, D, initial_state, seq_idx)
