"""Grouped-query attention without position encoding, QK norm or bias, through transformers' attention interface."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration.configuration_nemotron_h import NemotronHConfig
from ..kernels_hub.registry import decode_attention
from .fp8_cache import cache_scales
from .linear import NemotronHLinear, product_of, products_of
from .packed_attention import attend_documents, takes_variable_lengths
from .token_layout import TokenLayout


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for `attn_implementation="eager"` and `output_attentions=True`.

    Args:
        query: (batch, heads, seq, head_dim); key, value: (batch, kv_heads, kv_seq, head_dim).
        attention_mask: additive, broadcastable to (batch, heads, seq, kv_seq).

    Returns:
        Output (batch, seq, heads, head_dim) and weights (batch, heads, seq, kv_seq).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class NemotronHAttention(nn.Module):
    """Causal grouped-query attention, scale `head_dim ** -0.5`. Input and output (batch, seq, hidden)."""

    is_causal = True  # read by transformers' attention functions

    def __init__(self, config: NemotronHConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        query_width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = NemotronHLinear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = NemotronHLinear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = NemotronHLinear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = NemotronHLinear(query_width, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        cache: Cache | None = None,
        residual: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """`residual`: (batch, seq, hidden), added to the output."""
        batch, length, _ = hidden_states.shape
        query, key, value = (
            projected.view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projected in products_of((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        )
        if cache is not None:
            cached = cache.update(key, value, self.layer_idx, **cache_scales(self.k_proj, self.v_proj))
            # Packed documents never look back into the cache: they begin where it does.
            key, value = (t if layout.documents is None else t[:, :, :length] for t in cached)

        if layout.seen_slots is not None:
            # Whatever `attn_implementation` reads whole calls.
            seen, scales = layout.seen_slots, cache.scales_of(self.layer_idx)
            out = decode_attention(query, key, value, seen.last, seen.there, self.scaling, *scales)
            return product_of(self.o_proj, out.reshape(batch, length, -1), plus=(residual,)), None
        if layout.behind_past:
            seen = causal_lower_right(length, key.shape[2])
            out = F.scaled_dot_product_attention(query, key, value, seen, scale=self.scaling, enable_gqa=True)
            return product_of(self.o_proj, out.transpose(1, 2).reshape(batch, length, -1), plus=(residual,)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        kwargs |= {"dropout": self.config.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        if layout.documents is None:
            out, weights = attend(self, query, key, value, layout.attention_mask, **kwargs)
        else:
            together = self.config._attn_implementation == "sdpa" and not kwargs["dropout"]
            together = together and takes_variable_lengths(query.device, query.dtype, self.head_dim)
            one = None if together else lambda *part: attend(self, *part, None, **kwargs)[0]
            out, weights = attend_documents(query, key, value, layout.documents, self.scaling, one), None
        return product_of(self.o_proj, out.reshape(batch, length, -1), plus=(residual,)), weights
