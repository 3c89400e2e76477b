"""A linear map of a few tokens, whose time is that of reading the weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def small_batch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (tokens, in) times weight (out, in) transposed, plus bias (out,): (tokens, out) in the dtype of x."""
    return F.linear(x, weight, bias)
