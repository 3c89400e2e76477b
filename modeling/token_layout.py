"""What each position of a batch is: padding, or a token of which document. Worked out once per forward.

Attention, convolution, SSM state and MTP targets must agree on it, so they all read the same `TokenLayout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from ..configuration.configuration_nemotron_h import NemotronHConfig
from .cache import HybridCache
from .packed_attention import Documents, takes_variable_lengths

# Where a call behind a cached past needs no mask of its length times all keys, which at a million keys is larger than the keys.
_MASKLESS_PAST = {("cuda", torch.bfloat16), ("cuda", torch.float16)}

# Entries of the largest attention mask built for packed documents that cannot be attended all at once. Above it they are attended
# one after another, which needs no mask; below it one call with a mask is faster than many small ones.
_MASK_BUDGET = 1 << 26


@dataclass
class Padding:
    """Rows reordered so that real tokens come first, in order, and padding last.

    In that order a recurrence needs no special cases: an earlier call's state is followed directly by the row's own
    tokens, wherever the padding was, and the state after `lengths` tokens is the state to keep.
    """

    lengths: Tensor  # (batch,) int64: real tokens of each row in this call
    order: Tensor | None = None  # (batch, seq) int64: position read by each slot; None when seq is 1
    inverse: Tensor | None = None  # (batch, seq) int64: slot of each position

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Padding:
        """The same padding on another device."""
        return Padding(*(_moved(getattr(self, field.name), device, non_blocking) for field in fields(self)))

    @cached_property
    def before_tail(self) -> tuple[Padding | None, int]:
        """The padding of this call up to its last padded position in any row, and how many positions follow that one."""
        if self.inverse is None:
            return self, 0
        real = self.inverse < self.lengths.unsqueeze(1)
        tail = int(real.flip(1).long().cumprod(1).sum(1).min())
        return _find_padding(real[:, : real.shape[1] - tail]), tail

    def compact(self, t: Tensor) -> Tensor:
        """Reorder (batch, seq, ...) to real tokens first."""
        return t if self.order is None else t.gather(1, _expand(self.order, t))

    def restore(self, t: Tensor) -> Tensor:
        """Undo `compact`."""
        return t if self.inverse is None else t.gather(1, _expand(self.inverse, t))


def _moved(value, device: torch.device | str, non_blocking: bool):
    return value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value


def _expand(index: Tensor, like: Tensor) -> Tensor:
    return index.view(*index.shape, *(1,) * (like.dim() - 2)).expand(*index.shape, *like.shape[2:])


@dataclass
class SeenSlots:
    """What the queries of a fixed step see of the slots of a fixed-size cache: those up to their own, except for holes."""

    last: Tensor  # (batch, seq) int64: each query's own slot
    there: Tensor  # (batch, slots) bool: False where a prompt had padding

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SeenSlots:
        """The same on another device."""
        return SeenSlots(*(_moved(getattr(self, field.name), device, non_blocking) for field in fields(self)))


@dataclass
class TokenLayout:
    """Shared by all layers of one forward."""

    attention_mask: Tensor | None  # what transformers' attention functions take: 4-D, block mask, or None (causal)
    padding: Padding | None  # None when every position of every row is a token
    seq_idx: Tensor | None  # (batch, seq) document ids, or None when each row is one document
    documents: Documents | None  # to attend within each, without a mask
    seen_slots: SeenSlots | None = None  # in a fixed step only
    # whether this call's queries stand behind cached keys without any padding, and are attended to without a mask
    behind_past: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenLayout:
        """The same layout on another device; accelerate calls this where a model is spread over several."""
        return TokenLayout(*(_moved(getattr(self, field.name), device, non_blocking) for field in fields(self)))

    def compact_documents(self) -> Tensor | None:
        """`seq_idx` with real tokens first; padding joins the row's last document, so it ends no document."""
        if self.seq_idx is None or self.padding is None:
            return self.seq_idx
        lengths, ids = self.padding.lengths, self.padding.compact(self.seq_idx)
        last = ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
        slots = torch.arange(ids.shape[1], device=ids.device)
        return torch.where(slots < lengths.unsqueeze(1), ids, last)

    def ahead(self, t: Tensor, steps: int, fill: float) -> Tensor:
        """What (batch, seq, ...) holds `steps` tokens ahead in the same row and document; `fill` where nothing is."""
        compact = t if self.padding is None else self.padding.compact(t)
        beyond = self._beyond(steps, *t.shape[:2], t.device).view(*t.shape[:2], *(1,) * (t.dim() - 2))
        # Two passes over `t`, and two for its gradient.
        shifted = compact.roll(-steps, 1).masked_fill(beyond, fill)
        return shifted if self.padding is None else self.padding.restore(shifted)

    def _beyond(self, steps: int, batch: int, length: int, device: torch.device) -> Tensor:
        """(batch, seq) bool, real tokens first: whether what is `steps` ahead is no token of the same row and document."""
        lengths = length if self.padding is None else self.padding.lengths.unsqueeze(1)
        beyond = (torch.arange(steps, steps + length, device=device) >= lengths).expand(batch, length)
        ids = self.compact_documents()
        return beyond if ids is None else beyond | (ids.roll(-steps, 1) != ids)


