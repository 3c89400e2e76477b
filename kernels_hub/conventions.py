"""Kernels that others publish, called as ours are: adapters from an op's arguments to those of mamba-ssm and its kin.

Two kinds of callables speak these conventions: installed packages (`PACKAGES`), and the layers of kernel repositories that
transformers' `use_kernels=True` puts in the place of functions. An adapter takes the callable first, then the op's arguments.
Activations of the convolution and steps of the scan lie as (batch, channels, seq) and (batch, seq, heads, head_dim) there.

The packages' conventions are those of mamba-ssm 2.3, causal-conv1d 1.7 and liger-kernel 0.8, as documented; the adapters have
been tested against stand-ins that check the calls, not on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference.stochastic_round import STOCHASTIC
from .reference.time_step import ANY_STEP, decay, time_step


def _consecutive(seq_idx: Tensor | None) -> Tensor | None:
    """Ids as these kernels want them: int32, from 0 on. A state handed in belongs to document 0, the first."""
    if seq_idx is None:
        return None
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1, dtype=torch.int32)
    return torch.cat([changes.new_zeros(changes.shape[0], 1), changes], dim=1)


def causal_conv1d(
    kernel: Callable,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Through `causal_conv1d_fn(x (batch, channels, seq), weight, bias, activation, seq_idx)`; its layout is a view of ours.

    A state is put in front of the sequence: not every kernel of this convention takes one, and none together with ids.
    """
    before = 0 if state is None else weight.shape[1] - 1
    if state is not None:
        x = torch.cat([state[..., 1:].transpose(1, 2).to(x.dtype), x], dim=1)
        seq_idx = None if seq_idx is None else torch.cat([seq_idx[:, :1].expand(-1, before), seq_idx], dim=1)
    named = {} if seq_idx is None else {"seq_idx": _consecutive(seq_idx)}
    out = kernel(x.transpose(1, 2), weight.to(x.dtype), bias, activation="silu", **named)
    return out.transpose(1, 2)[:, before:]


def causal_conv1d_update(
    kernel: Callable, state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Through `causal_conv1d_update(x (batch, channels, 1), conv_state, weight, bias, activation)`."""
    return kernel(x.unsqueeze(-1), state, weight, bias, activation="silu").squeeze(-1)


def ssd_chunk_scan(
    kernel: Callable,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Through `mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, ...)`, which shares our layouts; dt is ready here."""
    named = {} if seq_idx is None else {"seq_idx": _consecutive(seq_idx)}
    initial = None if initial_state is None else initial_state.float()
    y, state = kernel(
        x, dt, A, B, C, chunk_size, D=D, initial_states=initial, dt_softplus=False, return_final_states=True, **named
    )
    return y, state.float()


def selective_state_update(
    kernel: Callable,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = ANY_STEP,
    live: Tensor | None = None,
) -> Tensor:
    """Through `selective_state_update(state, x, dt, A, B, C, D, ...)`: one number a head comes expanded to all its places.

    What it knows of time steps has no limit and no padding, so they come ready, with a bias of zero: with strides of zero
    everywhere mamba-ssm takes its way for one number a head, and reads them all.
    """
    if dt_bias is not None:
        dt, A = time_step(dt, dt_bias, dt_limit), decay(A)
    dt = dt if live is None else dt * live.unsqueeze(-1)
    heads, head_dim, state_size = state.shape[1:]
    return kernel(
        state,
        x,
        dt.unsqueeze(-1).expand(-1, -1, head_dim),
        A.view(heads, 1, 1).expand(-1, head_dim, state_size),
        B,
        C,
        D.unsqueeze(-1).expand(-1, head_dim),
        dt_bias=dt.new_zeros(()).expand(heads, head_dim),
        dt_softplus=False,
    )


def rms_norm(kernel: Callable, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Through Liger's autograd function `apply(x, weight, eps, offset, casting_mode, in_place)`; "gemma" is all in float32."""
    return kernel(x, weight, eps, 0.0, "gemma", False)


def gated_rms_norm(kernel: Callable, y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """Through mamba-ssm's `rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)`."""
    return kernel(y, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=False)


class Package(NamedTuple):
    """Where an installed package keeps the kernel of an op, and what it cannot do that the op may ask for."""

    package: str
    module: str
    attribute: str
    limits: Callable[..., str | None]

    def load(self) -> Callable:
        found: Any = importlib.import_module(self.module)
        for name in self.attribute.split("."):
            found = getattr(found, name)
        return found


def _any(*args, **kwargs) -> str | None:
    return None


def _taps(weight: Tensor) -> str | None:
    return None if 2 <= weight.shape[1] <= 4 else f"`weight` has {weight.shape[1]} taps, causal-conv1d serves 2 to 4"


def _conv_limits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> str | None:
    if x.shape[-1] % 8:
        return f"`x` has {x.shape[-1]} channels, causal-conv1d wants multiples of 8"
    return _taps(weight)


def _conv_update_limits(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    return _taps(weight)


def rounds_to_nearest(state: Tensor, *others: Any, **named: Any) -> str | None:
    """Of a kernel that does: why it cannot serve a state that has to be rounded stochastically, or None."""
    if state.dtype in STOCHASTIC:
        return f"`state` is {state.dtype}, which has to be rounded stochastically; the kernel rounds to nearest"
    return None


PACKAGES: dict[str, Package] = {
    "causal_conv1d": Package("causal_conv1d", "causal_conv1d", "causal_conv1d_fn", _conv_limits),
    "causal_conv1d_update": Package("causal_conv1d", "causal_conv1d", "causal_conv1d_update", _conv_update_limits),
    "ssd_chunk_scan": Package("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", _any),
    "selective_state_update": Package(
        "mamba_ssm", "mamba_ssm.ops.triton.selective_state_update", "selective_state_update", rounds_to_nearest
    ),
    "gated_rms_norm": Package("mamba_ssm", "mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn", _any),
    "rms_norm": Package("liger_kernel", "liger_kernel.ops.rms_norm", "LigerRMSNormFunction.apply", _any),
}

# Looked for once: an import machinery that is asked at every call would cost more than a kernel.
INSTALLED: dict[str, bool] = {
    name: importlib.util.find_spec(name) is not None
    for name in ("mamba_ssm", "causal_conv1d", "liger_kernel", "flash_attn")
}
