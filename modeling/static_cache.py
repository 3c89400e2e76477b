"""The hybrid cache with every tensor at a fixed address: what a decode step replayed as a CUDA graph works on.

Keys and values lie in slots, as many as the cache was made for. Two kinds of calls fill them:

- *Whole calls* (a prompt, or any forward that a user makes) write behind the last slot used, which the host counts, and
  attend to exactly the slots filled: the same tensors, and the same numbers, as with a cache that grows.
- *Fixed steps* (`Slots.fixed`) write where the device says, row by row, and attend to those of the first `reach` slots that it
  names. Nothing in them depends on a number that only the host knows. Taking tokens back is a smaller position.

Keys and values may be kept in FP8 (`fp8_cache.py`). Whole calls dequantise what they attend to; in fixed steps attention reads
them as they are stored.

Positions are not encoded, so which slot a key lies in does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from ..configuration.configuration_nemotron_h import NemotronHConfig
from ..kernels_hub.registry import fill_slots
from .cache import HybridCache, Mamba2CacheLayer
from .cuda_graphs import CUDAGraphs
from .drafting import MOST_DEPTHS
from .fp8_cache import FP8, Fp8Format, refuse_gradients
from .token_layout import SeenSlots, TokenLayout

_SHORTEST_REACH = 256
LONGEST_STEP = MOST_DEPTHS + 1  # tokens of a fixed step


def round_up(slots: int) -> int:
    """The next of 256, 320, 384, 448, 512, 640, ...: at most a quarter more, and few different sizes."""
    size = _SHORTEST_REACH
    while size * 2 <= slots:
        size *= 2
    quarter = size // 4
    return max(size, -(-slots // quarter) * quarter)


class Slots:
    """Where the rows of a fixed-size cache write and what they may see; shared by all its layers.

    Args:
        size: slots of each row.
    """

    def __init__(self, size: int):
        self.size = size
        self.seen = 0  # slots filled, of the longest row
        self.ragged = False  # whether rows have filled different numbers
        self.positions: Tensor | None = None  # (batch, LONGEST_STEP) int64: each row's next slots, on the device
        self.there: Tensor | None = None  # (batch, size) bool: False where a prompt had padding
        self.index: Tensor | None = None  # (batch, tokens) int64: the slots of a fixed step's tokens
        self.reach = 0

    def begin(self, batch: int, device: torch.device, mask: Tensor | None) -> None:
        """Fixed steps follow. `mask`: (batch, seen), 0 for padding; None where all slots hold tokens."""
        if self.positions is None or self.positions.shape[0] != batch:
            self.positions = torch.zeros(batch, LONGEST_STEP, dtype=torch.long, device=device)
            self.there = torch.ones(batch, self.size, dtype=torch.bool, device=device)
        assert self.there is not None
        self.positions.copy_(torch.arange(self.seen, self.seen + LONGEST_STEP, device=device))
        self.there.fill_(True)
        if mask is not None:
            self.there[:, : self.seen].copy_(mask[:, : self.seen])

    def reach_for(self, slots: int) -> int:
        """How many slots a step attends to that fills the first `slots`: a power of two, so that few graphs serve."""
        reach = _SHORTEST_REACH
        while reach < slots:
            reach *= 2
        return min(reach, self.size)

    @contextlib.contextmanager
    def fixed(self, tokens: int, reach: int, ahead: int = 0) -> Iterator[TokenLayout]:
        """A step of `tokens` tokens a row, `ahead` slots behind each row's next one; gives the layout for its forward."""
        assert self.positions is not None and self.there is not None
        self.index = self.positions[:, ahead : ahead + tokens].contiguous()
        self.reach = reach
        try:
            yield TokenLayout(None, None, None, None, SeenSlots(self.index, self.there[:, :reach]))
        finally:
            self.index = None

    def reset(self) -> None:
        self.seen, self.ragged = 0, False


