"""The non-gated MLP, `down(act(up(x)))`: a layer of its own in older models, and the shared expert of the MoE."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..configuration.configuration_nemotron_h import NemotronHConfig
from ..kernels_hub.registry import relu_squared
from .linear import NemotronHLinear, product_of


class ReLUSquared(nn.Module):
    """The activation `relu2`, in one kernel where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_squared(x)


class NemotronHMLP(nn.Module):
    """Two linear maps with `config.mlp_hidden_act` (relu squared) between them. Input and output (..., hidden)."""

    def __init__(self, config: NemotronHConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = NemotronHLinear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = NemotronHLinear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ReLUSquared() if config.mlp_hidden_act == "relu2" else ACT2FN[config.mlp_hidden_act]

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual`: as the input, added to the output."""
        if isinstance(self.act_fn, ReLUSquared):
            active = product_of(self.up_proj, hidden_states, relu2=True)
        else:
            active = self.act_fn(self.up_proj(hidden_states))
        return product_of(self.down_proj, active, plus=(residual,))
