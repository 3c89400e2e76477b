"""The first call of `generate` on a GPU: gone through once before it is made, so that its kernels are compiled all at once.

Without this the first token waits for some thirty kernels one after another. With them in Triton's cache on disk it costs the time of
a short call.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..kernels_hub import compile_ahead
from .cache import HybridCache
from .captured_decoding import idle_caches_aside
from .cuda_graphs import why_not_recorded
from .prompt import held_tokens
from .static_cache import StaticHybridCache

# Longer prompts launch the same kernels.
_LONGEST_PROMPT = 8192
_NEW_TOKENS = 3  # the prompt's, that of a step that nothing came before, and that of one that follows another
# What is left of a caller's configuration: how tokens are read, drafted and chosen.
_KEPT = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "use_mtp",
    "num_assistant_tokens",
    "assistant_confidence_threshold",
    "prefill_chunk_size",
    "cache_config",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
)

_gone_through: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()


def compile_first_call(model, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict) -> None:
    """Compile what a call of `generate` launches, if it is the first of its kind and no module has forward hooks.

    Args:
        input_ids: (batch, seq), of the call, as `config` and `model_kwargs`; its cache is left alone.
    """
    cache, embeds, mask = (model_kwargs.get(name) for name in ("cache", "inputs_embeds", "attention_mask"))
    static, batch = isinstance(cache, StaticHybridCache), input_ids.shape[0]
    kind = (batch, static, config.use_mtp, config.do_sample)
    known = _gone_through.setdefault(model, set())
    if kind in known or not compile_ahead.available() or _watched(model) or why_not_recorded(model, batch) is not None:
        return
    tokens = (input_ids if embeds is None else embeds).shape[1]
    if isinstance(cache, HybridCache):
        tokens -= held_tokens(cache, config, input_ids, mask, embeds)
    known.add(kind)
    mine = GenerationConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in _KEPT},
        cache_implementation="static" if static else config.cache_implementation,
        max_new_tokens=_NEW_TOKENS,
        pad_token_id=0,
    )
    ids = torch.zeros(batch, min(tokens, _LONGEST_PROMPT), dtype=torch.long, device=model.device)
    try:
        with (
            torch.random.fork_rng([model.device]),
            idle_caches_aside(model),
            compile_ahead.compiling_ahead(model.device),
        ):
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=mine)
    except torch.OutOfMemoryError:
        # Beside the caller's cache there is no room for another: kernels are compiled as they come.
        pass


def _watched(model: nn.Module) -> bool:
    """Whether hooks, such as those that count tokens of experts, would see a call that nobody made."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
