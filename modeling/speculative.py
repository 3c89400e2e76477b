"""Which drafted tokens a target model keeps: the acceptance rules of speculative decoding, for rows of a batch.

Greedy: drafts are kept as long as each is the target's most likely token. Sampled (Leviathan et al. 2023, "Fast inference
from transformers via speculative decoding", algorithm 1; Chen et al. 2023): a draft x, drawn from q, is kept with
probability min(1, p(x) / q(x)); in place of the first one refused comes a token drawn from max(p - q, 0), normalised. What
comes out is distributed as p, whatever q is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accept_greedy(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Keep drafts that are the target's most likely tokens.

    Args:
        drafts: (batch, k) int64.
        scores: (batch, k + 1, vocab), the target's scores at the draft positions and behind the last.

    Returns:
        How many drafts each row keeps, (batch,) int64, and the target's own token behind them, (batch,) int64.
    """
    own = scores.argmax(-1)
    kept = (drafts == own[:, :-1]).long().cumprod(1).sum(1)
    return kept, own.gather(1, kept.unsqueeze(1)).squeeze(1)


def accept_sampled(drafts: Tensor, q: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Keep and replace drafts so that the tokens are distributed as the target's own samples.

    Args:
        drafts: (batch, k) int64, each drawn from its distribution in q.
        q: (batch, k, vocab) float32 probabilities.
        scores: (batch, k + 1, vocab) float32, the target's scores after all processors; -inf where impossible.

    Returns:
        As `accept_greedy`, from torch's global random generator.
    """
    p = scores.softmax(-1)
    k = drafts.shape[1]
    chosen = drafts.unsqueeze(-1)
    p_draft, q_draft = p[:, :k].gather(2, chosen).squeeze(-1), q.gather(2, chosen).squeeze(-1)
    accepted = torch.rand_like(p_draft) * q_draft < p_draft
    kept = accepted.long().cumprod(1).sum(1)
    # Behind the last draft nothing was drafted: q is zero there, and the residual is p itself.
    row = torch.arange(len(drafts), device=drafts.device)
    here = p[row, kept]
    drafted = torch.cat([q, torch.zeros_like(q[:, :1])], dim=1) if k else torch.zeros_like(p)
    residual = (here - drafted[row, kept]).clamp_(min=0)
    # Equal distributions refuse nothing; only rounding can lead here with nothing left.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, here)
    return kept, torch.multinomial(residual, 1).squeeze(1)
