"""Weighted cross entropy straight from hidden states and the head's weight, without the logits of all tokens at once.

    loss = sum over t of weight_t * loss_t,    loss_t = logsumexp(W h_t) - (W h_t)[target_t]

Products are torch's, a block of tokens at a time; one kernel takes the block's logits to losses and, in place, to their
gradient. So there are three products, and the backward only scales what they gave by what the sum itself counts: in place, and
not at all where that is 1, so whatever is known before belongs into the weights. Tokens without a target are multiplied along:
finding out where they are would wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, cdiv, gpu, on
from ._operator import operator, watched

_LOGITS_AT_ONCE = 1 << 28  # 512 MiB in bfloat16
_BLOCK = 16384  # of the vocabulary, at most


@triton.jit
def _loss_kernel(logits, targets, weights, losses, vocab, ignore_index, WITH_GRAD: tl.constexpr, V: tl.constexpr):
    """A row's loss; with a gradient logits become (softmax - one at the target) * weight, and zero where there is no target."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    v = tl.arange(0, V)
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocab)
    wanted = tl.load(logits + target, mask=inside, other=0.0).to(tl.float32)
    # One running maximum and sum for each lane; they are joined once, at the end.
    most = tl.full([V], float("-inf"), tl.float32)
    total = tl.zeros([V], tl.float32)
    for start in range(0, vocab, V):
        # Kept in the cache: the row is read once more.
        value = tl.load(
            logits + start + v, mask=start + v < vocab, other=float("-inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        # Of the two, the larger one's exponential is 1. What is not a number fails the comparison and stays in the sum.
        smaller = tl.exp(tl.where(value > most, most - value, value - most))
        total = tl.where(value == float("-inf"), total, tl.where(value > most, total * smaller + 1.0, total + smaller))
        most = tl.maximum(most, value)
    highest = tl.max(most, 0)
    log = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    # A target that is no entry of the vocabulary makes the loss not a number: there is no asking the host to raise.
    loss = tl.where(inside, log - wanted, float("nan"))
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, loss))
    if WITH_GRAD:
        weight = tl.load(weights + row).to(tl.float32)
        tl.debug_barrier()  # every lane has read before one writes
        for start in range(0, vocab, V):
            place = start + v
            value = tl.load(logits + place, mask=place < vocab, other=0.0, eviction_policy="evict_first").to(
                tl.float32
            )
            out = (tl.exp(value - log) - tl.where(place == target, 1.0, 0.0)) * weight
            out = tl.where(target == ignore_index, 0.0, out)
            tl.store(logits + place, out.to(logits.dtype.element_ty), mask=place < vocab)


@triton.jit
def _scale_kernel(x, factor, count, SIZE: tl.constexpr):
    """x *= factor in float32, rounded once; a factor of 1 leaves everything where it is."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        step = tl.num_programs(0).to(tl.int64) * SIZE
        for _ in range(tl.cdiv(count - tl.program_id(0) * SIZE, step)):
            value = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
            tl.store(x + i, (value * by).to(x.dtype.element_ty), mask=i < count)
            i += step


def _rows_at_once(hidden: Tensor, weight: Tensor, chunk: int, for_weight: bool) -> int:
    if chunk:
        return chunk
    (tokens, width), rows = hidden.shape, max(1, _LOGITS_AT_ONCE // weight.shape[0])
    if not for_weight or weight.dtype == torch.float32:
        return rows
    # In lower precision the memory is highest where a float32 sum over blocks is rounded: three times the weight. Logits of `width`
    # tokens are as large as the weight, so that beside the sum they fit below that, and beside a gradient of all at once twice as many.
    blocks = cdiv(tokens, max(rows, width)) if tokens > max(rows, 2 * width) else 1
    return max(1, cdiv(tokens, blocks))


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (float32) = a @ b, or += unless it is the `first`; on a GPU without a temporary."""
    if not a.is_cuda:
        total.copy_(a @ b) if first else total.add_(a @ b)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@operator("linear_cross_entropy")
