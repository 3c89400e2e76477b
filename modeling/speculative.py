"""Which drafted tokens a target model keeps: the acceptance rules of speculative decoding, for rows of a batch.

Both rules say what the target writes behind its newest token and behind each draft. Drafts are kept as long as that is the
draft itself, and the target's own token behind them too.

Greedy: the target's most likely token. Sampled (Leviathan et al. 2023, "Fast inference from transformers via speculative
decoding", algorithm 1; Chen et al. 2023): a draft x, drawn from q, is repeated with probability min(1, p(x) / q(x)); otherwise
comes a token drawn from max(p - q, 0), normalised. What comes out is distributed as p, whatever q is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels_hub.registry import likeliest
from .choosing import draw


def target_tokens(scores: Tensor, drafts: Tensor, q: Tensor | None, out: Tensor | None = None) -> Tensor:
    """What the target writes behind its newest token and behind each draft; nothing waits for the host.

    Args:
        scores: (batch, k + 1, vocab), the target's scores at the draft positions and behind the last; where tokens are drawn
            float32, after all processors, -inf where impossible.
        drafts: (batch, k) int64.
        q: (batch, k, vocab) float32, the probabilities each draft was drawn from; None for the greedy rule.
        out: (batch, k + 1) int64, written to; by default a new tensor.
    """
    if out is None:
        out = torch.empty(scores.shape[:-1], dtype=torch.long, device=scores.device)
    if q is None:
        return likeliest(scores, out)
    k, p = drafts.shape[1], scores.softmax(-1)
    # Behind the last draft nothing was drafted: the residual is p itself.
    residual = p.clone()
    residual[:, :k].sub_(q).clamp_(min=0)
    # Equal distributions refuse nothing; only rounding can lead here with nothing left.
    draw(torch.where(residual.sum(-1, keepdim=True) > 0, residual, p), out)
    chosen = drafts.unsqueeze(-1)
    p_draft, q_draft = p[:, :k].gather(2, chosen).squeeze(-1), q.gather(2, chosen).squeeze(-1)
    repeated = torch.rand_like(p_draft) * q_draft < p_draft
    out[:, :k] = torch.where(repeated, drafts, out[:, :k])
    return out


def accept(drafts: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts each row keeps, (batch,) int64, and the target's own token behind them, (batch,) int64.

    Args:
        drafts: (batch, k) int64.
        own: (batch, k + 1) int64, as `target_tokens` gives it.
    """
    kept = (drafts == own[:, :-1]).long().cumprod(1).sum(1)
    return kept, own.gather(1, kept.unsqueeze(1)).squeeze(1)
