"""Attention of packed documents: each sees itself only, and no mask of the packed length squared is ever built."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 takes fewer key heads than query heads as they come, later versions where this says so.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass
class Documents:
    """Where documents lie in rows without padding, all rows end to end."""

    bounds: Tensor  # (documents + 1,) int32: where each begins, and the number of all tokens
    length: int  # of a row

    @classmethod
    def of(cls, seq_idx: Tensor) -> Documents:
        """From document ids (batch, seq); a row ends a document."""
        begins = torch.ones_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        starts = begins.flatten().nonzero().flatten().to(torch.int32)
        return cls(torch.cat([starts, starts.new_full((1,), seq_idx.numel())]), seq_idx.shape[1])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        """The same on another device."""
        return Documents(self.bounds.to(device, non_blocking=non_blocking), self.length)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(row, start, end) of each document."""
        bounds = self.bounds.tolist()
        rows = [(start // self.length, start, end) for start, end in itertools.pairwise(bounds)]
        return [(row, start - row * self.length, end - row * self.length) for row, start, end in rows]


def takes_variable_lengths(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's variable-length attention can: FlashAttention, on Ampere or later."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scaling: float,
    one: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """Causal attention within each document.

    Args:
        query: (batch, heads, seq, head_dim).
        key, value: (batch, kv_heads, seq, head_dim).
        scaling: what scores are multiplied by.
        one: attends within a single document, tensors as above, and gives (1, tokens, heads, head_dim); documents then go one after
            another. None for all of them at once, where `takes_variable_lengths`.

    Returns:
        (batch, seq, heads, head_dim).
    """
    batch, heads, length, head_dim = query.shape
    if one is None:
        flat = [t.transpose(1, 2).reshape(batch * length, -1, head_dim) for t in (query, key, value)]
        # Any bound on the lengths will do; the longest itself would have to come from the device.
        bounds = documents.bounds
        out = varlen_attn(
            *flat, bounds, bounds, length, length, scale=scaling, window_size=(-1, 0), **_GROUPED
        )  # fmt: skip
        return out.view(batch, length, heads, head_dim)
    found = query.new_empty(batch, length, heads, head_dim)
    for row, start, end in documents.spans:
        found[row, start:end] = one(*(t[row : row + 1, :, start:end] for t in (query, key, value)))[0]
    return found