def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    chunk: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, vocab = hidden.shape[0], weight.shape[0]
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    counts = torch.ones_like(losses)
    if weights is not None:
        # Where there is nothing to predict a weight may be anything, such as one over no tokens.
        counts = weights.float().masked_fill(targets == ignore_index, 0).contiguous()
    targets, step = targets.contiguous(), _rows_at_once(hidden, weight, chunk, for_weight)
    grad_hidden = torch.empty(hidden.shape if for_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    # Blocks add up in float32, whatever the dtype of the weight; a single one needs no sum.
    summed = weight.dtype if tokens <= step else torch.float32
    grad_weight = torch.empty(weight.shape if for_weight else 0, dtype=summed, device=hidden.device)
    lanes = min(block(vocab), _BLOCK)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        logits = hidden[part] @ weight.t()
        with on(hidden):
            _loss_kernel[(logits.shape[0],)](
                *(logits, targets[part], counts[part], losses[part], vocab, ignore_index),
                WITH_GRAD=for_hidden or for_weight,
                V=lanes,
                num_warps=max(4, lanes // 512),
            )
        if for_hidden:
            torch.mm(logits, weight, out=grad_hidden[part])
        if for_weight and tokens <= step:
            torch.mm(logits.t(), hidden, out=grad_weight)
        elif for_weight:
            _add_product(grad_weight, logits.t(), hidden[part], first=start == 0)
        del logits  # before the next block's are made
    if for_weight and tokens == 0:
        grad_weight.zero_()
    return torch.dot(losses, counts), losses, grad_hidden, grad_weight.to(weight.dtype)


@_loss.register_fake
def _(hidden, weight, targets, weights, ignore_index, chunk, for_hidden, for_weight):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    *_, ctx.for_hidden, ctx.for_weight = inputs
    _, losses, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(losses, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)  # what would be made for them is as large as they are
    ctx.save_for_backward(grad_hidden, grad_weight)


@operator("linear_cross_entropy_scale", mutates_args=("x",))
def _scale(x: Tensor, factor: Tensor) -> None:
    count = x.numel()
    if count:
        with on(x):
            programs = min(cdiv(count, 4096), 8 * gpu(x.device)[0])
            _scale_kernel[(programs,)](x, factor, count, 4096, num_warps=8)


@_scale.register_fake
def _(x, factor):
    return None


def _graph_is_kept() -> bool:
    """Whether another backward may come for the same saved tensors. What a compiler traces may run both ways."""
    return watched() or torch._C._autograd._get_current_graph_task_keep_graph()


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    grads = [saved.clone() if _graph_is_kept() else saved for saved in ctx.saved_tensors]
    for one in grads:
        _scale(one, grad)
    grad_hidden, grad_weight = grads
    return grad_hidden if ctx.for_hidden else None, grad_weight if ctx.for_weight else None, *(None,) * 6


_loss.register_autograd(_autograd, setup_context=_setup_context)


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
        hidden: (tokens, width), bfloat16 or float32.
        weight: (vocab, width), in the dtype of `hidden`.
        targets: (tokens,) int64; where it is `ignore_index` there is nothing to predict.
        weights: (tokens,), what each token's loss counts, without a gradient; by default 1.
        chunk: tokens whose logits are held at once; by default what fits in 2^28 logits, or more where these take no more memory
            than the sum of the weight's gradient in float32.

    Returns:
        loss: () float32, the sum, in nats.
        losses: (tokens,) float32, each token's own, not weighted, without a gradient; 0 where there is nothing to predict, NaN
            where a target is no entry of the vocabulary.
    """
    grad = torch.is_grad_enabled()
    for_hidden, for_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    return _loss(hidden, weight, targets, weights, ignore_index, chunk or 0, for_hidden, for_weight)[:2]
