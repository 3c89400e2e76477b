"""Routed experts without a gate: down(relu(up(x))^2), weighted and summed over the chosen experts, in plain torch.

Token-expert pairs are sorted by expert, so that every expert sees one contiguous block. On a CPU the blocks are
multiplied one after another (an expert without tokens costs nothing); on a GPU `torch.nn.functional.grouped_mm` takes
them all, without a host synchronisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import as_operator, misshapen, refuse

_FEW = 8  # tokens up to which sorting costs more than it saves on a CPU
# Numbers in the chosen experts' matrices that may be copied side by side; those of large models stay where they are.
_COPIED = 1 << 22


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times that expert's weight (experts, out, in). `ends`: (experts,) row offsets."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    # oneDNN builds a kernel for every new shape in lower precision, and experts get another number of tokens each time.
    work = torch.promote_types(x.dtype, torch.float32)
    x = x.to(work)
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[expert].to(work).t(), out=out[start:end])
        start = end
    return out.to(weight.dtype)


def _grouped_outer(a: Tensor, b: Tensor, ends: Tensor, like: Tensor) -> Tensor:
    """Per expert a^T b over its rows: the gradient of its weight, zero for an expert without tokens."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return F.grouped_mm(a.t(), b, offs=ends)
    work = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(work), b.to(work)
    out = torch.empty_like(like)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[expert] = a[start:end].t() @ b[start:end]
        else:
            out[expert].zero_()
        start = end
    return out


def _sorted_pairs(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Order of the flattened (tokens * top_k) pairs by expert, and where each expert's block ends (int32)."""
    flat = index.reshape(-1).long()
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    return order, counts.cumsum(0).to(torch.int32)


def _few_tokens(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Decoding on a CPU: copy the chosen experts side by side and multiply them in one go, without sorting.

    A few large operations beat a matrix-vector product per expert, each of which would read less than it costs to start.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    tokens, top_k = index.shape
    chosen = index.reshape(-1)
    pairs = x.to(work).unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, 1, -1)
    hidden = up.index_select(0, chosen).to(work).mul_(pairs).sum(-1).relu_().square_()
    hidden.mul_(weights.reshape(-1, 1))
    y = down.index_select(0, chosen).to(work).mul_(hidden.unsqueeze(1))
    return y.view(tokens, top_k, *down.shape[1:]).sum((1, 3)).to(x.dtype)


def _many_tokens(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """Returns the output and, if kept, the pre-activations of the sorted pairs for the backward."""
    tokens, top_k = index.shape
    order, ends = _sorted_pairs(index, up.shape[0])
    hidden = _grouped(x.index_select(0, order // top_k), up, ends)
    y = _grouped((hidden.relu() if keep_hidden else hidden.relu_()).square_(), down, ends)
    # Back to (tokens, top_k) by gathering, then a float32 sum in a fixed order: deterministic, unlike index_add on a GPU.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    y = y.index_select(0, inverse).view(tokens, top_k, y.shape[1])
    return torch.bmm(weights.unsqueeze(1), y.to(weights.dtype)).squeeze(1).to(x.dtype), hidden


@torch.library.custom_op("nemotron_super::moe_experts", mutates_args=())
def _experts_op(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return _many_tokens(x, index, weights, up, down, keep_hidden=True)


@_experts_op.register_fake
def _(x, index, weights, up, down):
    return x.new_empty(x.shape), x.new_empty(index.shape[0] * index.shape[1], up.shape[1])


@torch.library.custom_op("nemotron_super::moe_experts_backward", mutates_args=())
def _experts_backward_op(
    grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, top_k = index.shape
    order, ends = _sorted_pairs(index, up.shape[0])
    rows = order // top_k
    active = hidden.relu()
    squared = active.square()
    grad_rows = grad.index_select(0, rows)
    pair_weights = weights.reshape(-1)[order].unsqueeze(-1)
    # d weight of a pair = grad . y, and y = down(squared): take it through grad @ down, which d squared needs as well.
    back = _grouped(grad_rows, down.transpose(-2, -1), ends)
    grad_pairs = torch.linalg.vecdot(back.to(weights.dtype), squared.to(weights.dtype))
    grad_weights = torch.empty_like(grad_pairs)
    grad_weights[order] = grad_pairs
    grad_hidden = (back * (2 * pair_weights).to(back.dtype)).mul_(active)
    scaled = grad_rows * pair_weights.to(grad_rows.dtype)
    grad_down = _grouped_outer(scaled, squared, ends, down)
    grad_up = _grouped_outer(grad_hidden, x.index_select(0, rows), ends, up)
    grad_x = _grouped(grad_hidden, up.transpose(-2, -1), ends)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    grad_x = grad_x.index_select(0, inverse).view(tokens, top_k, x.shape[1]).sum(1, dtype=weights.dtype).to(x.dtype)
    return grad_x, grad_weights.view_as(weights), grad_up, grad_down


@_experts_backward_op.register_fake
def _(grad, x, index, weights, up, down, hidden):
    return x.new_empty(x.shape), weights.new_empty(weights.shape), torch.empty_like(up), torch.empty_like(down)


def _setup_context(ctx, inputs, output) -> None:
    x, index, weights, up, down = inputs
    ctx.save_for_backward(x, index, weights, up, down, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for `hidden` would be as large as it is


def _autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    x, index, weights, up, down, hidden = ctx.saved_tensors
    grad_x, grad_weights, grad_up, grad_down = torch.ops.nemotron_super.moe_experts_backward(
        grad, x, index, weights, up, down, hidden
    )
    return grad_x, None, grad_weights, grad_up, grad_down


_experts_op.register_autograd(_autograd, setup_context=_setup_context)


def pairs_misfit(x: Tensor, index: Tensor, weights: Tensor) -> str | None:
    """Whether `index` or `weights` is not of the tokens of `x`, in words."""
    return misshapen(("index", index, (x.shape[0], *index.shape[1:])), ("weights", weights, index.shape))


def experts_misfit(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> str | None:
    """Which argument of `moe_experts` has not the shape that the others ask for, or None."""
    experts, inner, width = up.shape
    return pairs_misfit(x, index, weights) or misshapen(
        ("up", up, (experts, inner, x.shape[1])), ("down", down, (experts, width, inner))
    )


def moe_experts(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs.

    Args:
        x: (tokens, width).
        index: (tokens, top_k) int64, chosen experts.
        weights: (tokens, top_k) float32, their weights.
        up: (experts, intermediate, width).
        down: (experts, width, intermediate).

    Returns:
        (tokens, width) in the dtype of x; the sum over experts is taken in float32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    refuse(experts_misfit(x, index, weights, up, down))
    if as_operator():
        return _experts_op(x, index, weights, up, down)[0]
    if x.shape[0] <= _FEW and index.numel() * up[0].numel() <= _COPIED and x.device.type == "cpu":
        return _few_tokens(x, index, weights, up, down)
    return _many_tokens(x, index, weights, up, down, keep_hidden=False)[0]