class StaticAttentionLayer(CacheLayerMixin):
    """Keys and values, (batch, kv_heads, size, head_dim) each, allocated when the first ones come."""

    is_croppable = True
    keys: Tensor
    values: Tensor
    stored_dtype: torch.dtype | None = None  # if another than keys and values come in

    def __init__(self, slots: Slots):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        # Zeros: a slot that nothing has filled is multiplied by a weight of zero, which must not meet a NaN.
        self.keys, self.values = (
            torch.zeros(*t.shape[:2], self.slots.size, t.shape[3], dtype=self.stored_dtype or t.dtype, device=t.device)
            for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, tokens, head_dim); returns the keys and values to attend to."""
        end = self._store(key_states, value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _store(self, key_states: Tensor, value_states: Tensor) -> int:
        """Write as `update` does; returns how many slots are attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, index = self.slots, self.slots.index
        if index is not None:
            fill_slots(self.keys, self.values, key_states, value_states, index, *self.scales)
            return slots.reach
        end = slots.seen + key_states.shape[2]
        packed = self._packed(key_states, value_states)
        self.keys[:, :, slots.seen : end], self.values[:, :, slots.seen : end] = packed
        return end

    def _packed(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """As they are stored."""
        return key_states, value_states

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """What stored keys and values are multiplied by, () float32 each; nothing where they are stored as they came."""
        return ()

    def get_seq_length(self) -> int:
        return self.slots.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.seen + query_length, 0

    def get_max_length(self) -> int:
        return self.slots.size

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: what lies behind the last slot in use is not seen, and is written over."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            for stored in (self.keys, self.values):
                stored[:, :, : self.slots.seen] = stored[beam_idx.to(stored.device), :, : self.slots.seen]

    def reset(self) -> None:
        """Nothing: no slot is in use any more. Stale numbers are finite, and masked."""

    def _map(self, function) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)


class StaticFp8Layer(StaticAttentionLayer):
    """The same in FP8. The scales are those of the first call behind `reset`, at addresses that stay too."""

    stored_dtype = FP8

    def __init__(self, slots: Slots):
        super().__init__(slots)
        self.format: Fp8Format | None = None
        self._takes_scales = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Write; returns what to attend to: dequantised in a whole call, in a fixed step as it is stored, to go with `scales`.

        Args:
            key_states, value_states: (batch, kv_heads, new, head_dim).
            k_scale, v_scale: () float32, of this layer; None for 1.

        Raises:
            RuntimeError: gradients are wanted, which rounding to FP8 does not have.
        """
        refuse_gradients(key_states, value_states)
        if self._takes_scales:
            wanted = Fp8Format.from_scales(k_scale, v_scale, key_states.device)
            if self.format is None:
                self.format = wanted
            else:
                self.format.k_scale.copy_(wanted.k_scale)
                self.format.v_scale.copy_(wanted.v_scale)
            self._takes_scales = False
        assert self.format is not None
        end = self._store(key_states, value_states)
        stored = self.keys[:, :, :end], self.values[:, :, :end]
        return stored if self.slots.index is not None else self.format.unpack(*stored, key_states.dtype)

    def _packed(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        assert self.format is not None
        return self.format.pack(key_states, value_states)

    @property
    def scales(self) -> tuple[Tensor, ...]:
        return () if self.format is None else (self.format.k_scale, self.format.v_scale)

    def reset(self) -> None:
        """The next call brings scales of its own."""
        self._takes_scales = True


class ReadAhead:
    """What the Mamba-2 layers of a cache share while drafts are read in fixed steps.

    A step's tokens stay out of the states, as in `Mamba2CacheLayer`, but at fixed addresses: their inputs lie in
    `StaticMamba2Layer.drafts`, and the next step replays the `kept` of them.
    """

    def __init__(self, kept: Tensor):
        self.kept = kept  # (batch,) int64: how many of the last step's tokens each row keeps
        self.count = 0  # tokens of the last step


class StaticMamba2Layer(Mamba2CacheLayer):
    """State of one Mamba-2 layer, at the same addresses from the first token on.

    `drafts`: (batch, tokens, channels + heads), inputs of the newest step's tokens while drafts are read in fixed steps.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.read_ahead: ReadAhead | None = None
        self.drafts: Tensor = torch.empty(0)


