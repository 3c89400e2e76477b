"""The end of a round of greedy drafts, in plain torch: which of them a row keeps, and where it goes on."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """
    accepted.copy_((tokens[:, 1:] == own[:, :-1]).long().cumprod(1).sum(1))
    stopped = (own.unsqueeze(-1) == stops).any(-1).long()
    goes_on = stopped.cumsum(1) - stopped == 0  # no stop before it
    place = torch.arange(own.shape[1], device=own.device)
    kept.copy_(((place <= accepted.unsqueeze(1)) & goes_on).sum(1).minimum(room))
    newest.copy_((kept - 1).clamp(min=0))
    ended = (stopped.bool() & (place < kept.unsqueeze(1))).any(1)
    room.copy_((room - kept).masked_fill(ended, 0))
    positions.add_(kept.unsqueeze(1))
    token = own.gather(1, newest.unsqueeze(1)).squeeze(1)
    tokens[:, 0] = torch.where(kept > 0, token, tokens[:, 0])
