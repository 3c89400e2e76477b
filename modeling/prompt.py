"""What of a call's prompt a cache holds already, and whether the rest fits with what is to be written behind it."""

from __future__ import annotations

from torch import Tensor
from transformers import GenerationConfig

from .cache import HybridCache, refuse_ragged
from .static_cache import StaticHybridCache
from .token_layout import check_mask


def held_tokens(
    cache: HybridCache, config: GenerationConfig, ids: Tensor, mask: Tensor | None, embeds: Tensor | None
) -> int:
    """How many tokens of a call's prompt are in its cache: those at its beginning, or none where only new ones are given.

    As in transformers, a mask that is longer than the tokens says that these are the new ones.

    Raises:
        ValueError: there is no prompt, or the cache holds all of it, so that nothing is left to read; rows of different lengths; a
            mask of another length than the text.
    """
    refuse_ragged(cache)
    held, length = cache.get_seq_length(), ids.shape[1]
    if embeds is not None:
        length = embeds.shape[1]
    if length == 0:
        raise ValueError(
            "The prompt is empty: `input_ids` needs at least one token, such as the one that begins a text."
        )
    # A mask without padding is dropped by `generate`, which notes its length.
    covered = mask.shape[1] if mask is not None else getattr(config, "_mask_length", length)
    only_new = embeds is None and covered != length
    if mask is not None:
        check_mask(mask, ids.shape[0], held, length if only_new else length - held)
    if only_new:
        return 0
    if held >= length:
        raise ValueError(
            f"`cache` already holds {held} tokens, and the prompt has {length}: at least its last must be left to read. Give the "
            "whole text with something new behind it, or a cache that holds less."
        )
    return held


def check_room_for(cache: StaticHybridCache, prompt: int, new: int, spare: int = 0) -> None:
    """Refuse a prompt that does not fit, or that fits without what shall be written behind it.

    Raises:
        ValueError: naming all three sizes.
    """
    # The last token written is never read.
    if prompt + new - 1 + spare > cache.max_cache_len:
        behind = f" and a last step of {spare}" if spare else ""
        raise ValueError(
            f"A prompt of {prompt} tokens with {new} new ones{behind} does not fit into a `cache` of fixed size "
            f"{cache.max_cache_len}: give one with `max_cache_len={prompt + new - 1 + spare}`, ask for fewer tokens, or leave "
            "`cache` out."
        )
