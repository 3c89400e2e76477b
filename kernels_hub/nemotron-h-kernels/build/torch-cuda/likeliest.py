"""The likeliest class of each row of logits, written to where it is wanted.

A class and its logit make one integer: the logit's bits, as an integer of the same order, and behind them the class, the lower
the larger. The largest of these is the answer, in whatever order it is looked for. Short rows are looked through by one program
each, long ones by many, whose winners a second kernel compares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import block, cdiv, on, rows_of
from ._operator import operator
from ._overlap import next_may_begin, overlap, previous_done

_SHORT = 8192  # classes that one program looks through
_PART = 2048  # classes of a program where a row has more


@triton.jit
def _leave(best, out, row, inner, out_outer, out_inner):
    """Write the class of a row's best key to its place, of `inner` in each outer one."""
    place = out + (row // inner) * out_outer + (row % inner) * out_inner
    tl.store(place, (best & 0x7FFFFFFF) ^ 0x7FFFFFFF)


@triton.jit
def _part_kernel(
    logits,
    best,
    out,
    classes,
    inner,
    logits_row,
    out_outer,
    out_inner,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = part * SIZE + tl.arange(0, SIZE)
    # What lies behind the last class has an index behind those of all classes, so that it loses against any of them.
    value = tl.load(logits + row * logits_row + index, mask=index < classes, other=float("-inf")).to(tl.float32)
    value = tl.where(value == 0.0, 0.0, value)  # zeros of either sign are equal
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(value == value, bits, 0x7FFFFFFF)  # as for torch, nothing is larger than what is not a number
    largest = tl.max((bits.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64), 0)
    if WHOLE:
        _leave(largest, out, row, inner, out_outer, out_inner)
    else:
        tl.store(best + row * tl.num_programs(1) + part, largest)


@triton.jit
def _whole_kernel(best, out, parts, inner, out_outer, out_inner, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SIZE)
    largest = tl.max(tl.load(best + row * parts + part, mask=part < parts, other=-0x8000000000000000), 0)
    _leave(largest, out, row, inner, out_outer, out_inner)


@operator("likeliest", mutates_args=("out",))
def _likeliest(logits: Tensor, out: Tensor) -> None:
    classes = logits.shape[-1]
    if out.numel() == 0:
        return
    rows = rows_of(logits)
    wanted = out if out.dim() == 2 else out.reshape(1, -1) if out.dim() == 0 else out.unsqueeze(0)
    layout = wanted.shape[1], *wanted.stride()
    parts = 1 if classes <= _SHORT else cdiv(classes, _PART)
    size = block(classes, 64) if parts == 1 else _PART
    with on(logits):
        best = out if parts == 1 else torch.empty(out.numel(), parts, dtype=torch.int64, device=out.device)
        _part_kernel[(out.numel(), parts)](
            *(rows, best, out, classes, layout[0], rows.stride(0), *layout[1:], size, parts == 1),
            num_warps=max(1, min(8, size // 512)),
            **overlap(logits),
        )
        if parts > 1:
            _whole_kernel[(out.numel(),)](*(best, out, parts, *layout, block(parts)), num_warps=1, **overlap(logits))


@_likeliest.register_fake
def _(logits, out):
    return None


def likeliest(logits: Tensor, out: Tensor) -> Tensor:
    """The place of the largest logit of each row, the first of equal ones. Has no gradient.

    Args:
        logits: (rows, classes) or (batch, seq, classes), bfloat16 or float32, with at least one class. As for `torch.argmax`, what
            is not a number is larger than any number.
        out: the shape of logits without classes, int64, with any strides; written to.

    Returns:
        out.
    """
    _likeliest(logits, out)
    return out
