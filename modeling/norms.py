"""The two norms: RMSNorm before every mixer, and the gated, grouped RMSNorm inside Mamba-2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels_hub.registry import gated_rms_norm, rms_norm


class NemotronHRMSNorm(nn.Module):
    """RMS normalisation over the last dimension, computed in float32, weight included.

    Names of attributes and arguments are those that kernels for `RMSNorm` expect; see `hub_functions.py`.
    """

    kernel_layer_name = "RMSNorm"

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class NemotronHGatedRMSNorm(nn.Module):
    """RMS normalisation of `y * silu(z)` in groups: gate first, then norm."""

    def __init__(self, width: int, group_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group_size, self.eps = group_size, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, self.weight, self.eps, self.group_size)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, group_size={self.group_size}, eps={self.eps}"
