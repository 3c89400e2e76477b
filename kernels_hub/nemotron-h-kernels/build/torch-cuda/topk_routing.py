"""The router's choice: sigmoid, correction bias, the top-k of it, normalised and scaled weights; one program a token.

    s = sigmoid(logits);  chosen = top-k of s + bias;  w = scale * s / (sum over the chosen of s + 1e-20)

All in float32. The gradient reaches the logits through the weights alone: the choice has none.

Few tokens are multiplied by the router and by what narrows them for their experts in one stream of weights, whose parts the
kernel that chooses adds up: its first program a token chooses, the others finish the narrow token.

Logits of bfloat16 inputs come from the tensor cores: products of bfloat16 numbers are exact in float32, where they are
summed and where the result stays. In the backward the float32 gradient enters as the sum of two bfloat16 numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, cdiv, on
from ._operator import operator
from ._overlap import next_may_begin, overlap, previous_done
from .small_batch_linear import MOST_TOKENS, few_rows, sums_of_few_rows

_COLUMNS = 256  # of a narrow token, that a program finishes


@triton.jit
def _added(sums, distance, inside, PARTS: tl.constexpr):
    """What lies at `sums` in each part, `distance` apart."""
    total = tl.load(sums, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(sums + part * distance, mask=inside, other=0.0)
    return total


@triton.jit
def _route_kernel(
    sums,
    bias,
    weights,
    index,
    logits,
    narrow,
    experts,
    width,
    distance,
    scale,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    NORMALISE: tl.constexpr,
    PARTS: tl.constexpr,
    KEEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A token's row of `sums`: `experts` logits, which are kept where KEEP says so, and `width` columns for `narrow`."""
    row = tl.program_id(0).to(tl.int64)
    sums += row * (experts + width)
    distance = tl.cast(distance, tl.int64)
    e = tl.arange(0, E)
    slot = tl.arange(0, SLOTS)
    inside = e < experts
    steered = tl.load(bias + e, mask=inside, other=0.0)
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    if tl.program_id(1) > 0:
        column = (tl.program_id(1) - 1) * COLUMNS + tl.arange(0, COLUMNS)
        total = _added(sums + experts + column, distance, column < width, PARTS)
        tl.store(narrow + row * width + column, total.to(narrow.dtype.element_ty), mask=column < width)
        return
    logit = _added(sums + e, distance, inside, PARTS)
    if KEEP:
        tl.store(logits + row * experts + e, logit, mask=inside)
    choice = tl.sigmoid(logit) + steered
    # What is not a number ranks below every number and above the padding, so that an index is always valid.
    choice = tl.where(choice == choice, choice, -3.0e38)
    choice = tl.where(inside, choice, float("-inf"))
    # One bitonic selection of keys that hold both: the choice's bits, as integers of the same order, and behind them the
    # expert, the lower the larger. Taking the largest away one after another would wait for a reduction each time.
    bits = choice.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    best = tl.topk((bits.to(tl.int64) << 32) | (E - 1 - e).to(tl.int64), SLOTS)
    chosen = E - 1 - (best & (E - 1)).to(tl.int32)
    used = slot < TOP_K
    kept = tl.sigmoid(_added(sums + chosen, distance, used, PARTS))
    if NORMALISE:
        kept = kept / (tl.sum(tl.where(used, kept, 0.0), 0) + 1e-20)
    tl.store(weights + row * TOP_K + slot, kept * scale, mask=used)
    tl.store(index + row * TOP_K + slot, chosen.to(tl.int64), mask=used)


