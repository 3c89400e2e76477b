"""The training objective's terms that need logits: next-token cross entropy and multi-token-prediction cross entropy.

    loss = CE(logits_t, label_{t+1}) + scale / depths * sum over k of CE(mtp_logits^k_t, label_{t+k+1})

The label ahead is the next token's of the same row and document, wherever the padding is. All terms share one normaliser: `num_items_in_batch` where the trainer gives it
(so that gradient accumulation does not change the loss), otherwise each term's own count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .token_layout import TokenLayout


def next_token_loss(
    loss_function: Callable,
    logits: Tensor,
    labels: Tensor,
    steps: int,
    layout: TokenLayout,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross entropy of logits (batch, seq, vocab) against the labels `steps` tokens ahead in the same document.

    Args:
        loss_function: transformers' causal language-model loss.
        labels: (batch, seq) int64, -100 where there is nothing to predict; not shifted.
        num_items_in_batch: what the sum is divided by; by default the number of targets. Without targets the loss is 0.
    """
    targets = layout.ahead(labels, steps, fill=-100).contiguous()
    if num_items_in_batch is None:
        num_items_in_batch = (targets != -100).sum().clamp(min=1)
    return loss_function(
        logits, labels, vocab_size=logits.shape[-1], shift_labels=targets, num_items_in_batch=num_items_in_batch
    )


def mtp_loss(
    loss_function: Callable,
    mtp_logits: Sequence[Tensor],
    labels: Tensor,
    layout: TokenLayout,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean over depths of the MTP cross entropies; `mtp_logits[k]` predicts k + 2 tokens ahead."""
    losses = [
        next_token_loss(loss_function, logits, labels, depth + 2, layout, num_items_in_batch)
        for depth, logits in enumerate(mtp_logits)
    ]
    return sum(losses[1:], losses[0]) / len(losses)
