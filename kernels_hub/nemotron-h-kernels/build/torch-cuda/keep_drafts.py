"""The end of a round of greedy drafts, in one launch: which of them a row keeps, and where it goes on."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, on
from ._operator import operator
from ._overlap import next_may_begin, overlap, previous_done


@triton.jit
def _keep_kernel(
    tokens,
    own,
    stops,
    room,
    kept,
    newest,
    positions,
    accepted,
    count,
    stop_count,
    width,
    tokens_row,
    own_row,
    positions_row,
    accepted_row,
    T: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    t, s, w = tl.arange(0, T), tl.arange(0, S), tl.arange(0, W)
    tokens += row * tokens_row
    own += row * own_row
    positions += row * positions_row
    draft = tl.load(tokens + 1 + t, mask=t + 1 < count, other=-1)
    written = tl.load(own + t, mask=t < count, other=-1)
    # Behind the last draft nothing was drafted that could be right.
    right = (t + 1 < count) & (draft == written)
    agreed = tl.min(tl.where(right, T, t), 0)
    stop = tl.load(stops + s, mask=s < stop_count, other=-2)
    stopped = tl.max((written[:, None] == stop[None, :]).to(tl.int32), 1) > 0
    first_stop = tl.min(tl.where(stopped, t, T), 0)
    left = tl.load(room + row)
    going = tl.minimum((tl.minimum(agreed, first_stop) + 1).to(tl.int64), left)
    last = tl.maximum(going - 1, 0)
    token = tl.load(own + last)
    place = tl.load(positions + w, mask=w < width, other=0)
    tl.store(room + row, tl.where(first_stop < going, 0, left - going))
    tl.store(kept + row, going)
    tl.store(newest + row, last)
    tl.store(accepted + row * accepted_row, agreed.to(tl.int64))
    tl.store(positions + w, place + going, mask=w < width)
    tl.store(tokens, token, mask=going > 0)


@operator("keep_drafts", mutates_args=("tokens", "room", "kept", "newest", "positions", "accepted"))
def _keep(
    tokens: Tensor,
    own: Tensor,
    stops: Tensor,
    room: Tensor,
    kept: Tensor,
    newest: Tensor,
    positions: Tensor,
    accepted: Tensor,
) -> None:
    batch, count = own.shape
    if batch == 0:
        return
    with on(tokens):
        _keep_kernel[(batch,)](
            tokens,
            own,
            stops,
            room,
            kept,
            newest,
            positions,
            accepted,
            count,
            stops.shape[0],
            positions.shape[1],
            tokens.stride(0),
            own.stride(0),
            positions.stride(0),
            accepted.stride(0),
            block(count, 2),
            block(stops.shape[0], 2),
            block(positions.shape[1], 2),
            num_warps=1,
            **overlap(tokens),
        )


@_keep.register_fake
def _(tokens, own, stops, room, kept, newest, positions, accepted):
    return None


def keep_drafts(
    tokens: Tensor,
    own: Tensor,
    stops: Tensor,
    room: Tensor,
    kept: Tensor,
    newest: Tensor,
    positions: Tensor,
    accepted: Tensor,
) -> None:
    """Keep the drafts that a model would have written itself, and one token of its own behind them; all in place.

    A row takes no token behind one of `stops`, nor more than it has room for; once it has ended it takes none, and stays
    where it is.

    Args:
        tokens: (batch, 1 + k) int64, the newest token of each row and its drafts. The new newest one is written to the first place.
        own: (batch, 1 + k) int64, what the model writes behind each of them.
        stops: (n,) int64, tokens that end a text; numbers below zero are none.
        room: (batch,) int64, how many tokens a row may still take; becomes what is left of it, 0 behind a stop.
        kept: (batch,) int64; becomes how many of `own` a row takes: 0 to 1 + k.
        newest: (batch,) int64; becomes the place of the last of these, 0 where there is none.
        positions: (batch, n) int64; advanced by `kept`.
        accepted: (batch,) int64; becomes how many drafts in a row were right, whatever the row takes of them.

    All are dense in their last dimension, except for `accepted`.
    """
    _keep(tokens, own, stops, room, kept, newest, positions, accepted)
