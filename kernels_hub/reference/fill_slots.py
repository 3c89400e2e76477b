"""New keys and values into their slots of a fixed-size cache, in the dtype it keeps them in."""

from __future__ import annotations

import torch
from torch import Tensor

from .fp8 import quantize_fp8


def fill_slots(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    index: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write new keys and values into slots, in place.

    Args:
        keys, values: (batch, kv_heads, slots, head_dim), in the dtype of the new ones; with scales float8_e4m3fn.
        new_keys, new_values: (batch, kv_heads, tokens, head_dim).
        index: (batch, tokens) int64, a slot of its own for each token of a row.
        k_scale, v_scale: () float32, positive, as `quantize_fp8` takes them; or None.
    """
    for stored, new, scale in ((keys, new_keys, k_scale), (values, new_values, v_scale)):
        if scale is not None:
            # As bytes: not every device can scatter FP8.
            stored, new = stored.view(torch.uint8), quantize_fp8(new, scale).view(torch.uint8)
        stored.scatter_(2, index[:, None, :, None].expand_as(new), new)
