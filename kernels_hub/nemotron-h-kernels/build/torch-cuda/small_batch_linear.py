"""A linear map of 1 to 64 tokens: the weight is read once, as a stream, by enough programs to fill the GPU.

A program multiplies all tokens by a few rows of the weight. Where there are too few rows for the multiprocessors, the inner
dimension is split too: each part leaves its sums in float32, and a second kernel adds the parts in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import finish, finished, fits, two_terms
from ._launch import on
from ._operator import operator
from ._overlap import next_may_begin, overlap, prefetch, previous_done
from ._parts import add_parts, parts_of

MOST_TOKENS = 64
_ROWS, _INNER = 32, 128  # of the weight: a program's tile
_PROGRAMS = 528  # four for each multiprocessor of an H100


@triton.jit
def _stream_kernel(
    x,
    weight,
    bias,
    out,
    first,
    second,
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
    RELU2: tl.constexpr,
    TERMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    part = tl.program_id(1)
    t = tl.arange(0, T).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    t_in, r_in = t < tokens, r < rows
    total = tl.zeros([T, R], tl.float32)
    end = tl.minimum(inner, (part + 1) * per_part)
    early = tl.minimum(part * per_part + tl.arange(0, 8) * 64, inner - 1)
    prefetch(weight + tl.minimum(r, rows - 1)[:, None] * weight_stride + early[None, :], OVERLAP)
    previous_done(OVERLAP)
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
    next_may_begin(OVERLAP)
    if HAS_BIAS:
        total += tl.load(bias + r, mask=r_in, other=0.0).to(tl.float32)[None, :]
    at = t[:, None] * rows + r[None, :]
    inside = t_in[:, None] & r_in[None, :]
    total = finish(total, first, second, at, inside, RELU2, TERMS)
    tl.store(out + part.to(tl.int64) * tokens * rows + at, total.to(out.dtype.element_ty), mask=inside)


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu2: bool = False,
    plus: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(tokens, in) -> (tokens, out) in `dtype`, that of x if none is given; terms as `_epilogue.fits` them."""
    tokens, inner = x.shape
    rows = weight.shape[0]
    out = torch.empty(tokens, rows, dtype=dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = (v if v.stride(-1) == 1 else v.contiguous() for v in (x, weight))
    along = triton.cdiv(rows, _ROWS)
    parts = max(1, min(8, _PROGRAMS // along, inner // (4 * _INNER)))
    per_part = triton.cdiv(triton.cdiv(inner, parts), _INNER) * _INNER
    parts = triton.cdiv(inner, per_part)
    first, second = two_terms(plus, out)
    whole = parts == 1
    target = parts_of(out, parts)
    with on(x):
        _stream_kernel[(along, parts)](
            x,
            weight,
            weight if bias is None else bias,
            target,
            first,
            second,
            tokens,
            rows,
            inner,
            per_part,
            x.stride(0),
            weight.stride(0),
            max(16, triton.next_power_of_2(tokens)),
            _ROWS,
            _INNER,
            bias is not None and whole,
            x.dtype == torch.float32,
            relu2 and whole,
            len(plus) if whole else 0,
            num_warps=4,
            num_stages=4,
            **overlap(x),
        )
        add_parts(target, out, bias, relu2, plus)
    return out


@operator("small_batch_linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu2: bool, plus: list[Tensor]) -> Tensor:
    return few_rows(x, weight, bias, relu2, plus)


@_linear.register_fake
def _(x, weight, bias, relu2, plus):
    return x.new_empty(x.shape[0], weight.shape[0])


def small_batch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu2: bool = False, plus: tuple[Tensor, ...] = ()
) -> Tensor:
    """A linear map of a few tokens. Has no gradient.

    Args:
        x: (..., in), up to 64 rows in all, bfloat16 or float32.
        weight: (out, in), in the dtype of x.
        bias: (out,) or None.
        relu2: return relu(...)^2.
        plus: tensors like the result, added to it one after another, each sum rounded.

    Returns:
        (..., out) in the dtype of x; sums in float32, always in the same order.
    """
    rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    terms = [t.reshape(-1, weight.shape[0]) for t in plus] if fits(plus, x) else []
    out = _linear(rows, weight, bias, relu2, terms).view(shape)
    return out if terms else finished(out, False, plus)
