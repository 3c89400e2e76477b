"""A linear map of 1 to 64 tokens: the weight is read once, as a stream, by enough programs to fill the GPU.

A program multiplies all tokens by a few rows of the weight. Where there are too few rows for the multiprocessors, the inner
dimension is split too: each part leaves its sums in float32, and a second kernel adds the parts in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import finish, finished, fits, two_terms
from ._launch import block, cdiv, dense, on
from ._operator import operator
from ._overlap import next_may_begin, overlap, prefetch, previous_done
from ._parts import add_parts, parts_of

MOST_TOKENS = 64
_ROWS, _INNER = 32, 128  # of the weight: a program's tile
# Where a row is this short, tiles of half the height make up for parts, and a launch is spared that would add them up.
_SHORT, _SHORT_TOKENS = 1024, 16
_PROGRAMS = 528  # four for each multiprocessor of an H100


class _Cut(NamedTuple):
    """How products of the same x are shared out among programs."""

    rows: int  # of a weight, that a program multiplies
    tiles: list[int]  # of each weight
    parts: int  # of the inner dimension
    length: int  # of a part

    @classmethod
    def of(cls, x: Tensor, weights: Sequence[Tensor]) -> _Cut:
        inner = x.shape[1]
        short = inner <= _SHORT and x.shape[0] <= _SHORT_TOKENS
        rows = _ROWS // 2 if short else _ROWS
        tiles = [cdiv(w.shape[0], rows) for w in weights]
        parts = 1 if short else max(1, min(8, _PROGRAMS // max(1, sum(tiles)), inner // (4 * _INNER)))
        length = cdiv(cdiv(inner, parts), _INNER) * _INNER
        return cls(rows, tiles, max(1, cdiv(inner, length)), length)


@triton.jit
def _stream_kernel(
    x,
    weight,
    second_weight,
    third_weight,
    bias,
    out,
    first,
    second,
    tokens,
    rows,
    second_rows,
    third_rows,
    inner,
    per_part,
    x_stride,
    weight_stride,
    WEIGHTS: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    RELU2: tl.constexpr,
    TERMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The outputs of WEIGHTS weights lie side by side; each has tiles of its own."""
    part, tile = tl.program_id(1), tl.program_id(0)
    width = rows + second_rows + third_rows
    column = 0
    if WEIGHTS > 1:
        own = tl.cdiv(rows, R)
        later = tile >= own
        if later:
            weight = second_weight
        tile -= tl.where(later, own, 0)
        column += tl.where(later, rows, 0)
        rows = tl.where(later, second_rows, rows)
    if WEIGHTS > 2:
        own = tl.cdiv(second_rows, R)
        last = later & (tile >= own)
        if last:
            weight = third_weight
        tile -= tl.where(last, own, 0)
        column += tl.where(last, second_rows, 0)
        rows = tl.where(last, third_rows, rows)
    t = tl.arange(0, T).to(tl.int64)
    r = tile.to(tl.int64) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    t_in, r_in = t < tokens, r < rows
    total = tl.zeros([T, R], tl.float32)
    end = tl.minimum(inner, (part + 1) * per_part)
    early = tl.minimum(part * per_part + tl.arange(0, 256 // R) * 64, inner - 1)
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
    at = t[:, None] * width + (column + r)[None, :]
    inside = t_in[:, None] & r_in[None, :]
    total = finish(total, first, second, at, inside, RELU2, TERMS)
    tl.store(out + part.to(tl.int64) * tokens * width + at, total.to(out.dtype.element_ty), mask=inside)


def _alike(weights: Sequence[Tensor]) -> list[Tensor]:
    """With dense rows, and several of them with rows as far apart."""
    return [dense(w) if len(weights) == 1 else w.contiguous() for w in weights]


def _stream(
    x: Tensor,
    weights: Sequence[Tensor],
    target: Tensor,
    cut: _Cut,
    bias: Tensor | None = None,
    relu2: bool = False,
    plus: Sequence[Tensor] = (),
) -> None:
    """x times each weight, side by side, into `target`: a part's sums each, or what follows them too if there is one part alone."""
    whole = cut.parts == 1
    weight, second, third, *_ = (*weights, weights[0], weights[0])
    count = len(weights)
    with on(x):
        _stream_kernel[(sum(cut.tiles), cut.parts)](
            x,
            weight,
            second,
            third,
            weight if bias is None else bias,
            target,
            *two_terms(plus, target),
            x.shape[0],
            weight.shape[0],
            second.shape[0] if count > 1 else 0,
            third.shape[0] if count > 2 else 0,
            x.shape[1],
            cut.length,
            x.stride(0),
            weight.stride(0),
            count,
            block(x.shape[0]),
            cut.rows,
            _INNER,
            bias is not None and whole,
            x.dtype == torch.float32,
            relu2 and whole,
            len(plus) if whole else 0,
            num_warps=4,
            num_stages=4,
            **overlap(x),
        )


def few_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    relu2: bool = False,
    plus: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(tokens, in) times up to three weights (out, in) -> (tokens, sum of out), in `dtype`, that of x if none is given.

    What follows a product is for a single weight; terms as `_epilogue.fits` them.
    """
    out = torch.empty(x.shape[0], sum(w.shape[0] for w in weights), dtype=dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weights = dense(x), _alike(weights)
    bias = None if bias is None else bias.contiguous()
    cut = _Cut.of(x, weights)
    target = parts_of(out, cut.parts)
    _stream(x, weights, target, cut, bias, relu2, plus)
    with on(x):
        add_parts(target, out, bias, relu2, plus)
    return out


def sums_of_few_rows(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """As `few_rows`, for a kernel that adds up itself: (parts, tokens, sum of out), float32."""
    x, weights = dense(x), _alike(weights)
    cut = _Cut.of(x, weights)
    sums = torch.empty(cut.parts, x.shape[0], sum(w.shape[0] for w in weights), dtype=torch.float32, device=x.device)
    _stream(x, weights, sums, cut)
    return sums


@operator("small_batch_linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu2: bool, plus: list[Tensor]) -> Tensor:
    return few_rows(x, [weight], bias, relu2, plus)


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


@operator("joint_linear")
def _joint(x: Tensor, weights: list[Tensor]) -> Tensor:
    return few_rows(x, weights)


@_joint.register_fake
def _(x, weights):
    return x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))


def joint_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """A few tokens times several weights, as one product. Has no gradient.

    Args:
        x: (..., in), up to 64 rows in all, bfloat16 or float32.
        weights: up to three, (out, in) each, in the dtype of x.

    Returns:
        (..., sum of out) in the dtype of x, the products side by side.
    """
    out = _joint(x.reshape(-1, x.shape[-1]), list(weights))
    return out.view(*x.shape[:-1], out.shape[-1])
