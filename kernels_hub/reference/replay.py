"""A few recorded tokens through convolution and recurrence, from states that stay as they were or take some of them in.

The same mathematics as for a sequence: `conv` and `scan` say what computes it, so that what serves a sequence serves here too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .ssd_chunk_scan import ssd_chunk_scan
from .stochastic_round import store_as
from .time_step import ANY_STEP, decay, time_step


def _expect_settled(settled: int, tokens: int) -> None:
    if not 0 <= settled <= tokens:
        raise ValueError(f"`settled` is {settled}, there are {tokens} tokens to settle.")


def _there(kept: Tensor, settled: int, tokens: int) -> Tensor:
    """(batch, tokens): whether a row has a token."""
    t = torch.arange(tokens, device=kept.device)
    return (t < kept.unsqueeze(1)) | (t >= settled)


def causal_conv1d_replay(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    drafts: Tensor | None = None,
    settled: int = 0,
    kept: Tensor | None = None,
    conv: Callable[..., Tensor] = causal_conv1d,
) -> Tensor:
    """The convolution's outputs for a few tokens behind `state` and behind drafts.

    Args:
        state: (batch, channels, kernel), the last `kernel` inputs, oldest first; advanced in place by the settled tokens.
        x: (batch, tokens, width), the new tokens. What is in columns behind the first `channels` is passed on as it is.
        weight, bias: as in `causal_conv1d`.
        drafts: (batch, room, width) or None. The first `settled` tokens in it come before x; then it holds x in their place.
        settled: 0 to room.
        kept: (batch,) integers, or None for all: how many of the settled tokens a row has. To it, the others never came.

    Returns:
        (batch, settled + tokens, width) in the dtype of x; 0 for tokens that a row has not.

    Raises:
        ValueError: more tokens settled than there are drafts, or more than none without drafts.
    """
    channels, kernel = weight.shape
    _expect_settled(settled, 0 if drafts is None else drafts.shape[1])
    inputs = x
    if drafts is not None:
        inputs = torch.cat([drafts[:, :settled], x], dim=1)
        drafts[:, : x.shape[1]] = x
    batch, tokens, _ = inputs.shape
    taken = torch.full((batch,), settled, device=x.device) if kept is None else kept.clamp(max=settled)
    # A row's own tokens come first, so that each has those before it where the convolution looks for them.
    there = _there(taken, settled, tokens)
    order = there.logical_not().to(torch.uint8).argsort(dim=1, stable=True).unsqueeze(-1).expand_as(inputs)
    inputs = inputs.gather(1, order)
    out = torch.cat([conv(inputs[..., :channels], weight, bias, state), inputs[..., channels:]], dim=-1)
    if settled:
        past = torch.cat([state, inputs[..., :channels].mT.to(state.dtype)], dim=-1)
        slots = taken.unsqueeze(1) + torch.arange(kernel, device=x.device)
        state.copy_(past.gather(2, slots.unsqueeze(1).expand(-1, channels, -1)))
    return torch.zeros_like(out).scatter_(1, order, out).masked_fill_(there.logical_not().unsqueeze(-1), 0)


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
    scan: Callable[..., tuple[Tensor, Tensor]] = ssd_chunk_scan,
) -> Tensor:
    """The recurrence's outputs for the last of a few tokens behind `state`.

    Args:
        state: (batch, heads, head_dim, state_size); advanced in place by the first `settled` tokens, and rounded to its dtype
            only then, stochastically where that has 16 bits.
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

    Raises:
        ValueError: more tokens settled than there are.
    """
    _expect_settled(settled, x.shape[1])
    if dt_bias is not None:
        dt, A = time_step(dt, dt_bias, dt_limit), decay(A)
    tokens = x.shape[1]
    if kept is not None:
        dt = dt * _there(kept, settled, tokens).unsqueeze(-1)
    last = state
    if settled:
        _, last = scan(x[:, :settled], dt[:, :settled], A, B[:, :settled], C[:, :settled], D, initial_state=state)
        state.copy_(store_as(last, state.dtype))
    x, dt, B, C = (t[:, settled:] for t in (x, dt, B, C))
    return x if settled == tokens else scan(x, dt, A, B, C, D, initial_state=last)[0]
