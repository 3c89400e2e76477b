"""The hybrid cache: keys and values for attention layers, convolution window and SSM state for Mamba-2 layers.

It is transformers' `DynamicCache` with what its Mamba layers lack: selecting and repeating batch rows, and a length for
models without any attention layer.
"""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from ..configuration.configuration_nemotron_h import NemotronHConfig


class Mamba2CacheLayer(LinearAttentionLayer):
    """State of one Mamba-2 layer.

    `conv_states[0]`: (batch, channels, conv_kernel), the last inputs of the convolution, oldest first.
    `recurrent_states[0]`: (batch, heads, head_dim, state_size) in `config.mamba_ssm_cache_dtype`.
    """

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._map_states(lambda state: state[indices.to(state.device)])

    def _map_states(self, function) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = function(state)


class HybridCache(DynamicCache):
    """Cache of a Nemotron-H model; grows with the sequence only in the attention layers.

    Args:
        config: the model's configuration.
        offloading: keep attention keys and values in CPU memory between uses.
    """

    def __init__(self, config: NemotronHConfig, offloading: bool = False):
        super().__init__(config=config, offloading=offloading)
        for index, kind in enumerate(config.layers_block_type):
            if kind == "linear_attention":
                self.layers[index] = Mamba2CacheLayer()
        self._has_attention = "full_attention" in config.layers_block_type
        self._tokens_seen = 0
        self.holds_packed_documents = False

    @property
    def is_compileable(self) -> bool:
        """False: its length is a number that changes with every call, even where every state has a fixed size."""
        return False

    def note_tokens(self, count: int, packed: bool) -> None:
        """Called once per forward: a model of Mamba-2 layers only has no keys to count."""
        self._tokens_seen += count
        self.holds_packed_documents |= packed

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions seen so far, padding included."""
        return super().get_seq_length(layer_idx) if self._has_attention else self._tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys that `query_length` new positions may see, and the position of the first of them."""
        if self._has_attention:
            return super().get_mask_sizes(query_length, layer_idx)
        return self._tokens_seen + query_length, 0

    def reset(self) -> None:
        super().reset()
        self._tokens_seen = 0
        self.holds_packed_documents = False


def check_cache(cache: Cache, config: NemotronHConfig, batch: int) -> None:
    """Refuse a cache that another configuration or another batch filled.

    Raises:
        ValueError: naming what differs.
    """
    layers = cache.layers
    if layers and len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"`cache` has {len(layers)} layers but this model has {config.num_hidden_layers}: it was made for "
            "another configuration. Make one with `HybridCache(model.config)`."
        )
    if not layers:
        raise ValueError("`cache` was made without a configuration: use `HybridCache(model.config)`.")
    if getattr(cache, "holds_packed_documents", False):
        raise ValueError(
            "`cache` was filled with packed documents: attention would see all of them, the Mamba-2 layers the last only. "
            "Continue each document from a cache of its own."
        )
    conv_dim = config.mamba_num_heads * config.mamba_head_dim + 2 * config.n_groups * config.ssm_state_size
    conv_shape = (conv_dim, config.conv_kernel)
    ssm_shape = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    kv_shape = (config.num_key_value_heads, config.head_dim)
    for index, (kind, layer) in enumerate(zip(config.layers_block_type, layers, strict=True)):
        stateful = kind if kind in ("linear_attention", "full_attention") else None
        if stateful != _kind_of(layer):
            raise ValueError(
                f"`cache` holds a {type(layer).__name__} for layer {index}, which is of kind {kind!r}: it was made for "
                "another configuration. Make one with `HybridCache(model.config)`."
            )
        states: list[tuple] = []
        if kind == "linear_attention":
            states = [(layer.conv_states[0], (1, 2), conv_shape), (layer.recurrent_states[0], (1, 2, 3), ssm_shape)]
        elif kind == "full_attention":
            states = [(getattr(layer, "keys", None), (1, 3), kv_shape)]
        for state, dims, expected in states:
            if state is None or state.dim() == 1:  # nothing yet
                continue
            found = tuple(state.shape[dim] for dim in dims)
            if found != expected:
                raise ValueError(
                    f"`cache` holds a state of shape {found} for layer {index}, this model needs {expected}: it was "
                    "filled by another configuration."
                )
            if state.shape[0] != batch:
                raise ValueError(
                    f"`cache` was filled with a batch of {state.shape[0]} but this call has {batch} rows. Use "
                    "`batch_select_indices` or `batch_repeat_interleave` to change its rows."
                )


def _kind_of(layer) -> str | None:
    """The kind of block a cache layer serves; None where the block keeps nothing."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return "linear_attention"
    return None if isinstance(layer, DummyLayer) else "full_attention"
