"""One residual block: `x + mixer(norm(x))`, whatever the mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration.configuration_nemotron_h import NemotronHConfig
from .attention import NemotronHAttention
from .latent_moe import NemotronHMoE
from .mamba2 import NemotronHMamba2Mixer
from .mlp import NemotronHMLP
from .norms import NemotronHRMSNorm
from .token_layout import TokenLayout

# Tokens per pass through a position-wise mixer without gradients; bounds the memory of a long prefill.
_TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}


def make_mixer(config: NemotronHConfig, kind: str, layer_idx: int) -> nn.Module:
    """Build the mixer of a layer of type `kind` (a canonical layer name)."""
    if kind == "linear_attention":
        return NemotronHMamba2Mixer(config, layer_idx)
    if kind == "full_attention":
        return NemotronHAttention(config, layer_idx)
    if kind == "moe":
        return NemotronHMoE(config)
    return NemotronHMLP(config, config.intermediate_size)


class NemotronHBlock(GradientCheckpointingLayer):
    """Pre-norm residual block. Input and output (batch, seq, hidden).

    Args:
        kind: canonical layer name: `linear_attention`, `full_attention`, `moe` or `mlp`.
        layer_idx: position in the backbone, which is also the layer's place in the cache.
    """

    def __init__(self, config: NemotronHConfig, kind: str, layer_idx: int):
        super().__init__()
        self.block_type = kind
        self.norm = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = make_mixer(config, kind, layer_idx)

    def forward(self, hidden_states: Tensor, layout: TokenLayout, cache: Cache | None = None, **kwargs) -> Tensor:
        return mix_residual(self, hidden_states, layout, cache, **kwargs)


def mix_residual(
    block: nn.Module, hidden_states: Tensor, layout: TokenLayout, cache: Cache | None = None, **kwargs
) -> Tensor:
    """`hidden_states + block.mixer(block.norm(hidden_states))`, for any module with `block_type`, `norm` and `mixer`.

    The mixer adds: of few tokens, its last product does so before it is written.
    """
    if block.block_type in ("moe", "mlp"):
        tokens = hidden_states.shape[0] * hidden_states.shape[1]
        most = _TOKENS_PER_PASS.get(hidden_states.device.type, _TOKENS_PER_PASS["cuda"])
        if tokens > most and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            flat = hidden_states.reshape(tokens, -1)
            out = torch.empty_like(flat)
            for start in range(0, tokens, most):
                part = flat[start : start + most]
                torch.add(part, block.mixer(_normed(block, part)), out=out[start : start + most])
            return out.view_as(hidden_states)
        return block.mixer(_normed(block, hidden_states), residual=hidden_states)
    normed = _normed(block, hidden_states)
    # By its name, under which accelerate's hooks of devices leave it where it is.
    if block.block_type == "linear_attention":
        return block.mixer(normed, layout, cache=cache, residual=hidden_states)
    return block.mixer(normed, layout, cache=cache, residual=hidden_states, **kwargs)[0]


def _normed(block: nn.Module, hidden_states: Tensor) -> Tensor:
    # With `residual_in_fp32` the stream is float32 while mixers work in the dtype of the weights.
    return block.norm(hidden_states.to(block.norm.weight.dtype))
