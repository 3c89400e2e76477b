"""The training objective's terms that need the head: next-token and multi-token-prediction cross entropy.

    loss = CE(head(h_t), label_{t+1}) + scale / depths * sum over k of CE(head(h^k_t), label_{t+k+1})

The label ahead is the next token's of the same row and document, wherever the padding is. All terms share one normaliser:
`num_items_in_batch` where the trainer gives it (so that gradient accumulation does not change the loss), otherwise each
term's own sum of weights. Unless logits are wanted for themselves, they are never held for more than a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..kernels_hub.registry import linear_cross_entropy
from .linear import NemotronHLinear
from .token_layout import TokenLayout

# Tokens per call of a head whose weight cannot be read directly (an adapter, a quantised or an offloaded head).
_TOKENS_PER_CALL = 1024


class Objective(NamedTuple):
    """What `training_objective` gives: the loss to differentiate, and its terms without a gradient, for logs."""

    loss: Tensor  # ()
    next_token: Tensor  # ()
    mtp: Tensor | None  # (), the mean over depths, before scaling


def training_objective(
    head: nn.Module,
    hidden_states: Tensor,
    ahead: Sequence[Tensor],
    labels: Tensor,
    layout: TokenLayout,
    mtp_scale: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
    logits: Tensor | None = None,
    mtp_logits: Sequence[Tensor] | None = None,
) -> Objective:
    """Cross entropy of head(hidden_states) against the next label, and of head(ahead[k]) against the one k + 2 tokens ahead.

    All terms that have no logits yet go through the head together, so its weight gets one gradient, made once.

    Args:
        head: from (tokens, hidden) to (tokens, vocab).
        hidden_states: (batch, seq, hidden).
        ahead: for each MTP depth (batch, seq, hidden); none without MTP.
        labels: (batch, seq) int64, -100 where there is nothing to predict; not shifted.
        mtp_scale: what the mean of the depths counts in the loss.
        num_items_in_batch: what each term's sum is divided by; by default the sum of its targets' weights. Without targets the
            loss is 0.
        loss_weights: (batch, seq) float, what each label counts; by default 1. They get no gradient.
        logits, mtp_logits: (batch, seq, vocab), for each depth in the latter, if they were computed anyway.
    """
    states = [hidden_states, *ahead]
    given: list[Tensor | None] = [logits, *(mtp_logits or [None for _ in ahead])]
    work = torch.promote_types(hidden_states.dtype, torch.float32)

    def of_each_term(t: Tensor, fill: float) -> Tensor:
        return torch.stack([layout.ahead(t, steps, fill).flatten() for steps in range(1, len(states) + 1)])

    targets = of_each_term(labels, -100)
    weights = (targets != -100).to(work)  # (terms, tokens), as the targets
    if loss_weights is not None:
        weights = weights * of_each_term(loss_weights.detach().to(work), 0.0)
    if num_items_in_batch is None:
        sums = weights.sum(1)
        items = torch.where(sums > 0, sums, torch.ones_like(sums))
    else:
        items = torch.as_tensor(num_items_in_batch, device=hidden_states.device).to(work).expand(len(states))
    # All that a token's loss counts, so that nothing is left for the backward to multiply the head's gradient by.
    counted = weights / items.unsqueeze(1)
    if ahead:
        counted[1:] *= mtp_scale / len(ahead)

    losses: list[Tensor | None] = [
        None if whole is None else F.cross_entropy(whole.flatten(0, 1).float(), t, ignore_index=-100, reduction="none")
        for whole, t in zip(given, targets, strict=True)
    ]
    total = sum((one * w).sum() for one, w in zip(losses, counted, strict=True) if one is not None)
    rest = [k for k, one in enumerate(losses) if one is None]
    if rest:
        parts = ([part[k] for k in rest] for part in ([s.flatten(0, 1) for s in states], targets, counted))
        together, *joined = (part[0] if len(rest) == 1 else torch.cat(part) for part in parts)
        summed, each = _weighted_losses(head, together, *joined)
        total = total + summed
        for k, one in zip(rest, each.split(targets.shape[1]), strict=True):
            losses[k] = one
    terms = (torch.stack([one.detach() for one in losses if one is not None]) * weights).sum(1) / items  # (terms,)
    return Objective(total, terms[0], terms[1:].mean() if ahead else None)


def _weighted_losses(
    head: nn.Module, hidden_states: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the cross entropies, (), and each token's own, (tokens,), without the logits of all tokens at once.

    Args:
        hidden_states: (tokens, hidden).
        targets: (tokens,) int64, -100 where there is nothing to predict.
        weights: (tokens,), without a gradient.
    """
    if _is_plain(head):
        weight, device = head.weight, hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return linear_cross_entropy(hidden_states.to(dtype), weight.to(dtype), targets, weights)

    def losses(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(part).float(), wanted, ignore_index=-100, reduction="none")

    parts = zip(hidden_states.split(_TOKENS_PER_CALL), targets.split(_TOKENS_PER_CALL), strict=True)
    each = torch.cat([checkpoint(losses, part, wanted, use_reentrant=False) for part, wanted in parts])
    return (each * weights).sum(), each


def _is_plain(head: nn.Module) -> bool:
    """Whether calling `head` is multiplying by its weight and nothing else."""
    hooks = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
    return (
        type(head) in (nn.Linear, NemotronHLinear)
        and head.bias is None
        and not hooks
        and not isinstance(head.weight, DTensor)
    )
