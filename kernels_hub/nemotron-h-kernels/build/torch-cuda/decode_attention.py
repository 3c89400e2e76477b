"""Attention of a few queries to the slots of a fixed-size cache: keys and values are read once, by enough programs to fill the GPU.

The slots are shared out among programs, each of which takes all query heads of a group in one product with their keys. It
leaves its softmax-weighted mean of the values and the logarithm of its weights' sum; a second kernel weighs the means against each
other, in a fixed order. How many programs there are follows from shapes alone, so that a CUDA graph holds them; how many slots each
takes follows from how many are filled, on the device, so that a large cache costs no more than what is in it.

FP8 is read as pairs of numbers that are next to each other in a head: so the loads of tensor cores, which know words of 16 bits, turn
values around on their way, and the even and the odd places of a head make a product each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, cdiv, dense, gpu, on, power_of_2
from ._operator import operator
from ._overlap import next_may_begin, overlap, previous_done

_PROGRAMS = 2  # for each multiprocessor
_MOST_SPLITS = 512  # which the second kernel takes at once
_LOG2_E = 1.4426950408889634


@triton.jit
def _share(last, batch, seq, slots, splits, T: tl.constexpr, N: tl.constexpr):
    """Of one batch row: blocks of N slots that its newest query sees, how many a program takes, and how many programs take any."""
    t = tl.arange(0, T)
    newest = tl.max(tl.load(last + batch * seq + t, mask=t < seq, other=-1), 0)
    filled = tl.minimum(tl.maximum(newest + 1, 0), slots).to(tl.int32)
    blocks = tl.cdiv(filled, N)
    each = tl.maximum(tl.cdiv(blocks, splits), 1)
    return blocks, each, tl.cdiv(blocks, each)


@triton.jit
def _pairs(words):
    """FP8 numbers that lie in pairs: those in front and those behind, in float16, which holds them exactly."""
    front, behind = (words & 255).to(tl.uint8), ((words >> 8) & 255).to(tl.uint8)
    return front.to(tl.float8e4nv, bitcast=True).to(tl.float16), behind.to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit(do_not_specialize=["slots", "splits"])
def _attend_kernel(
    query,
    key,
    value,
    last,
    there,
    k_scale,
    v_scale,
    out,
    weight,
    scaling,
    seq,
    kv_heads,
    groups,
    slots,
    splits,
    query_batch,
    query_head,
    query_seq,
    key_batch,
    key_head,
    key_slot,
    value_batch,
    value_head,
    value_slot,
    there_batch,
    WIDTH: tl.constexpr,
    HOLES: tl.constexpr,
    SCALES: tl.constexpr,
    PAIRS: tl.constexpr,
    EXACT: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    previous_done(OVERLAP)
    split = tl.program_id(0)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    blocks, each, used = _share(last, batch, seq, slots, splits, T, N)
    if (split >= used) & (splits > 1):
        return
    r = tl.program_id(1) // kv_heads * R + tl.arange(0, R)
    r_in = r < groups * seq
    head, t = kv_head * groups + r // seq, (r % seq).to(tl.int64)
    d = tl.arange(0, D)
    d_in = d < WIDTH
    n = tl.arange(0, N).to(tl.int64)
    q = tl.load(
        query + batch * query_batch + (head * query_head + t * query_seq)[:, None] + d[None, :],
        mask=r_in[:, None] & d_in[None, :],
        other=0.0,
    )
    newest = tl.load(last + batch * seq + t, mask=r_in, other=-1)
    factor = tl.full([R], scaling, tl.float32)
    if SCALES:
        factor *= tl.load(k_scale)
    if PAIRS:
        # In float16, where queries are rounded less than they were if their largest is 1, whatever their size.
        q = q.to(tl.float32)
        peak = tl.max(tl.abs(q), 1)
        peak = tl.where(peak == 0.0, 1.0, peak)
        q_even, q_odd = tl.split(tl.reshape((q / peak[:, None]).to(tl.float16), [R, D // 2, 2]))
        factor *= peak
        key_d = tl.arange(0, D // 2)
        d_in_key = key_d < WIDTH // 2
        mean_odd = tl.zeros([R, D // 2], tl.float32)
        mean = mean_odd
    else:
        key_d, d_in_key = d, d_in
        mean = tl.zeros([R, D], tl.float32)
    # Weights of up to 2^14 fit into float16, and so the small ones of as many slots as there can be still count.
    LIFT: tl.constexpr = 14 if PAIRS else 0
    keys = key + batch * key_batch + kv_head * key_head + key_d[None, :]
    values = value + batch * value_batch + kv_head * value_head + key_d[None, :]
    most = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    for step in range(split * each, tl.minimum((split + 1) * each, blocks)):
        slot = step * N + n
        inside = (slot < slots)[:, None] & d_in_key[None, :]
        k = tl.load(keys + slot[:, None] * key_slot, mask=inside, other=0.0)
        v = tl.load(values + slot[:, None] * value_slot, mask=inside, other=0.0)
        seen = slot[None, :] <= newest[:, None]
        if HOLES:
            full = tl.load(there + batch * there_batch + slot, mask=slot < slots, other=0)
            seen = seen & (full != 0)[None, :]
        else:
            seen = seen & (slot < slots)[None, :]
        if PAIRS:
            k_even, k_odd = _pairs(k)
            score = tl.dot(q_odd, tl.trans(k_odd), tl.dot(q_even, tl.trans(k_even)))
        elif EXACT:
            score = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            score = tl.dot(q, tl.trans(k))
        score = tl.where(seen, score * factor[:, None], float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        # A row that has seen nothing yet has nothing to subtract, and weights of exactly zero.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(score - shift[:, None] + LIFT)
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(p, 1)
        mean *= fade[:, None]
        if PAIRS:
            v_even, v_odd = _pairs(v)
            mean = tl.dot(p.to(tl.float16), v_even, mean)
            mean_odd = tl.dot(p.to(tl.float16), v_odd, mean_odd * fade[:, None])
        elif EXACT:
            mean = tl.dot(p, v.to(tl.float32), mean, input_precision="ieee")
        else:
            mean = tl.dot(p.to(v.dtype), v, mean)
        most = higher
    next_may_begin(OVERLAP)
    if PAIRS:
        mean = tl.reshape(tl.join(mean, mean_odd), [R, D])
    if SCALES:
        mean *= tl.load(v_scale)
    total = tl.where(total == 0.0, 1.0, total)
    mean = mean / total[:, None]
    row = ((batch * seq + t) * (kv_heads * groups) + head) * splits + split
    tl.store(
        out + row[:, None] * WIDTH + d[None, :], mean.to(out.dtype.element_ty), mask=r_in[:, None] & d_in[None, :]
    )
    if splits > 1:
        tl.store(weight + row, most + tl.log2(total), mask=r_in)


@triton.jit(do_not_specialize=["slots", "splits"])
def _combine_kernel(
    means,
    weight,
    last,
    out,
    seq,
    heads,
    slots,
    splits,
    WIDTH: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    _, _, used = _share(last, row // (seq * heads), seq, slots, splits, T, N)
    s = tl.arange(0, S)
    d = tl.program_id(1) * D + tl.arange(0, D)
    s_in, d_in = s < used, d < WIDTH
    w = tl.load(weight + row * splits + s, mask=s_in, other=float("-inf"))
    most = tl.max(w, 0)
    w = tl.exp2(w - tl.where(most == float("-inf"), 0.0, most))
    mean = tl.load(
        means + (row * splits + s)[:, None] * WIDTH + d[None, :], mask=s_in[:, None] & d_in[None, :], other=0.0
    )
    total = tl.sum(w, 0)
    sums = tl.sum(mean * w[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * WIDTH + d, sums.to(out.dtype.element_ty), mask=d_in)


def _tiles(rows: int, width: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Of a program: query rows, slots at a time, warps, and loads under way."""
    if dtype == torch.float32:
        return 16, 16, 8, 1
    wide = width > 128
    R = min(block(rows), 64 if wide else 128)
    return R, (64 if R <= 32 else 32) // (1 + wide), 4 if R * width <= 8192 else 8, 3


