"""What is left to do with a product while it is still in registers: relu squared, or adding what the layer adds to it.

In a kernel each, these would take as long as a short product: a launch, and a way through memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def finish(total, first, second, at, inside, RELU2: tl.constexpr, TERMS: tl.constexpr):
    """relu(total)^2, or second[at] + (first[at] + total) with as many terms as there are; each sum rounded as its terms are."""
    if RELU2:
        total = tl.where(total < 0.0, 0.0, total)  # what is not a number stays so
        total = total * total
    if TERMS > 0:
        rounded = total.to(first.dtype.element_ty).to(tl.float32)
        total = tl.load(first + at, mask=inside, other=0.0).to(tl.float32) + rounded
    if TERMS > 1:
        rounded = total.to(second.dtype.element_ty).to(tl.float32)
        total = tl.load(second + at, mask=inside, other=0.0).to(tl.float32) + rounded
    return total


def two_terms(plus: Sequence[Tensor], out: Tensor) -> tuple[Tensor, Tensor]:
    """The terms as a kernel takes them, dense; what is not there is not looked at."""
    first, second, *_ = (*(t.contiguous() for t in plus), out, out)
    return first, second


def fits(plus: Sequence[Tensor], x: Tensor) -> bool:
    """Whether a kernel adds these: no more than two, of the dtype of the product."""
    return len(plus) <= 2 and all(t.dtype == x.dtype for t in plus)


def finished(out: Tensor, relu2: bool, plus: Sequence[Tensor]) -> Tensor:
    """The same of a product in memory."""
    out = F.relu(out).square() if relu2 else out
    for term in plus:
        out = term + out
    return out
