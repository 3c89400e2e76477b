"""The linear maps of the model: `nn.Linear`, multiplied by what is fastest for the tensors at hand."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels_hub.reference.linear import linear


class NemotronHLinear(nn.Linear):
    """`nn.Linear` in every respect but speed. Input (..., in), output (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
