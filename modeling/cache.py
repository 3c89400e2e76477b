"""The hybrid cache: keys and values for attention layers, convolution window and SSM state for Mamba-2 layers.

It is transformers' `DynamicCache` with what its Mamba layers lack: selecting and repeating batch rows, taking back the
newest tokens, and a length for models without any attention layer.
"""

from __future__ import annotations

import functools

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer
from transformers.utils.deprecation import deprecate_kwarg

from ..configuration.configuration_nemotron_h import NemotronHConfig
from .fp8_cache import FP8, Fp8CacheLayer

# The argument's name before transformers 5.24, which callers will use for a while.
accept_old_cache_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
# How many of the newest tokens a recorded past can take back.
ROLLBACK_LIMIT = 64


class Mamba2CacheLayer(LinearAttentionLayer):
    """State of one Mamba-2 layer.

    `conv_states[0]`: (batch, channels, conv_kernel), the last inputs of the convolution, oldest first.
    `recurrent_states[0]`: (batch, heads, head_dim, state_size) in `config.mamba_ssm_cache_dtype`.

    A recurrent state cannot be taken back, so while the past is recorded (`activate_past_recording`) the newest tokens
    stay out of it: `pending` holds their inputs, (batch, tokens, channels + heads), at most `ROLLBACK_LIMIT` tokens, a
    few kilobytes each where a state has megabytes. `crop` shortens `pending`; the mixer then replays what is left.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pending: torch.Tensor | None = None
        self.pending_lengths: torch.Tensor | None = None  # (batch,) int64, where rows keep different numbers
        self.settled = False  # `crop` has been called: what is pending will not be taken back any more

    @property
    def is_croppable(self) -> bool:
        """True: `crop` puts the layer back exactly, provided that the past is recorded."""
        return True

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs
    ) -> torch.Tensor:
        """Keep a whole window, (batch, channels, conv_kernel): the first one itself, of later ones the numbers, at its address."""
        if not self.is_conv_states_initialized[state_idx]:
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = conv_states.shape[-1]
        self.has_previous_state[state_idx] = True
        return _kept(self.conv_states, self.is_conv_states_initialized, state_idx, conv_states)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """Keep a state, (batch, heads, head_dim, state_size), as `update_conv_state` keeps a window."""
        return _kept(self.recurrent_states, self.is_recurrent_states_initialized, state_idx, recurrent_states)

    def keep_pending(self, inputs: torch.Tensor | None) -> None:
        """Called by the mixer: `inputs` are the newest tokens, not yet part of the states."""
        self.pending, self.pending_lengths, self.settled = inputs, None, False

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Take back the last `-tokens_to_remove` tokens: a number <= 0, or one for each row, (batch,).

        Raises:
            RuntimeError: the past is not recorded, or does not reach that far.
        """
        if not self.record_past:
            raise RuntimeError(
                "`crop` needs a recorded past: call `cache.activate_past_recording()` before the forward."
            )
        per_row = isinstance(tokens_to_remove, torch.Tensor)
        most = int(-tokens_to_remove.min()) if per_row else abs(tokens_to_remove)
        held = 0 if self.pending is None else self.pending.shape[1]
        if most > held:
            raise RuntimeError(f"`crop` was asked to take back {most} tokens but only the last {held} are recorded.")
        if most and self.pending_lengths is not None:
            raise RuntimeError(
                "`crop` has just left rows of different lengths: read at least one more token before the next."
            )
        self.settled = True
        if self.pending is None:
            return
        if per_row:
            if self.pending_lengths is None:
                self.pending_lengths = held + tokens_to_remove.to(self.pending.device)
            held = int(self.pending_lengths.max())
        else:
            held -= most
        self.pending = self.pending[:, :held] if held else None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self._map_states(lambda state: state[indices.to(state.device)])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def offload(self) -> None:
        """Move the layer to CPU memory."""
        self._map_states(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Bring the layer back to its device."""
        self._map_states(lambda state: state.to(self.device, non_blocking=True))

    def to(self, device: torch.device) -> None:
        """Move the layer, and what comes to it, to another device."""
        self._map_states(lambda state: state.to(device))
        self.device = device

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.keep_pending(None)

    def _map_states(self, function) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = function(state)
        self.pending = None if self.pending is None else function(self.pending)
        self.pending_lengths = None if self.pending_lengths is None else function(self.pending_lengths)


def _kept(states: dict, there: dict[int, bool], place: int, new: torch.Tensor) -> torch.Tensor:
    if there[place]:
        return states[place].copy_(new)
    # Not a copy of it in zeros, as transformers does: that takes four launches a layer, before the GPU has anything to do.
    states[place], there[place] = new.contiguous(), True
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(states[place])
    return states[place]


class HybridCache(DynamicCache):
    """Cache of a Nemotron-H model; grows with the sequence only in the attention layers.

    Args:
        config: the model's configuration.
        offloading: keep attention keys and values in CPU memory between uses.
        kv_dtype: None to keep keys and values as they are, or `torch.float8_e4m3fn` for half the memory. They are then rounded
            with the scales of the checkpoint, if it has any. A checkpoint that has them does not get an FP8 cache
            by itself: it would change the numbers of those who did not ask, as simulated activations would. In `generate`,
            ask with `cache_implementation="quantized"`, or put that into the generation config.

    Attributes:
        ragged: drafts have left rows that end at different lengths. Such a cache is refused by the next call: what would
            stand between a row's end and its next token is not what plain decoding puts there.

    Raises:
        ValueError: another `kv_dtype`.
    """

    ragged = False

    def __init__(self, config: NemotronHConfig, offloading: bool = False, kv_dtype: torch.dtype | None = None):
        if kv_dtype not in (None, FP8):
            raise ValueError(f"`kv_dtype` is {kv_dtype}: give None for the model's own dtype, or {FP8}.")
        kinds = list(config.layers_block_type)
        attention = DynamicLayer if kv_dtype is None else Fp8CacheLayer
        made = {"linear_attention": Mamba2CacheLayer, "full_attention": attention}
        # Not by `super()`, which finds out about layers in a way that takes as long as a layer of a short prompt.
        Cache.__init__(self, layers=[made.get(kind, DummyLayer)() for kind in kinds], offloading=offloading)
        self.kv_dtype = kv_dtype
        self._has_attention = "full_attention" in kinds
        self._tokens_seen = 0
        self.holds_packed_documents = self.holds_padding = False

    @property
    def is_compileable(self) -> bool:
        """False: its length is a number that changes with every call, even where every state has a fixed size."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """As transformers', which takes a cache of nothing but True for one without a length and reads everything again."""
        # Not by `super()`, through which a compiler finds no property.
        return [self._has_attention and isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers]

    def note_tokens(self, count: int, packed: bool = False, padded: bool = False) -> None:
        """Called once per forward: a model of Mamba-2 layers only has no keys to count."""
        self._tokens_seen += count
        self.holds_packed_documents |= packed
        self.holds_padding |= padded

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions seen so far, padding included."""
        return super().get_seq_length(layer_idx) if self._has_attention else self._tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys that `query_length` new positions may see, and the position of the first of them."""
        if self._has_attention:
            return super().get_mask_sizes(query_length, layer_idx)
        return self._tokens_seen + query_length, 0

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Take back the last `-tokens_to_remove` positions exactly; needs `activate_past_recording()` beforehand.

        With one number for each row, (batch,), attention keys are removed as far as all rows agree. Where a row gives
        back more, its keys stay in place and the caller must mask them: without position encoding, where a key lies in
        the cache does not matter.

        Raises:
            RuntimeError: the past is not recorded, or does not reach that far.
        """
        common = int(tokens_to_remove.max()) if isinstance(tokens_to_remove, torch.Tensor) else tokens_to_remove
        if common > 0:
            raise ValueError(f"`tokens_to_remove` is {common}: give 0 or a negative number of tokens to take back.")
        for layer in self.layers:
            if isinstance(layer, Mamba2CacheLayer):
                layer.crop(tokens_to_remove)
            elif layer.is_initialized and common:
                layer.crop(common)
        self._tokens_seen += common

    def to(self, device: torch.device | str | int) -> HybridCache:
        """Move every state to `device`, in place, and return the cache, for a model that has moved there too.

        Keys and values that are offloaded stay in CPU memory, to be fetched by that device.
        """
        device = torch.device(device)
        for layer in self.layers:
            if isinstance(layer, Mamba2CacheLayer):
                layer.to(device)
            elif getattr(layer, "keys", None) is not None:
                layer.device = device
                if not self.offloading:
                    layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
                if getattr(layer, "format", None) is not None:
                    layer.format = layer.format.to(device)
        return self

    def keep_positions(self, there: torch.Tensor) -> None:
        """Drop attention keys that no query may see any more, such as those that `crop` left in rows that gave back more.

        Args:
            there: (batch, positions) bool, True equally often in every row.
        """
        count = int(there[0].sum())
        places = (~there).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        rows = torch.arange(len(places), device=places.device).unsqueeze(1)
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                index = rows.to(layer.keys.device), places.to(layer.keys.device)
                layer.keys, layer.values = (
                    t.transpose(1, 2)[index].transpose(1, 2) for t in (layer.keys, layer.values)
                )
        self._tokens_seen = count

    def reset(self) -> None:
        super().reset()
        self._tokens_seen = 0
        self.holds_packed_documents = self.holds_padding = self.ragged = False


class MTPCache(DynamicCache):
    """Keys and values of the MTP head's attention layers, which are numbered behind the backbone's."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self._first_layer = config.num_hidden_layers
        self._tokens_seen = 0

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return super().update(key_states, value_states, layer_idx - self._first_layer, *args, **kwargs)

    def note_tokens(self, count: int) -> None:
        """Called once per application of the head."""
        self._tokens_seen += count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions seen so far."""
        return self._tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys that `query_length` new positions may see, and the position of the first of them."""
        return self._tokens_seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` positions."""
        for layer in self.layers:
            if layer.is_initialized and tokens_to_remove:
                layer.crop(tokens_to_remove)
        self._tokens_seen += tokens_to_remove


def refuse_ragged(cache: Cache) -> None:
    """Refuse a cache in which drafts have left rows that end apart.

    Raises:
        ValueError: such a cache.
    """
    if getattr(cache, "ragged", False):
        raise ValueError(
            "`cache` holds rows of different lengths, as drafts left them: continue each row from a cache of its own."
        )


def check_cache(cache: Cache, config: NemotronHConfig, batch: int, length: int = 0) -> None:
    """Refuse a cache that another configuration or another batch filled, or that has no room for `length` tokens.

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
    refuse_ragged(cache)
    if hasattr(cache, "check_room"):
        cache.check_room(length)
    elif 0 < cache.get_max_length() < length:  # transformers' fixed-size cache, which counts on the device
        raise ValueError(
            f"`cache` has a fixed size of {cache.get_max_length()} tokens, this call brings {length}: make a larger one."
        )
    conv_dim = config.mamba_num_heads * config.mamba_head_dim + 2 * config.n_groups * config.ssm_state_size
    conv_shape = (conv_dim, config.conv_kernel)
    ssm_shape = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    kv_shape = (config.num_key_value_heads, config.head_dim)
    for index, (kind, layer) in enumerate(zip(config.layers_block_type, layers, strict=True)):
        stateful = kind if kind in ("linear_attention", "full_attention") else None
        if stateful != _kind_of(type(layer)):
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


@functools.cache
def _kind_of(layer: type) -> str | None:
    """The kind of block that a class of cache layers serves; None where the block keeps nothing."""
    if issubclass(layer, LinearAttentionCacheLayerMixin):
        return "linear_attention"
    return None if issubclass(layer, DummyLayer) else "full_attention"
