"""The published family, and a tiny model for tests and laptops, as data.

Sources: the published `config.json` files of each checkpoint. `preset("super")` is exact down to the tensor
inventory; nothing here downloads anything.
"""

from __future__ import annotations

from typing import Any

from .configuration_nemotron_h import NemotronHConfig

_COMMON: dict[str, Any] = {
    "vocab_size": 131072,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "max_position_embeddings": 262144,
    "moe_shared_expert_overlap": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_NANO: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32,
    "mamba_num_heads": 64,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "intermediate_size": 1856,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
}

PRESETS: dict[str, dict[str, Any]] = {
    "super": {
        **_COMMON,
        "hidden_size": 4096,
        "hybrid_override_pattern": (
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        "num_attention_heads": 32,
        "mamba_num_heads": 128,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "intermediate_size": 2688,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "routed_scaling_factor": 5.0,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    },
    "nano": _NANO,
    "lightning": {**_NANO, "num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"]},
    "ultra": {
        **_COMMON,
        "hidden_size": 8192,
        "hybrid_override_pattern": (
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        "num_attention_heads": 64,
        "mamba_num_heads": 256,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "intermediate_size": 5120,
        "moe_intermediate_size": 5120,
        "moe_shared_expert_intermediate_size": 10240,
        "moe_latent_size": 2048,
        "routed_scaling_factor": 5.0,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    },
    # Every layer type in 17 M parameters; the model of `model_card/nemotron-h-tiny`.
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "hybrid_override_pattern": "MEM-MEM*EMEM*EME",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 16,
        "mamba_head_dim": 32,
        "ssm_state_size": 64,
        "n_groups": 4,
        "conv_kernel": 4,
        "chunk_size": 64,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "intermediate_size": 512,
        "moe_intermediate_size": 144,
        "moe_shared_expert_intermediate_size": 288,
        "moe_latent_size": 96,
        "moe_shared_expert_overlap": False,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
        "max_position_embeddings": 8192,
    },
}


def preset(name: str, **overrides: Any) -> NemotronHConfig:
    """Build the configuration of a family member: `super`, `nano`, `lightning`, `ultra` or `tiny`.

    Args:
        name: key of `PRESETS`.
        overrides: fields of `NemotronHConfig` that replace the preset's.

    Raises:
        ValueError: an unknown name, or overrides that cannot work together.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}. Choose one of: {', '.join(PRESETS)}.")
    return NemotronHConfig(**{**PRESETS[name], **overrides})
