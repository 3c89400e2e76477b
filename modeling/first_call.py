"""The first call of `generate` or step of training on a GPU: gone through before it is made, so that its kernels are compiled all at once.

Without this the first token waits for some thirty kernels one after another, and the first gradient for twenty. With them in Triton's
cache on disk it costs the time of a short call, or of a step.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig

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

_STEP = "step"
_MANY_TOKENS = sys.maxsize  # as a step of training has

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
    if kind in known or not _can_be_gone_through(model, batch):
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
    with idle_caches_aside(model):
        _only_compile(
            model.device,
            lambda: model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=mine),
        )


def first_step_compiled_ahead(forward: Callable) -> Callable:
    """Decorator of a model's `forward`: its first step of training compiles the kernels of both directions before it is made.

    A step is not gone through where somebody would see it who does not know `real_calls_only`: hooks of modules or parameters, a
    cache that it fills, a compiler. Nor where weights are not plain tensors on one GPU (`why_not_recorded`), as FSDP's are.
    """

    @functools.wraps(forward)
    def wrapped(self, *args: Any, **kwargs: Any) -> Any:
        step = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if step and not any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            _compile_first_step(self, lambda: forward(self, *args, **kwargs))
        return forward(self, *args, **kwargs)

    return wrapped


def _compile_first_step(model: nn.Module, forward: Callable) -> None:
    known = _gone_through.setdefault(model, set())
    if _STEP in known:
        return
    known.add(_STEP)
    weights = list(model.parameters())
    learning = [weight for weight in weights if weight.requires_grad]
    if (
        not learning
        or not _can_be_gone_through(model, _MANY_TOKENS)
        or any(type(weight) is not nn.Parameter for weight in weights)
        or any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in learning)
        or any(_reentrant(module) for module in model.modules())
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return

    def step() -> None:
        output = forward()
        result = output.logits.sum() if output.loss is None else output.loss
        if result.requires_grad:
            with torch.autocast(model.device.type, enabled=False):  # which a step has left by then
                torch.autograd.grad(result, learning, allow_unused=True)

    # Gradients are computed by this thread: others would launch what they compile.
    with torch.autograd.set_multithreading_enabled(False):
        _only_compile(model.device, step)


def _can_be_gone_through(model: nn.Module, tokens: int) -> bool:
    return compile_ahead.available() and not _watched(model) and why_not_recorded(model, tokens) is None


def _only_compile(device: torch.device, call: Callable[[], object]) -> None:
    """Go through a call. Where there is no room for it beside the caller's tensors, kernels are compiled as they come."""
    try:
        with torch.random.fork_rng([device]), compile_ahead.compiling_ahead(device):
            call()
    except torch.OutOfMemoryError:
        pass


def _reentrant(module: nn.Module) -> bool:
    """Whether it is checkpointed in the way that knows `backward` alone."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    return bool(
        getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant")
    )


def real_calls_only(hook: Callable) -> Callable:
    """A module's forward hook as one that does not see calls that are only gone through."""

    @functools.wraps(hook)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return None if compile_ahead.active() else hook(*args, **kwargs)

    wrapped.real_calls_only = True
    return wrapped


def _watched(model: nn.Module) -> bool:
    """Whether hooks would see a call that nobody made; those by which transformers lets embeddings have gradients may."""
    allowed = {handle.id for handle in getattr(model, "_require_grads_hooks", ())}
    for module in model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return True
        for number, hook in (*module._forward_hooks.items(), *module._forward_pre_hooks.items()):
            if not (number in allowed or getattr(hook, "real_calls_only", False)):
                return True
    return False
