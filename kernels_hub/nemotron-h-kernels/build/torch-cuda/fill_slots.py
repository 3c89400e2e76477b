"""New keys and values into their slots of a fixed-size cache, packed to FP8 on their way where it keeps that: one launch for both."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, dense, on
from ._operator import operator
from ._overlap import next_may_begin, overlap, previous_done

_SIZE = 256  # numbers of a token, that a program moves


@triton.jit
def _packed(new, scale, SCALED: tl.constexpr):
    """As stored: with a scale the quotient, rounded to the dtype it comes from, cut to the range of e4m3 and rounded to that."""
    if SCALED:
        quotient = tl.div_rn(new.to(tl.float32), tl.load(scale)).to(new.dtype).to(tl.float32)
        # What is not a number stays so.
        quotient = tl.where(quotient > 448.0, 448.0, tl.where(quotient < -448.0, -448.0, quotient))
        new = quotient.to(tl.float8e4nv)
    return new


@triton.jit
def _fill_kernel(
    keys,
    values,
    new_keys,
    new_values,
    index,
    k_scale,
    v_scale,
    tokens,
    heads,
    keys_batch,
    keys_head,
    keys_slot,
    values_batch,
    values_head,
    values_slot,
    new_keys_batch,
    new_keys_head,
    new_keys_seq,
    new_values_batch,
    new_values_head,
    new_values_seq,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    place = tl.program_id(0)
    batch, token = (place // tokens).to(tl.int64), (place % tokens).to(tl.int64)
    i = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    head, d = (i // WIDTH).to(tl.int64), i % WIDTH
    inside = head < heads
    slot = tl.load(index + place)
    key = tl.load(
        new_keys + batch * new_keys_batch + head * new_keys_head + token * new_keys_seq + d, mask=inside, other=0.0
    )
    value = tl.load(
        new_values + batch * new_values_batch + head * new_values_head + token * new_values_seq + d,
        mask=inside,
        other=0.0,
    )
    key, value = _packed(key, k_scale, SCALED), _packed(value, v_scale, SCALED)
    tl.store(keys + batch * keys_batch + head * keys_head + slot * keys_slot + d, key, mask=inside)
    tl.store(values + batch * values_batch + head * values_head + slot * values_slot + d, value, mask=inside)


@operator("fill_slots", mutates_args=("keys", "values"))
def _fill(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    index: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    batch, heads, tokens, width = new_keys.shape
    if new_keys.numel() == 0:
        return
    new_keys, new_values, index = dense(new_keys), dense(new_values), index.contiguous()
    with on(keys):
        _fill_kernel[(batch * tokens, cdiv(heads * width, _SIZE))](
            keys,
            values,
            new_keys,
            new_values,
            index,
            index if k_scale is None else k_scale,
            index if v_scale is None else v_scale,
            tokens,
            heads,
            *keys.stride()[:3],
            *values.stride()[:3],
            *new_keys.stride()[:3],
            *new_values.stride()[:3],
            width,
            k_scale is not None,
            _SIZE,
            num_warps=2,
            **overlap(keys),
        )


@_fill.register_fake
def _(keys, values, new_keys, new_values, index, k_scale, v_scale):
    return None


def fill_slots(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    index: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write new keys and values into slots, in place. Has no gradient.

    Args:
        keys, values: (batch, kv_heads, slots, head_dim), dense in the last dimension, in the dtype of the new ones; with scales
            float8_e4m3fn, which needs compute capability 8.9.
        new_keys, new_values: (batch, kv_heads, tokens, head_dim), bfloat16 or float32.
        index: (batch, tokens) int64, a slot of its own for each token of a row.
        k_scale, v_scale: () float32, positive: what stored numbers are to be multiplied by; or None. Numbers are rounded to the nearest,
            and those out of range become the last in it.
    """
    _fill(keys, values, new_keys, new_values, index, k_scale, v_scale)
