"""The Mamba-2 chunked scan (state-space duality) and its gradient, in plain torch.

For one head with state H (head_dim x state_size), time step dt, decay A < 0, input x, and B, C shared by a group:

    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T          y_t = H_t C_t + D x_t

(Dao & Gu 2024, "Transformers are SSMs", section 6.) Inside a chunk of L positions the recurrence is a masked matrix
product; between chunks only H travels. What is notable here:

- Chunks are taken a few at a time, as many as keep the (chunks, heads, L, L) decay matrix under `_DECAY_BUDGET` numbers.
  The largest temporary therefore does not depend on the sequence length, in the forward and in the backward.
- The backward is written out: it saves the inputs only and recomputes everything else, one step over chunks at a time.
- `seq_idx` separates packed documents: no decay path crosses a change of document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import as_operator, misshapen, own_precision, refuse

# Numbers in the largest temporary. On a CPU it should stay in the second-level cache of two cores; a GPU wants width.
_DECAY_BUDGET = {"cpu": 1 << 18, "cuda": 1 << 26}
# The decay matrix costs length x chunk exponentials. On a CPU they outweigh the products above 64.
_LONGEST_CHUNK = {"cpu": 64}
# From here down the exponential is zero.
_ZERO = {torch.float32: -105.0, torch.float64: -750.0}


class _Step(NamedTuple):
    """A few chunks of equal length, in float32 (or float64), as the forward and the backward both need them."""

    u: Tensor  # (batch, chunks, groups, heads_per_group, length, head_dim): dt * x
    B: Tensor  # (batch, chunks, groups, length, state_size)
    C: Tensor  # (batch, chunks, groups, length, state_size)
    decay: Tensor | None  # (batch, chunks, groups, heads_per_group, length, length): exp(sum of dt A over (j, i])
    from_start: Tensor  # (batch, chunks, groups, heads_per_group, length): decay from the chunk's incoming state to i
    to_end: Tensor  # same shape: decay from j to the chunk's outgoing state
    across: Tensor  # (batch, chunks, groups, heads_per_group): decay over the whole chunk


def _spans(length: int, chunk: int, per_step: int) -> list[tuple[int, int, int]]:
    """(start, end, chunk length) of every step; a shorter last chunk is a step of its own, so nothing is padded."""
    spans = []
    whole = length // chunk * chunk
    for start in range(0, whole, chunk * per_step):
        spans.append((start, min(start + chunk * per_step, whole), chunk))
    if whole < length:
        spans.append((whole, length, length - whole))
    return spans


def _plan(x: Tensor, chunk_size: int) -> list[tuple[int, int, int]]:
    batch, length, heads, _ = x.shape
    if x.numel() == 0:
        return []
    chunk = min(chunk_size, length, _LONGEST_CHUNK.get(x.device.type, chunk_size))
    budget = _DECAY_BUDGET.get(x.device.type, _DECAY_BUDGET["cuda"])
    return _spans(length, chunk, max(1, budget // (batch * heads * chunk * chunk)))


def _step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    seq_idx: Tensor | None,
    span: tuple[int, int, int],
    states_only: bool = False,
) -> _Step:
    """Prepare one step. `states_only` leaves out what only the output needs: C's copy and the decay matrix."""
    start, end, chunk = span
    batch, _, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    per_group, chunks = heads // groups, (end - start) // chunk
    work = torch.promote_types(x.dtype, torch.float32)

    def chunked(t: Tensor, *tail: int) -> Tensor:
        return t[:, start:end].to(work).reshape(batch, chunks, chunk, *tail)

    dt_c = chunked(dt, groups, per_group)
    u = (chunked(x, groups, per_group, head_dim) * dt_c.unsqueeze(-1)).permute(0, 1, 3, 4, 2, 5).contiguous()
    B_c = chunked(B, groups, state_size).permute(0, 1, 3, 2, 4).contiguous()
    # A sum that has passed a much smaller number has lost what comes behind it; what decays to zero may as well do so once.
    log_decay = (dt_c * A.to(work).view(groups, per_group)).clamp_(min=_ZERO[work])
    log_decay = log_decay.permute(0, 1, 3, 4, 2).cumsum(-1)

    from_start = log_decay.exp()
    to_end = (log_decay[..., -1:] - log_decay).exp_()
    across = from_start[..., -1]
    visible = None
    if seq_idx is not None:
        ids = seq_idx[:, start:end].reshape(batch, chunks, chunk)
        # The document the incoming state belongs to is that of the position before the chunk. A state handed in from
        # outside belongs to the first document of this call.
        before = torch.cat([seq_idx[:, start - 1 : start] if start else ids[:, 0, :1], ids[:, :-1, -1]], dim=1)
        from_start = from_start * (ids == before.unsqueeze(-1))[:, :, None, None]
        to_end = to_end * (ids == ids[..., -1:])[:, :, None, None]
        across = across * (ids[..., -1] == before)[:, :, None, None]
        visible = (ids.unsqueeze(-1) == ids.unsqueeze(-2))[:, :, None, None]
    if states_only:
        return _Step(u, B_c, C, None, from_start, to_end, across)

    C_c = chunked(C, groups, state_size).permute(0, 1, 3, 2, 4).contiguous()
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    hidden = ~causal if visible is None else ~(visible & causal)
    decay = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill_(hidden, -torch.inf).exp_()
    return _Step(u, B_c, C_c, decay, from_start, to_end, across)


