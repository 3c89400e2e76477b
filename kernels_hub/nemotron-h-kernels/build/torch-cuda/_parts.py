"""Products of few rows whose long sums are cut: each part is left in float32, and they are added up in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import finish, two_terms
from ._launch import cdiv
from ._overlap import next_may_begin, overlap, previous_done

_SIZE = 256  # sums of a program


@triton.jit
def _add_parts_kernel(
    parts,
    bias,
    out,
    first,
    second,
    count,
    rows,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU2: tl.constexpr,
    TERMS: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    next_may_begin(OVERLAP)
    previous_done(OVERLAP)
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < count
    total = tl.zeros([SIZE], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * count + i, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + i % rows, mask=inside, other=0.0).to(tl.float32)
    total = finish(total, first, second, i, inside, RELU2, TERMS)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


def parts_of(out: Tensor, count: int) -> Tensor:
    """Where programs write: the output itself, or what `add_parts` adds up to it."""
    return out if count == 1 else torch.empty(count, *out.shape, dtype=torch.float32, device=out.device)


def add_parts(
    parts: Tensor, out: Tensor, bias: Tensor | None = None, relu2: bool = False, plus: Sequence[Tensor] = ()
) -> None:
    """Add up what `parts_of` gave, if that is not the output (..., rows) itself; `bias` (rows,), the rest as in `_epilogue.py`."""
    if parts is not out:
        _add_parts_kernel[(cdiv(out.numel(), _SIZE),)](
            parts,
            out if bias is None else bias,
            out,
            *two_terms(plus, out),
            out.numel(),
            out.shape[-1],
            parts.shape[0],
            bias is not None,
            relu2,
            len(plus),
            _SIZE,
            num_warps=1,
            **overlap(out),
        )