class StaticHybridCache(HybridCache):
    """Cache of a Nemotron-H model with room for a fixed number of tokens, which never moves.

    `generate(cache_implementation="static")` makes one that fits, keeps it, and its captured graphs, for later calls.

    Args:
        config: the model's configuration.
        max_cache_len: tokens of each row, padding included.
        kv_dtype: as in `HybridCache`; in `generate`, ask with `cache_config={"backend": "fp8"}` beside it.

    Raises:
        ValueError: no room for a token, or another `kv_dtype`.

    Example:

    ```python
    >>> import torch
    >>> from nemotron_super import NemotronHForCausalLM, preset
    >>> from nemotron_super.modeling.static_cache import StaticHybridCache
    >>> model = NemotronHForCausalLM(preset("tiny"))
    >>> cache = StaticHybridCache(model.config, max_cache_len=64)
    >>> model(torch.tensor([[1, 5, 9]]), cache=cache).cache.get_seq_length()
    3
    ```
    """

    def __init__(self, config: NemotronHConfig, max_cache_len: int, kv_dtype: torch.dtype | None = None):
        if max_cache_len < 1:
            raise ValueError(f"`max_cache_len` is {max_cache_len}: a cache needs room for at least one token.")
        super().__init__(config, kv_dtype=kv_dtype)
        self.slots = Slots(max_cache_len)
        attention = StaticAttentionLayer if kv_dtype is None else StaticFp8Layer
        made = {
            "full_attention": lambda: attention(self.slots),
            "linear_attention": StaticMamba2Layer,
        }
        self.layers = [made.get(kind, DummyLayer)() for kind in config.layers_block_type]
        self.config = config
        self.graphs = CUDAGraphs()
        self.mtp: StaticMTPCache | None = None  # of the model's own drafts, made when they are first asked for

    @property
    def max_cache_len(self) -> int:
        """Tokens that fit into each row."""
        return self.slots.size

    @property
    def ragged(self) -> bool:
        return self.slots.ragged

    @ragged.setter
    def ragged(self, ragged: bool) -> None:
        self.slots.ragged = ragged

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.slots.size

    def note_tokens(self, count: int, packed: bool = False, padded: bool = False) -> None:
        """Called once per forward. In a fixed step whoever makes it counts."""
        if self.slots.index is None:
            super().note_tokens(count, packed, padded)
            self.slots.seen += count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions seen so far, padding included; of the longest row."""
        return self.slots.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys that `query_length` new positions may see, and the position of the first of them."""
        return self.slots.seen + query_length, 0

    def scales_of(self, layer_idx: int) -> tuple[Tensor, ...]:
        """`scales` of an attention layer."""
        return self.layers[layer_idx].scales

    def check_room(self, length: int) -> None:
        """Refuse a whole call that does not fit.

        Raises:
            ValueError: naming what is there, what is new and how many fit.
        """
        seen, size = self.slots.seen, self.slots.size
        if seen + length > size:
            raise ValueError(
                f"`cache` has a fixed size of {size} tokens: {seen} are there, and {length} more do not fit. Make one with "
                f"`max_cache_len={seen + length}` or more, or leave `cache_implementation` out for a cache that grows."
            )

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """As `HybridCache.crop`; all rows give back the same number."""
        if isinstance(tokens_to_remove, Tensor):
            if int(tokens_to_remove.min()) != int(tokens_to_remove.max()):
                raise ValueError("`crop` of a fixed-size cache takes one number for all rows.")
            tokens_to_remove = int(tokens_to_remove.max())
        super().crop(tokens_to_remove)
        self.slots.seen += tokens_to_remove

    def to(self, device: torch.device | str | int) -> StaticHybridCache:
        """As `HybridCache.to`; what only drafts and recorded steps need is made anew there."""
        super().to(device)
        self.graphs, self.mtp = CUDAGraphs(), None
        self.slots.positions = self.slots.there = None
        for layer in self.layers:
            if isinstance(layer, StaticMamba2Layer):
                layer.drafts = torch.empty(0)
        return self

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.graphs.clear()  # the tensors have moved

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.graphs.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.graphs.clear()

    def reset(self) -> None:
        """Forget every token; nothing moves."""
        super().reset()
        self.slots.reset()
        for layer in self.layers:
            if isinstance(layer, StaticMamba2Layer):
                layer.record_past, layer.read_ahead = False, None


class StaticMTPCache(Cache):
    """Keys and values of the MTP head's attention layers at fixed addresses; numbered behind the backbone's."""

    def __init__(self, config: NemotronHConfig, max_cache_len: int):
        self.slots = Slots(max_cache_len)
        self._first_layer = config.num_hidden_layers
        super().__init__(layers=[StaticAttentionLayer(self.slots) for _ in config.mtp_layers_block_type])

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return super().update(key_states, value_states, layer_idx - self._first_layer, *args, **kwargs)

    def scales_of(self, layer_idx: int) -> tuple[Tensor, ...]:
        """`scales` of an attention layer."""
        return self.layers[layer_idx - self._first_layer].scales

    def note_tokens(self, count: int) -> None:
        """Called once per whole application of the head."""
        self.slots.seen += count

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions seen so far."""
        return self.slots.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys that `query_length` new positions may see, and the position of the first of them."""
        return self.slots.seen + query_length, 0

    def reset(self) -> None:
        """Forget every token; nothing moves."""
        self.slots.reset()
