"""Weighted cross entropy straight from hidden states and the head's weight, a few tokens at a time.

    loss = sum over t of weight_t * loss_t,    loss_t = logsumexp(W h_t) - (W h_t)[target_t]

The logits of a whole batch are never held. While a few tokens' logits are there, so is all that their gradient needs: what each
loss counts is known. So the forward computes the gradients too, three products in all, and the backward only scales them by
what the sum itself counts. Tokens without a target cost nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import own_precision
from .linear import onednn_serves, rows_times

# Logits held at once: 128 MiB in float32 on a CPU, where a larger block is no faster, 512 MiB in bfloat16 on a GPU.
_LOGITS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 28}


def _times(x: Tensor, weight: Tensor) -> Tensor:
    return rows_times(x, weight) if onednn_serves(x, weight) else x @ weight.t()


@torch.library.custom_op("nemotron_super::linear_cross_entropy", mutates_args=())
def _loss_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    chunk: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_zeros(targets.shape, dtype=work)
    counts = torch.ones_like(losses) if weights is None else weights.to(work)
    grad_hidden = torch.zeros_like(hidden) if for_hidden else hidden.new_empty(0)
    # Chunks add up in float32, whatever the dtype of the weight.
    grad_weight = torch.zeros_like(weight, dtype=work) if for_weight else weight.new_empty(0)
    total = losses.new_zeros(())
    for rows in (targets != ignore_index).nonzero().squeeze(1).split(chunk):
        if not rows.numel():
            continue
        some, wanted, count = hidden[rows], targets[rows].unsqueeze(1), counts[rows]
        logits = _times(some, weight).to(work)
        logsumexp = logits.logsumexp(-1)
        losses[rows] = logsumexp - logits.gather(1, wanted).squeeze(1)
        total += (losses[rows] * count).sum()
        if not (for_hidden or for_weight):
            continue
        # d logits = (softmax - one at the target) * weight of the token
        logits.sub_(logsumexp.unsqueeze(1)).exp_().scatter_add_(1, wanted, logits.new_full(wanted.shape, -1.0))
        grad_logits = logits.mul_(count.unsqueeze(1)).to(hidden.dtype)
        if for_hidden:
            grad_hidden[rows] = _times(grad_logits, weight.t())
        if for_weight and weight.dtype == work:
            grad_weight.addmm_(grad_logits.t(), some)
        elif for_weight:
            # As many entries of the vocabulary at a time as keep the product no larger than the logits.
            entries = max(1, logits.numel() // weight.shape[1])
            for start in range(0, weight.shape[0], entries):
                grad_weight[start : start + entries] += grad_logits[:, start : start + entries].t() @ some
    return total, losses, grad_hidden, grad_weight.to(weight.dtype)


@_loss_op.register_fake
def _(hidden, weight, targets, weights, ignore_index, chunk, for_hidden, for_weight):
    work = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=work),
        hidden.new_empty(targets.shape, dtype=work),
        torch.empty_like(hidden) if for_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    *_, ctx.for_hidden, ctx.for_weight = inputs
    _, losses, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(losses, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)  # what would be made for them is as large as they are
    ctx.save_for_backward(grad_hidden, grad_weight)


def _scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """saved * factor in float32, rounded once; the factor stays where it is, on the device."""
    if saved.device.type == "cpu":
        return saved * factor.cpu()  # a single number on a CPU is not rounded to the other's dtype
    # Given as a matrix it decides the dtype of the product, which is written without another temporary.
    return torch.mul(saved, factor.view(1, 1), out=torch.empty_like(saved))


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    grad_hidden, grad_weight = ctx.saved_tensors
    return (
        _scaled(grad_hidden, grad) if ctx.for_hidden else None,
        _scaled(grad_weight, grad) if ctx.for_weight else None,
        *(None,) * 6,
    )


_loss_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over tokens of the cross entropy of `hidden @ weight.T` against `targets`.

    Args:
        hidden: (tokens, width).
        weight: (vocab, width), in the dtype of `hidden`.
        targets: (tokens,) int64; where it is `ignore_index` there is nothing to predict.
        weights: (tokens,), what each token's loss counts, without a gradient; by default 1.
        chunk: tokens whose logits are held at once; by default what fits in 2^25 logits (2^28 on a GPU).

    Returns:
        loss: () in float32 (float64 for float64 inputs), the sum, in nats.
        losses: (tokens,) in the dtype of `loss`, each token's own, not weighted, without a gradient; 0 where there is nothing
            to predict.

    Raises:
        ValueError: shapes that do not fit together; `weights` that want a gradient.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`hidden` {tuple(hidden.shape)} and `weight` {tuple(weight.shape)} must be (tokens, width) and (vocab, width)."
        )
    for name, given in (("targets", targets), ("weights", weights)):
        if given is not None and given.shape != hidden.shape[:1]:
            raise ValueError(f"`{name}` has shape {tuple(given.shape)}, expected {tuple(hidden.shape[:1])}.")
    grad, unit = torch.is_grad_enabled(), None
    if grad and weights is not None and weights.requires_grad:
        raise ValueError(
            "`weights` require a gradient, and get none here: detach them, or weigh losses made from logits."
        )
    if chunk is None:
        chunk = max(1, _LOGITS_AT_ONCE.get(hidden.device.type, _LOGITS_AT_ONCE["cuda"]) // weight.shape[0])
    if weights is not None and hidden.dtype == torch.float16 and weights.numel():
        # The logits' gradient is rounded with the weights. Where they are small, as in a mean, float16 would lose most of it.
        weights = weights.float()
        unit = weights.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        weights = weights / unit
    for_hidden, for_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    with own_precision(hidden):
        loss, losses, _, _ = _loss_op(hidden, weight, targets, weights, ignore_index, chunk, for_hidden, for_weight)
    return loss if unit is None else loss * unit, losses
