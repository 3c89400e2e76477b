"""The training objective's terms that need logits: next-token cross entropy and multi-token-prediction cross entropy.

    loss = CE(logits_t, label_{t+1}) + scale / depths * sum over k of CE(mtp_logits^k_t, label_{t+k+1})

Targets never cross a document boundary. All terms share one normaliser: `num_items_in_batch` where the trainer gives it
(so that gradient accumulation does not change the loss), otherwise each term's own count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .mtp import ahead


def next_token_loss(
    loss_function: Callable, logits: Tensor, labels: Tensor, steps: int, seq_idx: Tensor | None, **kwargs
) -> Tensor:
    """Cross entropy of logits (batch, seq, vocab) against the labels `steps` positions ahead in the same document.

    Args:
        loss_function: transformers' causal language-model loss.
        labels: (batch, seq) int64, -100 where there is nothing to predict; not shifted.
    """
    targets = ahead(labels, steps, seq_idx, fill=-100)
    return loss_function(logits, labels, vocab_size=logits.shape[-1], shift_labels=targets.contiguous(), **kwargs)


def mtp_loss(
    loss_function: Callable, mtp_logits: Sequence[Tensor], labels: Tensor, seq_idx: Tensor | None, **kwargs
) -> Tensor:
    """Mean over depths of the MTP cross entropies; `mtp_logits[k]` predicts k + 2 positions ahead."""
    losses = [
        next_token_loss(loss_function, logits, labels, depth + 2, seq_idx, **kwargs)
        for depth, logits in enumerate(mtp_logits)
    ]
    return sum(losses[1:], losses[0]) / len(losses)
