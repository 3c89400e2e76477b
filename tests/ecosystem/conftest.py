"""A random model of every layer type in 60 k parameters, and a byte-level tokenizer with a chat template."""

from __future__ import annotations

import pytest
import torch
from nemotron_super import NemotronHConfig, NemotronHForCausalLM, preset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_config(**overrides) -> NemotronHConfig:
    """One layer of each type, a latent mixture of experts and one physical MTP depth."""
    small = {
        "vocab_size": 272,
        "hidden_size": 32,
        "hybrid_override_pattern": "ME*-",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "moe_latent_size": 16,
        # Large enough for every layer, and for what a state remembers, to shape the logits.
        "initializer_range": 0.2,
        "rescale_prenorm_residual": False,
        "time_step_min": 0.1,
        "time_step_max": 1.0,
    }
    return preset("tiny", **{**small, **overrides})


def build_model(seed: int = 0, **overrides) -> NemotronHForCausalLM:
    """A random model, the same for the same seed, in evaluation mode."""
    torch.manual_seed(seed)
    return NemotronHForCausalLM(build_config(**overrides)).eval()


@pytest.fixture(scope="session")
def tiny_model():
    """`tiny_model(seed=0, **overrides)` builds a tiny model."""
    return build_model


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**overrides)` builds the configuration of a tiny model."""
    return build_config


@pytest.fixture
def model() -> NemotronHForCausalLM:
    """A tiny model in evaluation mode."""
    return build_model()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML."""
    vocab = list(SPECIAL_TOKENS) + sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({token: index for index, token in enumerate(vocab)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
    )
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 11) token ids without special ones."""
    return torch.randint(5, 261, (2, 11), generator=torch.Generator().manual_seed(1))
