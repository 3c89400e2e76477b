"""The Mamba-2 mixer: input projection, causal convolution, selective scan, gated norm, output projection.

    z, xBC, dt = in_proj(u);  x, B, C = silu(conv(xBC));  dt = softplus(dt + dt_bias), not clamped unless configured
    y = scan(x, dt, -exp(A_log), B, C, D);  out = out_proj(norm(y * silu(z)))

Without gradients the sequence goes through in segments that carry the state, so activations do not grow with its length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..configuration.configuration_nemotron_h import NemotronHConfig
from ..kernels_hub.reference.stochastic_round import store_as
from ..kernels_hub.reference.time_step import decay
from ..kernels_hub.reference.time_step import step_and_decay as plain_step_and_decay
from ..kernels_hub.registry import (
    causal_conv1d,
    causal_conv1d_replay,
    causal_conv1d_update,
    selective_state_replay,
    selective_state_update,
    ssd_chunk_scan,
    step_and_decay,
)
from .cache import ROLLBACK_LIMIT, Mamba2CacheLayer
from .hub_functions import mamba2_functions, put_in_place
from .linear import NemotronHLinear, product_of
from .norms import NemotronHGatedRMSNorm
from .static_cache import StaticMamba2Layer
from .token_layout import TokenLayout

# Positions (rows times length) per segment without gradients: on a CPU the projections then stay in cache.
_SEGMENT_TOKENS = {"cpu": 512, "cuda": 16384}

# Settled tokens of a recorded past that are replayed with every call before they go into the state.
_REPLAYED_TOGETHER = 16


def _plus(out: Tensor, residual: Tensor | None) -> Tensor:
    return out if residual is None else residual + out


class NemotronHCausalConv1d(nn.Conv1d):
    """The causal convolution and its SiLU, with weights in the shapes of the release.

    A module that is called, because weights that wait on disk or on another device are fetched when their module is.
    """

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        seq_idx: Tensor | None = None,
        hub: Callable[..., Tensor] | None = None,
        replay: bool = False,
        **drafts: Any,
    ) -> Tensor:
        """(batch, seq, channels) -> the same; or one token (batch, channels), which advances `state` in place.

        `hub`: a kernel to use in the place of the registry's choice. `replay`: the sequence is a few tokens, without ids, that
        columns which are not convolved may follow; `drafts` are arguments of `causal_conv1d_replay`.
        """
        if replay:
            return causal_conv1d_replay(state, x, self.weight.squeeze(1), self.bias, **drafts)
        if x.dim() == 2:
            return causal_conv1d_update(state, x, self.weight.squeeze(1), self.bias, hub=hub)
        return causal_conv1d(x, self.weight.squeeze(1), self.bias, state, seq_idx, hub=hub)


class NemotronHMamba2Mixer(nn.Module):
    """Mamba-2 (Dao & Gu 2024) with B and C shared in groups. Input and output (batch, seq, hidden)."""

    def __init__(self, config: NemotronHConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.n_groups, self.state_size = config.n_groups, config.ssm_state_size
        self.intermediate_size = self.num_heads * self.head_dim
        self.conv_dim = self.intermediate_size + 2 * self.n_groups * self.state_size
        self.conv_kernel, self.chunk_size = config.conv_kernel, config.chunk_size
        self.time_step_limit = (config.time_step_limit[0], config.time_step_limit[1])
        self.cache_dtype = getattr(torch, config.mamba_ssm_cache_dtype)

        self.in_proj = NemotronHLinear(
            config.hidden_size, self.intermediate_size + self.conv_dim + self.num_heads, bias=config.use_bias
        )
        self.conv1d = NemotronHCausalConv1d(
            self.conv_dim, self.conv_dim, self.conv_kernel, groups=self.conv_dim, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = NemotronHGatedRMSNorm(
            self.intermediate_size, self.intermediate_size // self.n_groups, config.layer_norm_epsilon
        )
        self.out_proj = NemotronHLinear(self.intermediate_size, config.hidden_size, bias=config.use_bias)
        self._kernel_funcs = mamba2_functions()

    def forward(
        self, hidden_states: Tensor, layout: TokenLayout, cache: Cache | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual`: (batch, seq, hidden), added to the output."""
        if cache is None:
            whole = self._hub("mamba_split_conv1d_scan_combined") if self.training else None
            if whole is not None and layout.padding is None:
                return _plus(self._through(whole, hidden_states, layout.compact_documents()), residual)
            return _plus(self._sequence(hidden_states, layout, None, None, keep=False)[0], residual)
        layer = cache.layers[self.layer_idx]
        if getattr(layer, "read_ahead", None) is not None:
            return self._read_ahead(hidden_states, layer, residual)
        states = self._settled_states(cache)
        if cache.is_recording_past(self.layer_idx) and layout.seq_idx is None:
            return _plus(self._recorded(hidden_states, layout, cache, *states), residual)
        if states[0] is not None and hidden_states.shape[1] == 1:
            return self._one_token(hidden_states, layout, *states, residual)
        out, *states = self._sequence(hidden_states, layout, *states)
        self._store(cache, *states)
        return _plus(out, residual)

    def _settled_states(self, cache: Cache) -> tuple[Tensor | None, Tensor | None]:
        """Convolution and SSM state with every token in them that will not be taken back any more."""
        states = cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)
        layer = cache.layers[self.layer_idx]
        if not isinstance(layer, Mamba2CacheLayer) or layer.pending is None:
            return states
        # While recording, a few settled tokens are replayed together with what follows: one pass instead of two.
        ragged, many = layer.pending_lengths is not None, layer.pending.shape[1] > _REPLAYED_TOGETHER
        if not layer.record_past or (layer.settled and (ragged or many)):
            self.settle(cache)
        return cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)

    def settle(self, cache: Cache) -> None:
        """Advance the states by the recorded tokens: none of them will be taken back any more."""
        layer = cache.layers[self.layer_idx]
        if layer.pending is not None:
            states = cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)
            _, *states = self._recur(*self._split(layer.pending), *states, None, layer.pending_lengths)
            self._store(cache, *states)
            layer.keep_pending(None)

    def _recorded(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        cache: Cache,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> Tensor:
        """As `_sequence`, with the newest tokens kept out of the cached states, as inputs that can be replayed."""
        layer, length = cache.layers[self.layer_idx], hidden_states.shape[1]
        parts, pending = [], layer.pending
        # Only positions behind the last padded one can be taken back.
        before, tail = (None, length) if layout.padding is None else layout.padding.before_tail
        older = length - min(tail, ROLLBACK_LIMIT)
        if older:
            if pending is not None:
                _, conv_state, ssm_state = self._recur(*self._split(pending), conv_state, ssm_state)
                pending = None
            for part, padding in (
                (hidden_states[:, : length - tail], before),
                (hidden_states[:, length - tail : older], None),
            ):
                if part.shape[1]:
                    alone = TokenLayout(None, padding, None, None)
                    out, conv_state, ssm_state = self._sequence(part, alone, conv_state, ssm_state)
                    conv_state, ssm_state = self._store(cache, conv_state, ssm_state)
                    parts.append(out)
            if older == length:
                layer.keep_pending(None)
                return torch.cat(parts, dim=1)
            hidden_states = hidden_states[:, older:]
        z, inputs = self.in_proj(hidden_states).tensor_split([self.intermediate_size], dim=-1)
        new = inputs.shape[1]
        inputs = inputs if pending is None else torch.cat([pending, inputs], dim=1)
        excess = inputs.shape[1] - ROLLBACK_LIMIT
        if excess > 0:
            _, conv_state, ssm_state = self._recur(*self._split(inputs[:, :excess]), conv_state, ssm_state)
            conv_state, ssm_state = self._store(cache, conv_state, ssm_state)
            inputs = inputs[:, excess:]
        layer.keep_pending(inputs.contiguous())
        if conv_state is None or ssm_state is None or torch.is_grad_enabled() or self._any_hub():
            y, *_ = self._recur(*self._split(inputs), conv_state, ssm_state)
        else:
            y = self._replay(inputs, conv_state, ssm_state)
        parts.append(self.out_proj(self.norm(y[:, -new:], z)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _store(self, cache: Cache, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor | None, Tensor | None]:
        cache.update_conv_state(conv_state, self.layer_idx, conv_kernel_size=self.conv_kernel)
        cache.update_recurrent_state(store_as(ssm_state, self.cache_dtype), self.layer_idx)
        return cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)

    def _sequence(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """A whole call. Returns the output (batch, seq, hidden) and the states after each row's last token.

        Without `keep` the convolution's state is not worked out, unless a later segment of the same call wants it.
        """
        padding, seq_idx, lengths = layout.padding, layout.compact_documents(), None
        if padding is not None:
            lengths, hidden_states = padding.lengths, padding.compact(hidden_states)

        batch, length, _ = hidden_states.shape
        segment = length
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            per_device = _SEGMENT_TOKENS.get(hidden_states.device.type, _SEGMENT_TOKENS["cuda"])
            segment = max(self.chunk_size, per_device // batch // self.chunk_size * self.chunk_size)
        if segment >= length:
            out, conv_state, ssm_state = self._mix(hidden_states, conv_state, ssm_state, seq_idx, lengths, keep)
        else:
            out = torch.empty_like(hidden_states)
            for start in range(0, length, segment):
                end = min(start + segment, length)
                ids = None if seq_idx is None else seq_idx[:, start:end]
                if seq_idx is not None and start:
                    # A state handed on belongs to the document before the cut; another document starts from zero.
                    same = seq_idx[:, start] == seq_idx[:, start - 1]
                    conv_state, ssm_state = conv_state * same.view(-1, 1, 1), ssm_state * same.view(-1, 1, 1, 1)
                here = None if lengths is None else (lengths - start).clamp(0, end - start)
                out[:, start:end], conv_state, ssm_state = self._mix(
                    hidden_states[:, start:end], conv_state, ssm_state, ids, here
                )
        assert ssm_state is not None and not (keep and conv_state is None)
        return (out if padding is None else padding.restore(out)), conv_state, ssm_state

    def _mix(
        self,
        hidden_states: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        seq_idx: Tensor | None,
        lengths: Tensor | None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One stretch of sequence, real tokens first. Returns the output and the states after each row's last token."""
        z, conv_in, dt = self._project(hidden_states)
        y, conv_state, ssm_state = self._recur(conv_in, dt, conv_state, ssm_state, seq_idx, lengths, keep)
        return self.out_proj(self.norm(y, z)), conv_state, ssm_state

    def _recur(
        self,
        conv_in: Tensor,
        dt: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The part with memory, from what `in_proj` gives: conv_in (batch, seq, conv_dim) and dt (batch, seq, heads).

        Returns y (batch, seq, heads * head_dim) and the states after the first `lengths` tokens of each row; with `keep` also
        the convolution's, whose many short kernels training does without.
        """
        batch, length, _ = conv_in.shape
        xBC = self.conv1d(conv_in, conv_state, seq_idx, hub=self._hub("causal_conv1d_fn"))
        groups = self.n_groups * self.state_size
        x, B, C = xBC.split_with_sizes([self.intermediate_size, groups, groups], dim=-1)
        # The kernel has no gradient, and a compiler makes one of its own.
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        steps = plain_step_and_decay if plain else step_and_decay
        dt, A = steps(dt, self.dt_bias, self.A_log, self.time_step_limit, lengths)
        y, ssm_state = ssd_chunk_scan(
            x.view(batch, length, self.num_heads, self.head_dim),
            dt,
            A,
            B.view(batch, length, self.n_groups, self.state_size),
            C.view(batch, length, self.n_groups, self.state_size),
            self.D,
            chunk_size=self.chunk_size,
            initial_state=ssm_state,
            seq_idx=seq_idx,
            hub=self._hub("mamba_chunk_scan_combined"),
        )
        window = self._window(conv_in, conv_state, seq_idx, lengths) if keep else None
        return y.reshape(batch, length, -1), window, ssm_state

    def _replay(
        self,
        inputs: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        drafts: Tensor | None = None,
        settled: int = 0,
        kept: Tensor | None = None,
    ) -> Tensor:
        """As `_recur`, for a few tokens that stay out of the states: only y, (batch, tokens, heads * head_dim).

        Args:
            inputs: (batch, tokens, conv_dim + heads).
            drafts, settled, kept: as in `causal_conv1d_replay`: older inputs, which go into the states, in place.
        """
        out = self.conv1d(inputs, conv_state, replay=True, drafts=drafts, settled=settled, kept=kept)
        groups = self.n_groups * self.state_size
        x, B, C, dt = out.split([self.intermediate_size, groups, groups, self.num_heads], dim=-1)
        batch, length, _ = out.shape
        y = selective_state_replay(
            ssm_state,
            x.view(batch, length, self.num_heads, self.head_dim),
            dt,
            self.A_log,
            B.view(batch, length, self.n_groups, self.state_size),
            C.view(batch, length, self.n_groups, self.state_size),
            self.D,
            settled,
            kept,
            dt_bias=self.dt_bias,
            dt_limit=self.time_step_limit,
        )
        return y.reshape(batch, length - settled, self.intermediate_size)

    def _one_token(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        conv_state: Tensor,
        ssm_state: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        """Decoding: advance both states in place by one token."""
        batch = hidden_states.shape[0]
        z, conv_in, dt = self._project(hidden_states[:, 0])
        real = None if layout.padding is None else layout.padding.lengths.bool()
        if real is not None:
            before = conv_state.clone()
        xBC = self.conv1d(conv_in, conv_state, hub=self._hub("causal_conv1d_update"))
        if real is not None:
            conv_state.copy_(torch.where(real.view(-1, 1, 1), conv_state, before))
        x, B, C = xBC.split([self.intermediate_size, *(self.n_groups * self.state_size,) * 2], dim=-1)
        y = selective_state_update(
            ssm_state,
            x.view(batch, self.num_heads, self.head_dim),
            dt,
            self.A_log,
            B.view(batch, self.n_groups, self.state_size),
            C.view(batch, self.n_groups, self.state_size),
            self.D,
            dt_bias=self.dt_bias,
            dt_limit=self.time_step_limit,
            live=real,
            hub=self._hub("selective_state_update"),
        )
        return product_of(self.out_proj, self.norm(y.view(batch, 1, -1), z.unsqueeze(1)), plus=(residual,))

    def _read_ahead(self, hidden_states: Tensor, layer: StaticMamba2Layer, residual: Tensor | None) -> Tensor:
        """Drafts, in a fixed step: the kept tokens of the last step go into the states, in place; the new ones do not."""
        z, new = self.in_proj(hidden_states).tensor_split([self.intermediate_size], dim=-1)
        y = self._behind_drafts(new, layer)
        return product_of(self.out_proj, self.norm(y, z), plus=(residual,))

    def take_drafts(self, layer: StaticMamba2Layer) -> None:
        """Advance a layer's states, in place, by those of its drafts that are kept."""
        if layer.read_ahead.count:
            self._behind_drafts(layer.drafts[:, :0], layer)

    def _behind_drafts(self, inputs: Tensor, layer: StaticMamba2Layer) -> Tensor:
        ahead, conv_state, ssm_state = layer.read_ahead, layer.conv_states[0], layer.recurrent_states[0]
        return self._replay(inputs, conv_state, ssm_state, layer.drafts, ahead.count, ahead.kept)

    def _hub(self, name: str) -> Callable[..., Tensor] | None:
        return put_in_place(self._kernel_funcs[name])

    def _any_hub(self) -> bool:
        return any(put_in_place(function) is not None for function in self._kernel_funcs.values())

    def _through(self, whole: Callable[..., Tensor], hidden_states: Tensor, seq_idx: Tensor | None) -> Tensor:
        """A call without cache or padding through one kernel for everything between the projections."""
        named = {} if seq_idx is None else {"seq_idx": seq_idx.to(torch.int32)}
        y = whole(
            self.in_proj(hidden_states),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            decay(self.A_log),
            self.D,
            self.chunk_size,
            dt_limit=self.time_step_limit,
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.eps,
            headdim=self.head_dim,
            ngroups=self.n_groups,
            norm_before_gate=False,
            **named,
        )
        return self.out_proj(y)  # a module of its own: it may be quantised, or have an adapter

    def _split(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """conv_in and dt of recorded inputs (batch, tokens, conv_dim + heads)."""
        return inputs.split([self.conv_dim, self.num_heads], dim=-1)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        widths = [self.intermediate_size, self.conv_dim, self.num_heads]
        return self.in_proj(hidden_states).split_with_sizes(widths, dim=-1)

    def _window(
        self, conv_in: Tensor, conv_state: Tensor | None, seq_idx: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """The last `conv_kernel` inputs of each row's last document, (batch, channels, conv_kernel), zeros before it."""
        batch, length, channels = conv_in.shape
        kernel = self.conv_kernel
        # A compiler would take the comparison as a promise about lengths to come.
        if lengths is None and seq_idx is None and not torch.compiler.is_compiling() and length >= kernel:
            # A copy, since a view would keep all of the projection in memory.
            return conv_in[:, length - kernel :].transpose(1, 2).contiguous()
        if conv_state is None:
            conv_state = conv_in.new_zeros(batch, channels, kernel)
        if lengths is None:
            ends = torch.full((batch,), length, device=conv_in.device)
        else:
            ends = lengths
        slots = ends.unsqueeze(1) + torch.arange(-kernel, 0, device=conv_in.device)  # (batch, kernel)
        inside = slots.clamp(min=0)
        new = conv_in.gather(1, inside.unsqueeze(-1).expand(-1, -1, channels)).transpose(1, 2)
        old = conv_state.gather(2, (slots + kernel).clamp(0, kernel - 1).unsqueeze(1).expand(-1, channels, -1))
        window = torch.where((slots >= 0).unsqueeze(1), new, old.to(new.dtype))
        if seq_idx is not None:
            last = seq_idx.gather(1, (ends - 1).clamp(min=0).unsqueeze(1))
            # Slots below zero are an earlier call's, which belong to this call's first document.
            window = window * (seq_idx.gather(1, inside) == last).unsqueeze(1)
        return window
