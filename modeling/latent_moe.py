"""The latent mixture of experts.

    y = fc2(sum over the chosen experts of w_e * down_e(relu(up_e(fc1(x)))^2)) + shared(x)

The router and the shared expert see the full width; routed experts work, and are summed, in the latent width. Without
`moe_latent_size` the two latent projections are absent.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from transformers.integrations import use_experts_implementation

from ..configuration.configuration_nemotron_h import NemotronHConfig
from ..kernels_hub.registry import moe_experts, route_few_tokens, router_logits, topk_routing
from .linear import NemotronHLinear, alone, bare_weight_of, few_tokens, product_of
from .mlp import NemotronHMLP, ReLUSquared
from .side_stream import beside


class NemotronHTopkRouter(nn.Module):
    """Sigmoid router with a correction bias that steers the choice but not the weights, in float32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.n_routed_experts
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob, self.routed_scaling_factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts for (tokens, hidden).

        Returns:
            Logits (tokens, experts), weights (tokens, top_k) and chosen experts (tokens, top_k); float32, float32, int64.
        """
        device = hidden_states.device.type
        # Where nothing has to be turned off, the context would take the host longer than the kernel takes the GPU.
        autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            logits = router_logits(hidden_states, self.weight)
        weights, index = topk_routing(logits, self.e_score_correction_bias, *self._choice)
        return logits, weights, index

    def with_narrowing(self, hidden_states: Tensor, narrowing: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward` for a few tokens, together with x times a weight (width, hidden), or x itself, in the place of logits."""
        args = hidden_states, self.weight, self.e_score_correction_bias, narrowing
        _, weights, index, narrow = route_few_tokens(*args, *self._choice)
        return narrow, weights, index

    @property
    def _choice(self) -> tuple:
        scaling = self.norm_topk_prob, self.routed_scaling_factor
        return self.top_k, *scaling, self.n_group, self.topk_group

    def _apply(self, fn, recurse: bool = True):
        # `model.bfloat16()` must not reach the bias: it moves by steps of 0.001, which vanish in lower precision.
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype.itemsize < before.dtype.itemsize:
            self.e_score_correction_bias = after.to(before.dtype) if before.is_meta else before.to(after.device)
        return self


@use_experts_implementation(has_gate=False)
class NemotronHExperts(nn.Module):
    """All routed experts of a layer, each tensor stacked over experts.

    `up_proj` (experts, intermediate, width) and `down_proj` (experts, width, intermediate), where width is the latent
    width, or the hidden size without one. Checkpoints store one tensor per expert; see `published_names.py`.
    """

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        width = config.moe_latent_size or config.hidden_size
        self.num_experts = config.n_routed_experts
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, config.moe_intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, config.moe_intermediate_size))
        self.act_fn = ReLUSquared()
        if config.mlp_hidden_act != "relu2":
            raise ValueError(f"`mlp_hidden_act` is {config.mlp_hidden_act!r}: routed experts know 'relu2' only.")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if getattr(self, "_is_expert_parallel", False):
            # transformers marks a choice of another rank's expert by the index behind the last, with weight 0.
            top_k_index = top_k_index.clamp(max=self.num_experts - 1)
        # Under autocast the tokens come in the lower precision and the weights do not.
        up, down = self.up_proj.to(hidden_states.dtype), self.down_proj.to(hidden_states.dtype)
        return moe_experts(hidden_states, top_k_index, top_k_weights, up, down)


class NemotronHMoE(nn.Module):
    """Router, routed experts in the latent width, and the shared expert. Input and output (..., hidden)."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.gate = NemotronHTopkRouter(config)
        self.experts = NemotronHExperts(config)
        self.shared_experts = NemotronHMLP(config, config.moe_shared_expert_intermediate_size)
        if config.moe_latent_size is None:
            self.fc1_latent_proj, self.fc2_latent_proj = nn.Identity(), nn.Identity()
        else:
            self.fc1_latent_proj = NemotronHLinear(config.hidden_size, config.moe_latent_size, bias=config.mlp_bias)
            self.fc2_latent_proj = NemotronHLinear(config.moe_latent_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual`: as the input, added to the output."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        residual = residual if residual is None else residual.reshape(tokens.shape)
        # Long work first: behind it, or beside it, the many short kernels of the router are launched in time.
        shared = beside(self.shared_experts, tokens)
        routed = self.experts(*self._route(tokens))
        out = product_of(self.fc2_latent_proj, routed, plus=(shared(), residual), overwrite=self._shared_unseen())
        return out.view_as(hidden_states)

    def _shared_unseen(self) -> bool:
        """Whether nobody else can have kept what the shared expert gives: no hook, no adapter."""
        return alone(self.shared_experts, "forward") and bare_weight_of(self.shared_experts.down_proj) is not None

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the experts take: narrow tokens (tokens, latent), chosen experts and their weights (tokens, top_k)."""
        plain = alone(self.gate, "with_narrowing") and not torch.is_autocast_enabled(tokens.device.type)
        if not plain or not few_tokens(tokens):
            _, weights, index = self.gate(tokens)
            return self.fc1_latent_proj(tokens), index, weights
        weight = bare_weight_of(self.fc1_latent_proj)
        narrow, weights, index = self.gate.with_narrowing(tokens, weight)
        return narrow if weight is not None else self.fc1_latent_proj(tokens), index, weights
