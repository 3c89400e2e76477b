"""A linear map of 1 to 64 tokens: the weight is read once, as a stream, by enough programs to fill the GPU.

A program multiplies all tokens by a few rows of the weight. Where there are too few rows for the multiprocessors, the inner
dimension is split too: each part leaves its sums in float32, and a second kernel adds the parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on
from ._operator import operator

MOST_TOKENS = 64
_ROWS, _INNER = 32, 128  # of the weight: a program's tile
_PROGRAMS = 528  # four for each multiprocessor of an H100


@triton.jit
def _stream_kernel(
    x,
    weight,
    bias,
    out,
    tokens,
    rows,
    inner,
    per_part,
    x_stride,
    weight_stride,
    T: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
):
    part = tl.program_id(1)
    t = tl.arange(0, T).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    t_in, r_in = t < tokens, r < rows
    total = tl.zeros([T, R], tl.float32)
    end = tl.minimum(inner, (part + 1) * per_part)
    for start in range(part * per_part, end, K):
        inside = start + k < end
        w = tl.load(
            weight + r[:, None] * weight_stride + (start + k)[None, :],
            mask=r_in[:, None] & inside[None, :],
            other=0.0,
        )
        token = tl.load(
            x + t[:, None] * x_stride + (start + k)[None, :], mask=t_in[:, None] & inside[None, :], other=0.0
        )
        if EXACT:
            total = tl.dot(token, tl.trans(w), total, input_precision="ieee")
        else:
            total = tl.dot(token, tl.trans(w), total)
    if HAS_BIAS:
        total += tl.load(bias + r, mask=r_in, other=0.0).to(tl.float32)[None, :]
    place = out + (part * tokens + t)[:, None] * rows + r[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=t_in[:, None] & r_in[None, :])


@triton.jit
def _add_parts_kernel(parts, bias, out, count, rows, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < count
    total = tl.zeros([SIZE], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * count + i, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + i % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


@operator("small_batch_linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    tokens, inner = x.shape
    rows = weight.shape[0]
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = (v if v.stride(-1) == 1 else v.contiguous() for v in (x, weight))
    along = triton.cdiv(rows, _ROWS)
    parts = max(1, min(8, _PROGRAMS // along, inner // (4 * _INNER)))
    per_part = triton.cdiv(triton.cdiv(inner, parts), _INNER) * _INNER
    parts = triton.cdiv(inner, per_part)
    target = out if parts == 1 else torch.empty(parts, tokens, rows, dtype=torch.float32, device=x.device)
    with on(x):
        _stream_kernel[(along, parts)](
            x,
            weight,
            weight if bias is None else bias,
            target,
            tokens,
            rows,
            inner,
            per_part,
            x.stride(0),
            weight.stride(0),
            max(16, triton.next_power_of_2(tokens)),
            _ROWS,
            _INNER,
            bias is not None and parts == 1,
            x.dtype == torch.float32,
            num_warps=4,
            num_stages=4,
        )
        if parts > 1:
            count = tokens * rows
            _add_parts_kernel[(triton.cdiv(count, 1024),)](
                target, weight if bias is None else bias, out, count, rows, parts, bias is not None, 1024, num_warps=4
            )
    return out


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def small_batch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map of a few tokens. Has no gradient.

    Args:
        x: (..., in), up to 64 rows in all, bfloat16 or float32.
        weight: (out, in), in the dtype of x.
        bias: (out,) or None.

    Returns:
        (..., out) in the dtype of x; sums in float32, always in the same order.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
