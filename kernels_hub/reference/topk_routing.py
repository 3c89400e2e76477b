"""The router in plain torch: logits, sigmoid scores, a bias that steers the choice alone, the top-k, their weights.

logits = x W^T;  s = sigmoid(logits);  chosen = top-k of s + bias;  w = scale * s / (sum over the chosen of s + 1e-20)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import own_precision
from .linear import linear


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (tokens, hidden) times weight (experts, hidden), transposed, in float32: (tokens, experts)."""
    with own_precision(x):
        return linear(x.float(), weight.float())


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
        n_group, topk_group: choose among the `topk_group` of `n_group` groups whose two best experts score highest.

    Returns:
        weights (tokens, top_k) in the dtype of logits and experts (tokens, top_k) int64, in no particular order.
    """
    scores = logits.sigmoid()
    choice = scores.detach() + bias
    if n_group > 1:
        choice = _keep_best_groups(choice, n_group, topk_group)
    index = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, index)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, index


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
    logits_of: Callable[..., Tensor] = router_logits,
    choose: Callable[..., tuple[Tensor, Tensor]] = topk_routing,
    multiply: Callable[..., Tensor] = linear,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Router and narrowing of a few tokens.

    Args:
        x: (tokens, hidden).
        weight: (experts, hidden), the router's.
        bias, top_k, normalise, scale, n_group, topk_group: as in `topk_routing`.
        narrowing: (width, hidden), what makes of tokens what their experts see; or None.

    Returns:
        Logits (tokens, experts) float32; weights and experts as `topk_routing` gives them for these; and x times the transpose of
        `narrowing`, (tokens, width), or x itself.
    """
    logits = logits_of(x, weight)
    weights, index = choose(logits, bias, top_k, normalise, scale, n_group, topk_group)
    return logits, weights, index, x if narrowing is None else multiply(x, narrowing)


def _keep_best_groups(choice: Tensor, n_group: int, topk_group: int) -> Tensor:
    grouped = choice.unflatten(-1, (n_group, -1))
    strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, strength.topk(topk_group).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