def _splits(others: int, blocks: int, device: torch.device) -> int:
    """Programs that share the slots of a batch row and key head, of which there are `others`."""
    return max(1, min(blocks, _MOST_SPLITS, cdiv(_PROGRAMS * gpu(device)[0], others)))


@operator("decode_attention")
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    last: Tensor,
    there: Tensor | None,
    scaling: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    batch, heads, seq, width = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    out = torch.empty(batch, seq, heads, width, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    pairs = k_scale is not None and query.dtype != torch.float32
    if pairs:
        key, value = key.view(torch.int16), value.view(torch.int16)
    query, last = dense(query), last.contiguous()
    groups = heads // kv_heads
    rows = groups * seq
    R, N, warps, stages = _tiles(rows, width, query.dtype)
    row_blocks = cdiv(rows, R)
    splits = _splits(batch * kv_heads * row_blocks, cdiv(slots, N), query.device)
    means, weight = out, out
    if splits > 1:
        means = torch.empty(*out.shape[:3], splits, width, dtype=torch.float32, device=query.device)
        weight = torch.empty(means.shape[:-1], dtype=torch.float32, device=query.device)
    T = power_of_2(seq)
    with on(query):
        _attend_kernel[(splits, kv_heads * row_blocks, batch)](
            query,
            key,
            value,
            last,
            last if there is None else there.view(torch.uint8),
            last if k_scale is None else k_scale,
            last if v_scale is None else v_scale,
            means,
            weight,
            scaling * _LOG2_E,
            seq,
            kv_heads,
            groups,
            slots,
            splits,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            0 if there is None else there.stride(0),
            width,
            there is not None,
            k_scale is not None,
            pairs,
            query.dtype == torch.float32,
            T,
            R,
            N,
            block(width, 32 if pairs else 16),
            num_warps=warps,
            num_stages=stages,
            **overlap(query),
        )
        if splits > 1:
            S = power_of_2(splits)
            D = min(block(width), max(16, 4096 // S))
            _combine_kernel[(batch * seq * heads, cdiv(width, D))](
                means, weight, last, out, seq, heads, slots, splits, width, T, N, S, D, num_warps=4, **overlap(query)
            )
    return out


@_attend.register_fake
def _(query, key, value, last, there, scaling, k_scale, v_scale):
    batch, heads, seq, width = query.shape
    return query.new_empty(batch, seq, heads, width)


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
    """Attention of a few queries to the slots of a fixed-size cache. Has no gradient, and builds no mask.

    Args:
        query: (batch, heads, seq, head_dim), bfloat16 or float32.
        key, value: (batch, kv_heads, slots, head_dim), dense in the last dimension; in the dtype of query, or float8_e4m3fn, which
            needs compute capability 8.9. What lies in slots that nobody sees has to be finite.
        last: (batch, seq) int64, the slot of each query itself; it sees those up to it.
        there: (batch, slots) bool, dense in the last dimension, False where nobody shall look; or None.
        scaling: of the products of queries and keys.
        k_scale, v_scale: () float32, for float8_e4m3fn: what the stored numbers are multiplied by.

    Returns:
        (batch, seq, heads, head_dim), contiguous, in the dtype of query; zeros for a query that sees nothing. The same arguments give the
        same bits.
    """
    return _attend(query, key, value, last, there, scaling, k_scale, v_scale)
