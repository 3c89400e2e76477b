"""Cross entropy straight from hidden states and the head's weight, without the logits of all tokens at once.

    loss_t = logsumexp(W h_t) - (W h_t)[target_t]

Products are torch's, a block of tokens at a time; one kernel takes the block's logits to losses, one takes them to their
gradient in place. Tokens without a target are multiplied along: finding out where they are would wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on
from ._ops import add_op_namespace_prefix, ops

_LOGITS_AT_ONCE = 1 << 27  # 256 MiB in bfloat16
_BLOCK = 4096  # of the vocabulary


@triton.jit
def _loss_kernel(logits, targets, losses, logsumexp, vocab, ignore_index, V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    v = tl.arange(0, V)
    # One running maximum and sum for each lane; they are joined once, at the end.
    most = tl.full([V], float("-inf"), tl.float32)
    total = tl.zeros([V], tl.float32)
    for start in range(0, vocab, V):
        value = tl.load(logits + start + v, mask=start + v < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, value)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - safe) + tl.exp(value - safe)
        # What is not a number must stay so, whatever the maximum makes of it.
        total = tl.where(value == value, total, value)
        most = higher
    highest = tl.max(most, 0)
    log = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocab)
    wanted = tl.load(logits + target, mask=inside, other=0.0).to(tl.float32)
    # A target that is no entry of the vocabulary makes the loss not a number: there is no asking the host to raise.
    loss = tl.where(inside, log - wanted, float("nan"))
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(logsumexp + row, log)


@triton.jit
def _gradient_kernel(logits, targets, logsumexp, grad, vocab, ignore_index, V: tl.constexpr):
    """In place: logits become (softmax - one at the target) * grad, and zero where there is no target."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    v = tl.program_id(1) * V + tl.arange(0, V)
    inside = v < vocab
    target = tl.load(targets + row)
    factor = tl.load(grad + row).to(tl.float32)
    value = tl.load(logits + v, mask=inside, other=0.0).to(tl.float32)
    out = (tl.exp(value - tl.load(logsumexp + row)) - tl.where(v == target, 1.0, 0.0)) * factor
    out = tl.where(target == ignore_index, 0.0, out)
    tl.store(logits + v, out.to(logits.dtype.element_ty), mask=inside)


def _rows_at_once(weight: Tensor, chunk: int) -> int:
    return chunk or max(1, _LOGITS_AT_ONCE // weight.shape[0])


@torch.library.custom_op(add_op_namespace_prefix("linear_cross_entropy"), mutates_args=())
def _loss_op(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int) -> tuple[Tensor, Tensor]:
    tokens, vocab = hidden.shape[0], weight.shape[0]
    losses, logsumexp = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
    targets, step = targets.contiguous(), _rows_at_once(weight, chunk)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        logits = hidden[part] @ weight.t()
        with on(hidden):
            _loss_kernel[(logits.shape[0],)](
                logits, targets[part], losses[part], logsumexp[part], vocab, ignore_index, _BLOCK, num_warps=8
            )
    return losses, logsumexp


@_loss_op.register_fake
def _(hidden, weight, targets, ignore_index, chunk):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), hidden.new_empty(
        hidden.shape[0], dtype=torch.float32
    )


@torch.library.custom_op(add_op_namespace_prefix("linear_cross_entropy_backward"), mutates_args=())
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
    tokens, vocab, width = hidden.shape[0], *weight.shape
    grad, targets, step = grad.contiguous(), targets.contiguous(), _rows_at_once(weight, chunk)
    grad_hidden = torch.empty(hidden.shape if for_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    # Blocks add up in float32, whatever the dtype of the weight.
    grad_weight = torch.zeros(weight.shape if for_weight else 0, dtype=torch.float32, device=hidden.device)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        logits = hidden[part] @ weight.t()
        with on(hidden):
            _gradient_kernel[(logits.shape[0], triton.cdiv(vocab, _BLOCK))](
                logits, targets[part], logsumexp[part], grad[part], vocab, ignore_index, _BLOCK, num_warps=8
            )
        if for_hidden:
            torch.mm(logits, weight, out=grad_hidden[part])
        if for_weight:
            # As many entries of the vocabulary at a time as keep the product no larger than the logits.
            entries = max(1, logits.numel() // width)
            for first in range(0, vocab, entries):
                grad_weight[first : first + entries] += logits[:, first : first + entries].t() @ hidden[part]
    return grad_hidden, grad_weight.to(weight.dtype)


@_loss_backward_op.register_fake
def _(grad, hidden, weight, targets, logsumexp, ignore_index, chunk, for_hidden, for_weight):
    return hidden.new_empty(hidden.shape if for_hidden else 0), weight.new_empty(weight.shape if for_weight else 0)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, ctx.ignore_index, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _autograd(ctx, grad, _):
    hidden, weight, targets, logsumexp = ctx.saved_tensors
    for_hidden, for_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = ops.linear_cross_entropy_backward(
        grad, hidden, weight, targets, logsumexp, ctx.ignore_index, ctx.chunk, for_hidden, for_weight
    )
    return grad_hidden if for_hidden else None, grad_weight if for_weight else None, None, None, None


_loss_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """Cross entropy of `hidden @ weight.T` against `targets`, per token.

    Args:
        hidden: (tokens, width), bfloat16 or float32.
        weight: (vocab, width), in the dtype of `hidden`.
        targets: (tokens,) int64; where it is `ignore_index` there is nothing to predict.
        chunk: tokens whose logits are held at once; by default what fits in 2^27 logits.

    Returns:
        (tokens,) float32, in nats; 0 where there is nothing to predict, NaN where a target is no entry of the vocabulary.
    """
    return _loss_op(hidden, weight, targets, ignore_index, chunk or 0)[0]
