"""Routed experts with frozen quantised weights: down(relu(up(x))^2), weighted and summed over the chosen experts.

One expert after another, and only those that some token chose: decoding one token dequantises its top-k experts. Never more
than one expert exists in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import refuse
from .moe_experts import pairs_misfit
from .quantized_linear import fp8_linear, nvfp4_linear, simulate_fp8, simulate_nvfp4

# Pairs A, B of stacked factors: see `experts_with_low_rank`.
LowRank = Sequence[tuple[Tensor, Tensor]]


def _experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    input_scales: tuple[Tensor, Tensor] | None,
    linear: Callable[..., Tensor],
    simulate: Callable[[Tensor, Tensor], Tensor],
    low_rank: Mapping[str, LowRank] = MappingProxyType({}),
) -> Tensor:
    refuse(pairs_misfit(x, index, weights))
    tokens, top_k = index.shape
    if tokens == 0:
        return x
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=up[0].shape[0]).tolist()
    # On a CPU in float32: oneDNN builds a kernel for every new shape in lower precision.
    work = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    rows = x[order // top_k].to(work).split(counts)
    # Cut up once: the gradient of a stack that is indexed anew for every expert would be as large as the stack, each time.
    terms = {name: [(a.unbind(), b.unbind()) for a, b in pairs] for name, pairs in low_rank.items()}

    def project(block: Tensor, expert: int, stored: Sequence[Tensor], scale: Tensor | None, name: str) -> Tensor:
        rounded = block if scale is None else simulate(block, scale[expert])
        out = linear(rounded, *(tensor[expert] for tensor in stored))
        for a, b in terms.get(name, ()):
            out = out + F.linear(F.linear(block, a[expert].to(block.dtype)), b[expert].to(block.dtype)).to(out.dtype)
        return out

    outputs = []
    up_scale, down_scale = (None, None) if input_scales is None else input_scales
    for expert, block in enumerate(rows):
        if block.shape[0]:
            hidden = project(block, expert, up, up_scale, "up_proj").relu().square()
            outputs.append(project(hidden, expert, down, down_scale, "down_proj"))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    y = torch.cat(outputs)[inverse].view(tokens, top_k, -1)
    return torch.bmm(weights.unsqueeze(1), y.to(weights.dtype)).squeeze(1).to(x.dtype)


def nvfp4_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: tuple[Tensor, Tensor, Tensor],
    down: tuple[Tensor, Tensor, Tensor],
    input_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs, weights in NVFP4; differentiable in `x` and `weights`.

    Args:
        x: (tokens, width).
        index: (tokens, top_k) int64, chosen experts; weights: (tokens, top_k) float32.
        up: codes (experts, intermediate, width / 2) uint8, block scales (experts, intermediate, width / 16)
            float8_e4m3fn, global scales (experts,) float32.
        down: the same for (experts, width, intermediate).
        input_scales: (experts,) float32 for up and for down; given, both inputs are rounded to NVFP4 with them.

    Returns:
        (tokens, width) in the dtype of x; the sum over experts is taken in float32.
    """
    return _experts(x, index, weights, up, down, input_scales, nvfp4_linear, simulate_nvfp4)


def fp8_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    input_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `nvfp4_experts` with weights (and simulated inputs) in FP8: float8_e4m3fn and (experts,) float32 scales."""
    return _experts(x, index, weights, up, down, input_scales, fp8_linear, simulate_fp8)


def experts_with_low_rank(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    input_scales: tuple[Tensor, Tensor] | None,
    low_rank: Mapping[str, LowRank],
    linear: Callable[..., Tensor],
    simulate: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """As `nvfp4_experts` in any format, each expert's matrices W with terms of low rank: W + the sum of B A.

    The terms are taken on the tokens, so that nothing as large as the experts is built; they see inputs that are not rounded.

    Args:
        low_rank: for "up_proj" and "down_proj", as far as they have any: pairs of A (experts, rank, in) and B (experts, out,
            rank). Differentiable in them.
        linear: (x, *stored of one expert) -> x @ W^T.
        simulate: (x, scale) -> x rounded; used where `input_scales` are given.
    """
    return _experts(x, index, weights, up, down, input_scales, linear, simulate, low_rank)
