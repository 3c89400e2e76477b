"""The training objective's terms that need the head: next-token and multi-token-prediction cross entropy.

    loss = CE(head(h_t), label_{t+1}) + scale / depths * sum over k of CE(head(h^k_t), label_{t+k+1})

The label ahead is the next token's of the same row and document, wherever the padding is. All terms share one normaliser:
`num_items_in_batch` where the trainer gives it (so that gradient accumulation does not change the loss), otherwise each
term's own sum of weights. Unless logits are wanted for themselves, they are never held for more than a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def cross_entropy_ahead(
    head: nn.Module,
    hidden_states: Tensor,
    labels: Tensor,
    steps: int,
    layout: TokenLayout,
    num_items_in_batch: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """Cross entropy of head(hidden_states) against the labels `steps` tokens ahead in the same document.

    Args:
        head: from (tokens, hidden) to (tokens, vocab).
        hidden_states: (batch, seq, hidden).
        labels: (batch, seq) int64, -100 where there is nothing to predict; not shifted.
        num_items_in_batch: what the sum is divided by; by default the sum of the targets' weights. Without targets the
            loss is 0.
        loss_weights: (batch, seq) float, what each label counts; by default 1.
        logits: (batch, seq, vocab), if they were computed anyway.
    """
    targets = layout.ahead(labels, steps, fill=-100).reshape(-1)
    if logits is None:
        losses = token_losses(head, hidden_states.flatten(0, 1), targets)
    else:
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="none")
    weights = (targets != -100).to(losses.dtype)
    if loss_weights is not None:
        weights = weights * layout.ahead(loss_weights, steps, fill=0.0).reshape(-1).to(losses.dtype)
    if num_items_in_batch is None:
        total = weights.sum()
        num_items_in_batch = torch.where(total > 0, total, torch.ones_like(total))
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return (losses * weights).sum() / num_items_in_batch


def mtp_cross_entropy(
    head: nn.Module,
    ahead: Sequence[Tensor],
    labels: Tensor,
    layout: TokenLayout,
    num_items_in_batch: Tensor | int | None = None,
    loss_weights: Tensor | None = None,
    logits: Sequence[Tensor] | None = None,
) -> Tensor:
    """Mean over depths of the MTP cross entropies; `ahead[k]` (batch, seq, hidden) predicts k + 2 tokens ahead."""
    losses = [
        cross_entropy_ahead(
            head, h, labels, depth + 2, layout, num_items_in_batch, loss_weights, logits[depth] if logits else None
        )
        for depth, h in enumerate(ahead)
    ]
    return sum(losses[1:], losses[0]) / len(losses)


def token_losses(head: nn.Module, hidden_states: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy per token, (tokens,) float32, 0 where the target is -100, without the logits of all tokens at once.

    Args:
        hidden_states: (tokens, hidden).
        targets: (tokens,) int64.
    """
    if _is_plain(head):
        weight, device = head.weight, hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return linear_cross_entropy(hidden_states.to(dtype), weight.to(dtype), targets)

    def losses(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(part).float(), wanted, ignore_index=-100, reduction="none")

    parts = zip(hidden_states.split(_TOKENS_PER_CALL), targets.split(_TOKENS_PER_CALL), strict=True)
    return torch.cat([checkpoint(losses, part, wanted, use_reentrant=False) for part, wanted in parts])


def _is_plain(head: nn.Module) -> bool:
    """Whether calling `head` is multiplying by its weight and nothing else."""
    hooks = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
    return (
        type(head) in (nn.Linear, NemotronHLinear)
        and head.bias is None
        and not hooks
        and not isinstance(head.weight, DTensor)
    )