def _incoming_states(step: _Step, state: Tensor) -> tuple[Tensor, Tensor]:
    """States entering each chunk, (batch, chunks, groups, heads_per_group * head_dim, state_size), and the one leaving."""
    batch, chunks, groups, per_group, chunk, head_dim = step.u.shape
    weighted = (step.u * step.to_end.unsqueeze(-1)).transpose(-1, -2)  # (..., per_group, head_dim, chunk)
    added = weighted.reshape(batch, chunks, groups, per_group * head_dim, chunk) @ step.B
    incoming = torch.empty_like(added)
    for c in range(chunks):
        incoming[:, c] = state
        state = state * step.across[:, c].repeat_interleave(head_dim, dim=-1).unsqueeze(-1) + added[:, c]
    return incoming, state


def _to_sequence(t: Tensor) -> Tensor:
    """(batch, chunks, groups, heads_per_group, length, head_dim) -> (batch, chunks * length, heads, head_dim)."""
    batch, chunks, groups, per_group, chunk, head_dim = t.shape
    return t.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * chunk, groups * per_group, head_dim)


def _from_sequence(t: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_to_sequence`."""
    batch, chunks, groups, per_group, chunk, head_dim = like.shape
    return t.to(like.dtype).reshape(batch, chunks, chunk, groups, per_group, head_dim).permute(0, 1, 3, 4, 2, 5)


def _state_output(step: _Step, incoming: Tensor) -> Tensor:
    """What the incoming states contribute to y: (batch, chunks, groups, heads_per_group, length, head_dim)."""
    batch, chunks, groups, per_group, chunk, head_dim = step.u.shape
    read = step.C @ incoming.transpose(-1, -2)  # (batch, chunks, groups, chunk, per_group * head_dim)
    read = read.view(batch, chunks, groups, chunk, per_group, head_dim).transpose(-2, -3)
    return read * step.from_start.unsqueeze(-1)


def _inner_output(step: _Step, scores: Tensor) -> Tensor:
    """What positions of the same chunk contribute to y. Overwrites `step.decay` with G = (C B^T) * decay."""
    return step.decay.mul_(scores) @ step.u


def _first_state(x: Tensor, B: Tensor, initial_state: Tensor | None) -> Tensor:
    """(batch, groups, heads_per_group * head_dim, state_size) in the working dtype."""
    batch, _, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    shape = (batch, groups, heads // groups * head_dim, state_size)
    work = torch.promote_types(x.dtype, torch.float32)
    return x.new_zeros(shape, dtype=work) if initial_state is None else initial_state.to(work).reshape(shape)


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    work = torch.promote_types(x.dtype, torch.float32)
    state = _first_state(x, B, initial_state)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for span in _plan(x, chunk_size):
        step = _step(x, dt, A, B, C, seq_idx, span)
        incoming, state = _incoming_states(step, state)
        out = _inner_output(step, (step.C @ step.B.transpose(-1, -2)).unsqueeze(3))
        out += _state_output(step, incoming)
        y[:, span[0] : span[1]] = _to_sequence(out) + D.to(work)[:, None] * x[:, span[0] : span[1]]
    return y, state.reshape(batch, heads, head_dim, B.shape[3]).clone()


def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    per_group = heads // groups
    work = torch.promote_types(x.dtype, torch.float32)
    grad_x, grad_dt, grad_B, grad_C = (t.new_empty(t.shape) for t in (x, dt, B, C))
    grad_A = A.new_zeros(A.shape, dtype=work)
    grad_D = A.new_zeros(D.shape, dtype=work)
    flat_state = (batch, groups, per_group * head_dim, state_size)
    grad_state = x.new_zeros(flat_state, dtype=work) if grad_final is None else grad_final.to(work).reshape(flat_state)

    # States entering each step, by a first pass over what moves the state.
    plan = _plan(x, chunk_size)
    states = [_first_state(x, B, initial_state)]
    for span in plan[:-1]:
        states.append(_incoming_states(_step(x, dt, A, B, C, seq_idx, span, states_only=True), states[-1])[1])

    for span in reversed(plan):
        start, end, chunk = span
        chunks = (end - start) // chunk
        step = _step(x, dt, A, B, C, seq_idx, span)
        incoming, _ = _incoming_states(step, states.pop())
        x_s, dt_s = x[:, start:end].to(work), dt[:, start:end].to(work)
        dy_s = grad_y[:, start:end].to(work)
        dy = _from_sequence(dy_s, step.u).contiguous()
        grad_D += (dy_s * x_s).sum((0, 1, 3))

        # State recurrence, last chunk first: `leaving` is the gradient of the state each chunk hands on.
        dy_from_start = dy * step.from_start.unsqueeze(-1)
        entering = dy_from_start.transpose(-1, -2).reshape(batch, chunks, groups, per_group * head_dim, chunk) @ step.C
        leaving = torch.empty_like(incoming)
        d_across = torch.empty_like(step.across)
        for c in range(chunks - 1, -1, -1):
            leaving[:, c] = grad_state
            d_across[:, c] = (grad_state * incoming[:, c]).view(batch, groups, per_group, -1).sum(-1)
            across = step.across[:, c].repeat_interleave(head_dim, dim=-1).unsqueeze(-1)
            grad_state = grad_state * across + entering[:, c]

        # Inside the chunk. G = (C B^T) * decay; y = G u + from_start (C H^T).
        scores = (step.C @ step.B.transpose(-1, -2)).unsqueeze(3)
        pairs = (dy @ step.u.transpose(-1, -2)).mul_(step.decay)
        d_scores = pairs.sum(3)
        pairs.mul_(scores)  # dG * G
        du_state = (step.B @ leaving.transpose(-1, -2)).view(batch, chunks, groups, chunk, per_group, head_dim)
        du_state = du_state.transpose(-2, -3) * step.to_end.unsqueeze(-1)
        du = step.decay.mul_(scores).transpose(-1, -2) @ dy + du_state
        wide = (batch, chunks, groups, chunk, per_group * head_dim)
        d_C = d_scores @ step.B + dy_from_start.transpose(-2, -3).reshape(wide) @ incoming
        u_to_end = (step.u * step.to_end.unsqueeze(-1)).transpose(-2, -3).reshape(wide)
        d_B = d_scores.transpose(-1, -2) @ step.C + u_to_end @ leaving

        # Gradient of dt_k A: every path that crosses from before k to k or after. Such sums are written as differences
        # of row and column sums elsewhere, which cancel badly in float32 where a position mostly sees itself.
        before = torch.ones(chunk, chunk, dtype=work, device=x.device).triu(1)
        d_log = (pairs @ before).tril_().sum(-2)
        d_log += (dy * _state_output(step, incoming)).sum(-1).flip(-1).cumsum(-1).flip(-1)
        to_end = (step.u * du_state).sum(-1)
        d_log[..., 1:] += to_end[..., :-1].cumsum(-1)
        d_log += (d_across * step.across).unsqueeze(-1)
        d_log = d_log.permute(0, 1, 4, 2, 3).reshape(batch, end - start, heads)

        du_s = _to_sequence(du)
        grad_A += (d_log * dt_s).sum((0, 1))
        grad_dt[:, start:end] = d_log * A.to(work) + (du_s * x_s).sum(-1)
        grad_x[:, start:end] = du_s * dt_s.unsqueeze(-1) + D.to(work)[:, None] * dy_s
        grad_B[:, start:end] = d_B.permute(0, 1, 3, 2, 4).reshape(batch, end - start, groups, state_size)
        grad_C[:, start:end] = d_C.permute(0, 1, 3, 2, 4).reshape(batch, end - start, groups, state_size)

    grad_initial = grad_state.reshape(batch, heads, head_dim, state_size).clone()
    return grad_x, grad_dt, grad_A.to(A.dtype), grad_B, grad_C, grad_D.to(D.dtype), grad_initial


# Registered as operators so that torch.compile and torch.export see one node instead of an unrolled loop.
@torch.library.custom_op("nemotron_super::ssd_chunk_scan", mutates_args=())
def _scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _forward(x, dt, A, B, C, D, chunk_size, initial_state, seq_idx)


def _fake_state(x: Tensor, B: Tensor) -> Tensor:
    batch, _, heads, head_dim = x.shape
    return x.new_empty((batch, heads, head_dim, B.shape[3]), dtype=torch.promote_types(x.dtype, torch.float32))


@_scan_op.register_fake
def _(x, dt, A, B, C, D, chunk_size, initial_state, seq_idx):
    return x.new_empty(x.shape), _fake_state(x, B)


@torch.library.custom_op("nemotron_super::ssd_chunk_scan_backward", mutates_args=())
def _scan_backward_op(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with own_precision(x):
        return _backward(grad_y, grad_final, x, dt, A, B, C, D, chunk_size, initial_state, seq_idx)


@_scan_backward_op.register_fake
def _(grad_y, grad_final, x, dt, A, B, C, D, chunk_size, initial_state, seq_idx):
    return *(t.new_empty(t.shape) for t in (x, dt, A, B, C, D)), _fake_state(x, B)


def _setup_context(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, ctx.chunk_size, initial_state, seq_idx = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, initial_state, seq_idx)


def _autograd(ctx, grad_y, grad_final):
    *tensors, initial_state, seq_idx = ctx.saved_tensors
    *grads, grad_initial = torch.ops.nemotron_super.ssd_chunk_scan_backward(
        grad_y, grad_final, *tensors, ctx.chunk_size, initial_state, seq_idx
    )
    return *grads, None, None if initial_state is None else grad_initial.to(initial_state.dtype), None


_scan_op.register_autograd(_autograd, setup_context=_setup_context)


def scan_misfit(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> str | None:
    """Which argument of `ssd_chunk_scan` has not the shape that the others ask for, or None."""
    batch, length, heads, head_dim = x.shape
    if heads % B.shape[2]:
        return f"`x` has {heads} heads, which are not divisible by the {B.shape[2]} groups of `B`"
    return misshapen(
        ("dt", dt, (batch, length, heads)),
        ("A", A, (heads,)),
        ("B", B, (batch, length, *B.shape[2:])),
        ("C", C, B.shape),
        ("D", D, (heads,)),
        ("initial_state", initial_state, (batch, heads, head_dim, B.shape[3])),
        ("seq_idx", seq_idx, (batch, length)),
    )


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
        x: (batch, seq, heads, head_dim), any floating dtype.
        dt: (batch, seq, heads), time steps after softplus; 0 leaves the state as it is (padding).
        A: (heads,), negative, float32.
        B, C: (batch, seq, groups, state_size), with heads divisible by groups.
        D: (heads,), the skip connection.
        chunk_size: positions per chunk, at most. It sets the split between the two forms, not the result.
        initial_state: (batch, heads, head_dim, state_size) entering position 0, or None for zeros.
        seq_idx: (batch, seq) integer document ids, equal within a document, each document contiguous; or None.

    Returns:
        y (batch, seq, heads, head_dim) in the dtype of x, and the state after the last position,
        (batch, heads, head_dim, state_size), float32 (float64 for float64 input).

    Raises:
        ValueError: shapes that do not fit together; a chunk without positions.
    """
    refuse(scan_misfit(x, dt, A, B, C, D, initial_state, seq_idx))
    refuse(f"`chunk_size` is {chunk_size}, it has to be 1 at least" if chunk_size < 1 else None)
    with own_precision(x):
        return (_scan_op if as_operator() else _forward)(x, dt, A, B, C, D, chunk_size, initial_state, seq_idx)
