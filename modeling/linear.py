"""The linear maps of the model: `nn.Linear`, multiplied by what is fastest for the tensors at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels_hub.reference.linear import linear
from ..kernels_hub.registry import small_batch_linear

_FEW_TOKENS = 64  # as many as the registry's op is made for


class NemotronHLinear(nn.Linear):
    """`nn.Linear` in every respect but speed. Input (..., in), output (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        # A compiler would take the comparison as a promise about lengths to come.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.numel() > _FEW_TOKENS * self.in_features:
            return linear(x, self.weight, self.bias)
        return small_batch_linear(x, self.weight, self.bias)