def describe_tokens(
    config: NemotronHConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | Sequence[int] | None,
) -> TokenLayout:
    """Work out padding and documents from whatever the caller gave.

    Args:
        inputs_embeds: (batch, seq, hidden).
        attention_mask: (batch, past + seq) with 1 for tokens and 0 for padding; or 4-D; or the pair of masks that
            `create_masks_for_generate` makes for fixed-size caches.
        position_ids: (batch or 1, seq). Where they do not go up by one, a document begins.
        seq_idx: (batch or 1, seq) document ids. Takes precedence over `position_ids`.
        cu_seq_lens: (documents + 1,) cumulative lengths of the one row of a flattened batch.

    Raises:
        ValueError: a mask of the wrong shape, boundaries that do not add up, or packing on top of a filled cache.
    """
    batch, length = inputs_embeds.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    tracing = torch.compiler.is_compiling()

    causal_mask: Tensor | None = None
    token_mask: Tensor | None = None
    if isinstance(attention_mask, dict):
        causal_mask, token_mask = attention_mask.get("full_attention"), attention_mask.get("linear_attention")
    elif attention_mask is not None and attention_mask.dim() == 2:
        if not tracing and isinstance(past, int):
            check_mask(attention_mask, batch, past, length)
        token_mask = attention_mask[:, -length:]

    seq_idx = _document_ids(batch, length, position_ids, past, token_mask, seq_idx, cu_seq_lens, inputs_embeds.device)
    documents = None
    if seq_idx is not None:
        if isinstance(past, Tensor) or past > 0:
            raise ValueError(
                f"Packed documents cannot continue a cache that already holds {past} tokens: pass `cache=None`."
            )
        device = inputs_embeds.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else inputs_embeds.dtype
        maskless = takes_variable_lengths(device, dtype, config.head_dim) or batch * length * length > _MASK_BUDGET
        maskless = maskless and config._attn_implementation == "sdpa"
        # Flash attention takes no mask that could keep documents apart.
        flash = is_flash_attention_requested(config)
        if flash and (tracing or token_mask is not None):
            raise ValueError(
                f"Packed documents with {'torch.compile' if tracing else 'padding'} need "
                f"`attn_implementation='sdpa'`, not {config._attn_implementation!r}."
            )
        if (maskless and not tracing and token_mask is None) or flash:
            documents = Documents.of(seq_idx)
        elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            raise ValueError("Give either packed documents or a 4-D `attention_mask`, not both.")

    plain = (
        attention_mask is None
        and seq_idx is None
        and not tracing
        and isinstance(past, int)
        and config._attn_implementation == "sdpa"
    )
    behind_past = (
        plain and past > 0 and length > 1 and (inputs_embeds.device.type, inputs_embeds.dtype) in _MASKLESS_PAST
    )
    # Here transformers gives no mask either, after asking every layer of the cache what it is.
    at_the_start = plain and past == 0 and isinstance(cache, HybridCache | None) and getattr(config, "is_causal", True)
    unmasked = behind_past or at_the_start
    if not unmasked and causal_mask is None and documents is None and "full_attention" in _layer_kinds(config):
        causal_mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask if isinstance(attention_mask, Tensor) else token_mask,
            cache=cache,
            and_mask_function=None if seq_idx is None else _same_document(seq_idx),
        )

    padding = _find_padding(token_mask)
    return TokenLayout(causal_mask, padding, seq_idx, documents, behind_past=behind_past)


