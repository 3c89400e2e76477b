"""Attention of a few queries to the slots of a fixed-size cache, in plain torch. Nothing here depends on what the host knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import dequantize_fp8


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    last: Tensor,
    there: Tensor | None,
    scaling: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Softmax attention; each query sees the slots up to its own, except for holes.

    The query heads of a group are rows of one product with their keys, which are never repeated.

    Args:
        query: (batch, heads, seq, head_dim).
        key, value: (batch, kv_heads, slots, head_dim), in the dtype of query, or float8_e4m3fn. What lies in slots that
            nobody sees has to be finite.
        last: (batch, seq) int64, the slot of each query itself.
        there: (batch, slots) bool, False where nobody shall look; or None.
        scaling: of the products of queries and keys.
        k_scale, v_scale: () float32, where key and value are float8_e4m3fn: what the stored numbers are multiplied by.

    Returns:
        (batch, seq, heads, head_dim) in the dtype of query; zeros for a query that sees nothing.
    """
    batch, heads, length, width = query.shape
    if k_scale is not None and v_scale is not None:
        key, value = dequantize_fp8(key, k_scale, query.dtype), dequantize_fp8(value, v_scale, query.dtype)
    seen = torch.arange(key.shape[2], device=key.device) <= last.unsqueeze(-1)
    if there is not None:
        seen = seen & there.unsqueeze(1)
    groups = heads // key.shape[1]
    mask = seen.repeat(1, groups, 1).unsqueeze(1)  # (batch, 1, groups * seq, slots)
    rows = query.reshape(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
    # Not `view`: the order of the output's strides is that of the kernel that was chosen.
    return out.reshape(batch, heads, length, width).transpose(1, 2)
