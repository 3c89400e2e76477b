"""Keys and values kept in FP8: half the bytes of BF16, one scale for all keys of a layer and one for all its values.

A checkpoint of ModelOpt with an FP8 cache carries these scales as `k_proj.k_scale` and `v_proj.v_scale`; the attention layer
hands them to the cache with its keys and values. What attention sees is what was stored, also of the tokens of the same call:
the result does not depend on how a text is cut into calls, and is that of `simulate_activations`, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from ..kernels_hub.reference.fp8 import dequantize_fp8, quantize_fp8

logger = logging.get_logger(__name__)

FP8 = torch.float8_e4m3fn


def refuse_gradients(key_states: Tensor, value_states: Tensor) -> None:
    """
    Raises:
        RuntimeError: gradients are wanted, which rounding to FP8 does not have.
    """
    if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
        raise RuntimeError(
            "An FP8 cache keeps no gradient: run the model under `torch.no_grad()`, or without a cache."
        )


@dataclass(frozen=True)
class Fp8Format:
    """How one layer's keys and values are stored: value = float8_e4m3fn * scale. Any cache may keep what `pack` gives.

    (Some CPU operations, `index_copy_` among them, do not know float8: view what is stored as uint8 for these.)

    Attributes:
        k_scale, v_scale: () float32, positive, on the device of the keys.
    """

    k_scale: Tensor
    v_scale: Tensor

    @classmethod
    def from_scales(cls, k_scale: Tensor | None, v_scale: Tensor | None, device: torch.device) -> Fp8Format:
        """With the scales that a layer has; 1 for those that it does not, which is said once."""
        if k_scale is None or v_scale is None:
            logger.warning_once(
                "An FP8 cache is in use in layers without `k_scale` and `v_scale`: keys and values are stored with a scale of 1. "
                "`calibrate(model, batches)` measures better ones for a quantised model."
            )

        def own(scale: Tensor | None) -> Tensor:  # in memory of its own, as a snapshot wants it
            one = torch.ones((), dtype=torch.float32, device=device)
            return one if scale is None else scale.detach().to(device, copy=True)

        return cls(own(k_scale), own(v_scale))

    def to(self, device: torch.device) -> Fp8Format:
        """The same on another device."""
        return Fp8Format(self.k_scale.to(device), self.v_scale.to(device))

    def pack(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As stored, float8_e4m3fn, of the same shapes; what lies beyond the range becomes its end."""
        return quantize_fp8(keys, self.k_scale), quantize_fp8(values, self.v_scale)

    def unpack(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As attention reads them, in `dtype`."""
        return dequantize_fp8(keys, self.k_scale, dtype), dequantize_fp8(values, self.v_scale, dtype)


def kv_dtype_of(cache_config: dict | None) -> torch.dtype:
    """What `cache_implementation="quantized"` means for this model, or "static" with a backend, from transformers' `cache_config`.

    Raises:
        ValueError: a backend other than "fp8" (which is also the default), or options, of which FP8 has none.
    """
    options = dict(cache_config or {})
    backend = options.pop("backend", "fp8")
    if backend != "fp8":
        raise ValueError(
            f"`cache_config` asks for the backend {backend!r}: keys and values of this model can be quantised to FP8 only. Give "
            "cache_config={'backend': 'fp8'}, or leave it out."
        )
    if options:
        raise ValueError(
            f"`cache_config` has {', '.join(options)}, but an FP8 cache has no options besides `backend`."
        )
    return FP8


class Fp8CacheLayer(DynamicLayer):
    """Keys and values of one attention layer in FP8, (batch, kv_heads, seq, head_dim), growing with the sequence.

    The scales are those of the first call; a layer that is calibrated again needs a new cache.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.format: Fp8Format | None = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all, dequantised to the dtype of the new ones.

        Args:
            key_states, value_states: (batch, kv_heads, new, head_dim).
            k_scale, v_scale: () float32, of this layer; None for 1.

        Raises:
            RuntimeError: gradients are wanted, which rounding to FP8 does not have.
        """
        refuse_gradients(key_states, value_states)
        if self.format is None:
            self.format = Fp8Format.from_scales(k_scale, v_scale, key_states.device)
        self.store(*self.format.pack(key_states, value_states))
        return self.format.unpack(self.keys, self.values, key_states.dtype)

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Append keys and values that are packed already."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None and self.values is not None
        self.keys = torch.cat([self.keys, keys], dim=-2)
        self.values = torch.cat([self.values, values], dim=-2)

    def reset(self) -> None:
        """Forget every token, and the scales."""
        super().reset()
        self.format = None


def cache_scales(k_proj: nn.Module, v_proj: nn.Module) -> dict[str, Tensor]:
    """The scales of an FP8 cache that the projections of an attention layer carry, as arguments for its `update`."""
    found = {}
    for name, projection in (("k_scale", k_proj), ("v_scale", v_proj)):
        while hasattr(projection, "base_layer"):  # of an adapter
            projection = projection.base_layer
        if getattr(projection, "cache_scale", None) == name:
            found[name] = getattr(projection, name)
    return found