def check_mask(attention_mask: Tensor, batch: int, past: int, length: int) -> None:
    """Refuse a mask of two dimensions that is not (batch, past + length).

    Raises:
        ValueError: naming both shapes.
    """
    if attention_mask.dim() == 2 and attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, expected {(batch, past + length)}: one entry "
            f"for each of the {past} cached and {length} new positions of {batch} rows."
        )


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse ids that no embedding has, where looking costs no waiting.

    Raises:
        ValueError: naming one.
    """
    # On a GPU this would wait for the device; there the embedding kernel asserts.
    if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"`input_ids` holds {wrong}, outside the vocabulary of {vocab_size} tokens (0 to {vocab_size - 1})."
            )


def _layer_kinds(config: NemotronHConfig) -> set[str]:
    return {*config.layers_block_type, *(config.mtp_layers_block_type or ())}


def _same_document(seq_idx: Tensor):
    def same_document(batch_idx, head_idx, q_idx, kv_idx):
        return seq_idx[batch_idx, q_idx] == seq_idx[batch_idx, kv_idx]

    return same_document


def _document_ids(
    batch: int,
    length: int,
    position_ids: Tensor | None,
    past: int | Tensor,
    token_mask: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | Sequence[int] | None,
    device: torch.device,
) -> Tensor | None:
    tracing = torch.compiler.is_compiling()
    if seq_idx is not None:
        if seq_idx.dim() != 2 or seq_idx.shape[0] not in (1, batch) or seq_idx.shape[1] != length:
            raise ValueError(f"`seq_idx` has shape {tuple(seq_idx.shape)}, expected {(batch, length)}.")
        ids = seq_idx.to(device).expand(batch, -1)
    elif cu_seq_lens is not None:
        bounds = torch.as_tensor(cu_seq_lens, device=device)
        if not tracing:
            ends = bounds.tolist()
            if batch != 1 or not ends or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
                raise ValueError(
                    f"`cu_seq_lens_q` is {ends}: it must rise from 0 to the sequence length ({length}), and the batch "
                    f"must be one row (it has {batch})."
                )
        ids = torch.bucketize(torch.arange(length, device=device), bounds[1:].contiguous(), right=True).unsqueeze(0)
    elif position_ids is not None and position_ids.dim() == 2 and isinstance(past, int) and past == 0 and length > 1:
        begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if token_mask is not None:
            begins = begins & _restarts_after_padding(position_ids, token_mask)
        ids = torch.cat([begins.new_zeros(begins.shape[0], 1), begins], dim=1).cumsum(1).expand(batch, -1)
    else:
        return None
    if not tracing and bool((ids == ids[:, :1]).all()):
        return None
    return ids


def are_packed(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether (batch, seq) positions of a whole text tell of more than one document in a row."""
    if position_ids.dim() != 2:
        return False
    mask = attention_mask if attention_mask is not None and attention_mask.shape == position_ids.shape else None
    return _document_ids(*position_ids.shape, position_ids, 0, mask, None, None, position_ids.device) is not None


def _restarts_after_padding(position_ids: Tensor, token_mask: Tensor) -> Tensor:
    """(batch, seq - 1): whether a token that is no row's first may begin a document, given that its position jumps.

    Positions of padding say nothing. Next to another token every jump counts; behind padding only a step back does,
    for a jump forward may just have counted the padding.
    """
    real = token_mask != 0
    slots = torch.arange(token_mask.shape[1], device=token_mask.device)
    previous = torch.where(real, slots, -1).cummax(1).values[:, :-1]
    there = real[:, 1:] & (previous >= 0)
    positions = position_ids.expand(token_mask.shape[0], -1)
    back = positions[:, 1:] <= positions.gather(1, previous.clamp(min=0))
    return there & (real[:, :-1] | back)


def _find_padding(token_mask: Tensor | None) -> Padding | None:
    if token_mask is None:
        return None
    real = token_mask != 0
    # On a GPU a one-token step must not wait for the host just to find that there is nothing to do.
    worth_a_look = token_mask.device.type == "cpu" or token_mask.shape[1] > 1
    if worth_a_look and not torch.compiler.is_compiling() and bool(real.all()):
        return None
    lengths = real.sum(1)
    if token_mask.shape[1] == 1:
        return Padding(lengths)
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    return Padding(lengths, order, order.argsort(dim=1))
