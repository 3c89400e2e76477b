"""How many floating-point operations a training step needs, counted from the configuration, for utilisation in the logs.

Counted are multiplications of the model's mathematics, two operations each: every matrix a token meets (of routed experts,
the chosen ones), the attended pairs, the recurrent form of the Mamba-2 scan. Recomputation is not work done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..configuration.configuration_nemotron_h import NemotronHConfig


def multiplications(config: NemotronHConfig, mtp: bool = True) -> tuple[int, int]:
    """Multiplications of one forward: per token, and per pair of tokens of which one attends to the other.

    Args:
        mtp: with the MTP depths, as in training.
    """
    width = config.hidden_size
    latent = config.moe_latent_size or width
    inner = config.mamba_num_heads * config.mamba_head_dim
    conv = inner + 2 * config.n_groups * config.ssm_state_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = 2 * width * latent if config.moe_latent_size else 0
    per_token = {
        "linear_attention": width * (inner + conv + config.mamba_num_heads)
        + conv * config.conv_kernel
        + 2 * inner * config.ssm_state_size
        + inner * width,
        "full_attention": 2 * width * (queries + keys),
        "moe": width * config.n_routed_experts
        + projections
        + 2 * config.num_experts_per_tok * latent * config.moe_intermediate_size
        + 2 * width * config.moe_shared_expert_intermediate_size,
        "mlp": 2 * width * config.intermediate_size,
    }
    head = width * config.vocab_size
    layers = list(config.layers_block_type)
    tokens = head
    if mtp and config.num_nextn_predict_layers:
        layers += config.mtp_layers_block_type * config.mtp_num_depths
        tokens += config.mtp_num_depths * (2 * width * width + head)
    tokens += sum(per_token[kind] for kind in layers)
    return tokens, 2 * queries * layers.count("full_attention")


def attended_pairs(seq_idx: Tensor | None, rows: int, length: int) -> int:
    """Pairs (query, key) of causal attention in a batch: n (n + 1) / 2 for each document of n tokens.

    Args:
        seq_idx: (rows, length) document ids that do not come back within a row, or None if every row is one document.
    """
    if seq_idx is None:
        return rows * length * (length + 1) // 2
    ids = seq_idx.to(torch.int64)
    ids = ids - ids.min() + torch.arange(rows, device=ids.device).unsqueeze(1) * (ids.max() - ids.min() + 1)
    counts = torch.bincount(ids.flatten())
    return int((counts * (counts + 1) // 2).sum())
