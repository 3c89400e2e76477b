"""Cross entropy straight from hidden states and the head's weight, a few tokens at a time.

    loss_t = logsumexp(W h_t) - (W h_t)[target_t]

The logits of a whole batch are never held: the forward keeps one number per token (the logsumexp) and the backward
multiplies once more. Tokens without a target cost nothing. Losses are given per token, so any mean can be taken of them;
their gradient need not be uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import onednn_serves, rows_times

# Logits held at once: 128 MiB in float32 on a CPU, where a larger block is no faster, 512 MiB on a GPU.
_LOGITS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 27}


def _times(x: Tensor, weight: Tensor) -> Tensor:
    return rows_times(x, weight) if onednn_serves(x, weight) else x @ weight.t()


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int):
    """Positions of the tokens that have a target, `chunk` at a time, with their logits in float32 (or wider)."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    for rows in (targets != ignore_index).nonzero().squeeze(1).split(chunk):
        if rows.numel():
            yield rows, _times(hidden[rows], weight).to(work)


@torch.library.custom_op("nemotron_super::linear_cross_entropy", mutates_args=())
def _loss_op(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int) -> tuple[Tensor, Tensor]:
    work = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_zeros(targets.shape, dtype=work)
    logsumexp = torch.zeros_like(losses)
    for rows, logits in _chunks(hidden, weight, targets, ignore_index, chunk):
        logsumexp[rows] = logits.logsumexp(-1)
        losses[rows] = logsumexp[rows] - logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
    return losses, logsumexp


@_loss_op.register_fake
def _(hidden, weight, targets, ignore_index, chunk):
    work = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(targets.shape, dtype=work), hidden.new_empty(targets.shape, dtype=work)


@torch.library.custom_op("nemotron_super::linear_cross_entropy_backward", mutates_args=())
def _loss_backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    ignore_index: int,
    chunk: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_hidden = torch.zeros_like(hidden) if for_hidden else hidden.new_empty(0)
    # Chunks add up in float32, whatever the dtype of the weight.
    grad_weight = torch.zeros_like(weight, dtype=logsumexp.dtype) if for_weight else weight.new_empty(0)
    for rows, logits in _chunks(hidden, weight, targets, ignore_index, chunk):
        # d logits = (softmax - one at the target) * grad
        logits.sub_(logsumexp[rows].unsqueeze(1)).exp_()
        logits.scatter_add_(1, targets[rows].unsqueeze(1), logits.new_full((rows.numel(), 1), -1.0))
        grad_logits = logits.mul_(grad[rows].unsqueeze(1)).to(hidden.dtype)
        if for_hidden:
            grad_hidden[rows] = _times(grad_logits, weight.t())
        if for_weight:
            # As many entries of the vocabulary at a time as keep the product no larger than the logits.
            entries = max(1, rows.numel() * weight.shape[0] // weight.shape[1])
            for start in range(0, weight.shape[0], entries):
                part = grad_logits[:, start : start + entries]
                grad_weight[start : start + entries] += part.t() @ hidden[rows]
    return grad_hidden, grad_weight.to(weight.dtype)


@_loss_backward_op.register_fake
def _(grad, hidden, weight, targets, logsumexp, ignore_index, chunk, for_hidden, for_weight):
    return (
        torch.empty_like(hidden) if for_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, ctx.ignore_index, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _autograd(ctx, grad, _):
    hidden, weight, targets, logsumexp = ctx.saved_tensors
    for_hidden, for_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = torch.ops.nemotron_super.linear_cross_entropy_backward(
        grad, hidden, weight, targets, logsumexp, ctx.ignore_index, ctx.chunk, for_hidden, for_weight
    )
    return grad_hidden if for_hidden else None, grad_weight if for_weight else None, None, None, None


_loss_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """Cross entropy of `hidden @ weight.T` against `targets`, per token.

    Args:
        hidden: (tokens, width).
        weight: (vocab, width), in the dtype of `hidden`.
        targets: (tokens,) int64; where it is `ignore_index` there is nothing to predict.
        chunk: tokens whose logits are held at once; by default what fits in 2^25 logits (2^27 on a GPU).

    Returns:
        (tokens,) in float32 (float64 for float64 inputs), in nats; 0 where there is nothing to predict.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`hidden` {tuple(hidden.shape)} and `weight` {tuple(weight.shape)} must be (tokens, width) and (vocab, width)."
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"`targets` has shape {tuple(targets.shape)}, expected {tuple(hidden.shape[:1])}.")
    if chunk is None:
        chunk = max(1, _LOGITS_AT_ONCE.get(hidden.device.type, _LOGITS_AT_ONCE["cuda"]) // weight.shape[0])
    return _loss_op(hidden, weight, targets, ignore_index, chunk)[0]
