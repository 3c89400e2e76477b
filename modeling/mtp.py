"""Multi-token prediction: from the backbone's output, predict tokens further ahead through one small stack of layers.

    h_0 = backbone output after norm_f
    h_k = final_layernorm(layers(eh_proj([enorm(embed(token k ahead)), hnorm(h_{k-1})])))      logits_k = lm_head(h_k)

A checkpoint has few physical depths (Super: one); depth k uses physical depth (k - 1) mod their number. Tensors are
named as published, flat: `mtp.layers.{depth * layers_per_depth + inner}`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration.configuration_nemotron_h import NemotronHConfig
from .block import make_mixer, mix_residual
from .linear import NemotronHLinear
from .norms import NemotronHRMSNorm
from .token_layout import TokenLayout


class NemotronHMTPBlock(GradientCheckpointingLayer):
    """One layer of a depth: the first also merges the next token in, the last also normalises."""

    def __init__(self, config: NemotronHConfig, kind: str, inner: int, layer_idx: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.block_type = kind
        self.merges, self.ends = inner == 0, inner == len(config.mtp_layers_block_type) - 1
        if self.merges:
            self.enorm = NemotronHRMSNorm(width, eps)
            self.hnorm = NemotronHRMSNorm(width, eps)
            self.eh_proj = NemotronHLinear(2 * width, width, bias=False)
        self.norm = NemotronHRMSNorm(width, eps)
        self.mixer = make_mixer(config, kind, layer_idx)
        if self.ends:
            self.final_layernorm = NemotronHRMSNorm(width, eps)

    def forward(self, hidden_states: Tensor, next_embeds: Tensor, layout: TokenLayout, **kwargs) -> Tensor:
        if self.merges:
            hidden_states = self.eh_proj(torch.cat([self.enorm(next_embeds), self.hnorm(hidden_states)], dim=-1))
        hidden_states = mix_residual(self, hidden_states, layout, **kwargs)
        return self.final_layernorm(hidden_states) if self.ends else hidden_states


class NemotronHMTP(nn.Module):
    """All physical depths of the MTP head, flat."""

    # The backbone's plans are its configuration's; transformers collects these of a model's parts.
    _ep_plan = NemotronHConfig.base_model_ep_plan
    _tp_plan = {  # noqa: RUF012
        name: how for name, how in NemotronHConfig.base_model_tp_plan.items() if name.startswith("layers.")
    }
    _fsdp_plan = NemotronHConfig.base_model_fsdp_plan

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        kinds = config.mtp_layers_block_type
        self.physical_depths, self.layers_per_depth = config.num_nextn_predict_layers, len(kinds)
        self.layers = nn.ModuleList(
            NemotronHMTPBlock(config, kind, inner, layer_idx=config.num_hidden_layers + depth * len(kinds) + inner)
            for depth in range(self.physical_depths)
            for inner, kind in enumerate(kinds)
        )

    def forward(
        self, hidden_states: Tensor, inputs_embeds: Tensor, layout: TokenLayout, depths: int, **kwargs
    ) -> list[Tensor]:
        """Run `depths` depths over a whole sequence.

        Args:
            hidden_states: (batch, seq, hidden), the backbone's normalised output.
            inputs_embeds: (batch, seq, hidden), embeddings of the same positions.

        Returns:
            h_1 ... h_depths, each (batch, seq, hidden). Position t of h_k predicts token t + k + 1.
        """
        outputs = []
        for depth in range(depths):
            next_embeds = layout.ahead(inputs_embeds, depth + 1, fill=0.0)
            hidden_states = self.apply_depth(depth, hidden_states, next_embeds, layout, **kwargs)
            outputs.append(hidden_states)
        return outputs

    def apply_depth(
        self, depth: int, hidden_states: Tensor, next_embeds: Tensor, layout: TokenLayout, **kwargs
    ) -> Tensor:
        """One depth, counted from 0: (batch, seq, hidden) outputs of the depth before and embeddings of what follows."""
        first = depth % self.physical_depths * self.layers_per_depth
        for layer in self.layers[first : first + self.layers_per_depth]:
            hidden_states = layer(hidden_states, next_embeds, layout=layout, **kwargs)
        return hidden_states