@triton.jit
def _backward_kernel(
    grad,
    logits,
    index,
    grad_logits,
    experts,
    scale,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    E: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    slot = tl.arange(0, SLOTS)
    used = slot < TOP_K
    chosen = tl.load(index + row * TOP_K + slot, mask=used, other=-1)
    g = tl.load(grad + row * TOP_K + slot, mask=used, other=0.0) * scale
    score = tl.sigmoid(tl.load(logits + row * experts + chosen, mask=used, other=0.0))
    score = tl.where(used, score, 0.0)
    if NORMALISE:
        total = tl.sum(score, 0) + 1e-20
        g = (g - tl.sum(g * score, 0) / total) / total
    g = g * score * (1.0 - score)
    out = tl.sum(tl.where(chosen[:, None] == e[None, :], g[:, None], 0.0), 0)
    tl.store(grad_logits + row * experts + e, out, mask=e < experts)


def _chosen(
    sums: Tensor, bias: Tensor, top_k: int, normalise: bool, scale: float, logits: Tensor | None, narrow: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and experts from `sums` (parts, tokens, experts + width); fills `logits` and `narrow` (tokens, width) where given."""
    parts, tokens, row = sums.shape
    width = 0 if narrow is None else narrow.shape[1]
    experts = row - width
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=sums.device)
    index = torch.empty((tokens, top_k), dtype=torch.int64, device=sums.device)
    size = block(experts, 2)
    if tokens:
        with on(sums):
            _route_kernel[(tokens, 1 + cdiv(width, _COLUMNS))](
                sums,
                bias.contiguous(),
                weights,
                index,
                sums if logits is None else logits,
                sums if narrow is None else narrow,
                experts,
                width,
                tokens * row,
                scale,
                top_k,
                block(top_k, 2),
                size,
                normalise,
                parts,
                logits is not None,
                _COLUMNS,
                # Few tokens want it soon, many want few instructions in all.
                num_warps=min(32, max(1, size // 512) if tokens > 64 else max(4, size // 128)),
                **overlap(sums),
            )
    return weights, index


@operator("topk_routing")
def _route(logits: Tensor, bias: Tensor, top_k: int, normalise: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _chosen(logits.contiguous().unsqueeze(0), bias, top_k, normalise, scale, None, None)


@_route.register_fake
def _(logits, bias, top_k, normalise, scale):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@operator("topk_routing_backward")
def _route_backward(grad: Tensor, logits: Tensor, index: Tensor, normalise: bool, scale: float) -> Tensor:
    tokens, experts = logits.shape
    top_k = index.shape[1]
    logits = logits.contiguous()
    grad_logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if tokens:
        with on(logits):
            _backward_kernel[(tokens,)](
                grad.contiguous(),
                logits,
                index,
                grad_logits,
                experts,
                scale,
                top_k,
                block(top_k, 1),
                block(experts, 1),
                normalise,
                num_warps=4,
            )
    return grad_logits


@_route_backward.register_fake
def _(grad, logits, index, normalise, scale):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output) -> None:
    logits, _, _, ctx.normalise, ctx.scale = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_weights, _):
    if grad_weights is None:
        return (None,) * 5
    logits, index = ctx.saved_tensors
    grad = _route_backward(grad_weights, logits, index, ctx.normalise, ctx.scale)
    return grad, None, None, None, None


_route.register_autograd(_autograd, setup_context=_setup_context)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bfloat16 matrices, summed and returned in float32."""
    return torch.mm(a, b, out_dtype=torch.float32)


def _split_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of a float32 and a bfloat16 matrix in float32, to 17 bits of a."""
    high = a.to(b.dtype)
    total = _product(high, b)
    return torch.addmm(total, (a - high).to(b.dtype), b, out_dtype=total.dtype, out=total)


@operator("router_logits")
def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return few_rows(x, [weight], dtype=torch.float32) if x.shape[0] <= MOST_TOKENS else _product(x, weight.t())


@_logits.register_fake
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


@operator("router_logits_backward")
def _logits_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _split_product(grad, weight).to(x.dtype), _split_product(grad.t(), x).to(weight.dtype)


@_logits_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _logits_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _logits_autograd(ctx, grad):
    return _logits_backward(grad, *ctx.saved_tensors)


_logits.register_autograd(_logits_autograd, setup_context=_logits_setup)


@operator("route_few_tokens")
def _route_few(
    x: Tensor, weight: Tensor, bias: Tensor, narrowing: Tensor | None, top_k: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    narrow = x.new_empty((x.shape[0], 0 if narrowing is None else narrowing.shape[0]))
    sums = sums_of_few_rows(x, [weight] if narrowing is None else [weight, narrowing])
    weights, index = _chosen(sums, bias, top_k, normalise, scale, logits, narrow)
    return logits, weights, index, narrow


@_route_few.register_fake
def _(x, weight, bias, narrowing, top_k, normalise, scale):
    logits = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    weights = logits.new_empty((x.shape[0], top_k))
    narrow = x.new_empty((x.shape[0], 0 if narrowing is None else narrowing.shape[0]))
    return logits, weights, torch.empty_like(weights, dtype=torch.int64), narrow


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (tokens, hidden) times weight (experts, hidden), transposed, in float32: (tokens, experts)."""
    if x.dtype == torch.float32:
        return F.linear(x, weight)
    return _logits(x, weight)


def topk_routing(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    normalise: bool = True,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them.

    Args:
        logits: (tokens, experts), float32.
        bias: (experts,), float32; steers the choice, not the weights.
        top_k: experts a token.
        normalise: divide a token's weights by their sum.
        scale: factor on every weight.
        n_group, topk_group: only 1 is served here.

    Returns:
        weights (tokens, top_k) float32 and experts (tokens, top_k) int64, best first.
    """
    return _route(logits, bias, top_k, normalise, scale)


def route_few_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    narrowing: Tensor | None,
    top_k: int,
    normalise: bool = True,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Router and narrowing of up to 64 tokens. Has no gradient.

    Args:
        x: (tokens, hidden), bfloat16 or float32.
        weight: (experts, hidden), the router's, in the dtype of x.
        bias, top_k, normalise, scale, n_group, topk_group: as in `topk_routing`.
        narrowing: (width, hidden) in the dtype of x, what makes of tokens what their experts see; or None.

    Returns:
        Logits (tokens, experts) float32; weights and experts as `topk_routing` gives them for these; and x times the transpose of
        `narrowing`, (tokens, width), or x itself.
    """
    *found, narrow = _route_few(x, weight, bias, narrowing, top_k, normalise, scale)
    return *found, x if narrowing is None else narrow
