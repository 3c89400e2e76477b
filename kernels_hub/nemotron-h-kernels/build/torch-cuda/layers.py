"""The kernels as layers for `kernels.kernelize`, under the names and with the arguments of transformers' Mamba-2 models.

A class here holds nothing: `kernelize` puts its `forward` in the place of a layer's or a function's, which keeps its weights.
What a kernel cannot do raises here, naming the argument: nothing is computed in another way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv1d import causal_conv1d as _conv
from .causal_conv1d import causal_conv1d_update as _conv_update
from .rms_norm import gated_rms_norm, rms_norm
from .selective_state_update import selective_state_update as _step
from .ssd_chunk_scan import ssd_chunk_scan as _scan


def _expect_silu(activation: str | None) -> None:
    if activation not in ("silu", "swish"):
        raise ValueError(f"`activation` is {activation!r}: the convolution kernels apply 'silu'.")


def _expect_none(named: dict, *names: str) -> None:
    """Arguments that models pass on for other layers do no harm; these would change the result."""
    for name in names:
        if named.get(name) is not None:
            raise ValueError(f"`{name}` is given: the kernel does not take it.")


def _time_steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    return dt if tuple(dt_limit) == (0.0, float("inf")) else dt.clamp(*dt_limit)


class RMSNorm(nn.Module):
    """In the place of a norm with `weight` and `variance_epsilon`; computes in float32, the weight included."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class causal_conv1d_fn(nn.Module):  # noqa: N801
    """hidden_states (batch, channels, seq), weight (channels, kernel); `seq_idx` (batch, seq) keeps documents apart."""

    can_torch_compile = True

    def forward(self, hidden_states, weight, bias=None, activation=None, **kwargs):
        _expect_silu(activation)
        _expect_none(kwargs, "initial_states")
        x = hidden_states.transpose(1, 2)
        return _conv(x, weight, bias, None, kwargs.get("seq_idx")).transpose(1, 2)


class causal_conv1d_update(nn.Module):  # noqa: N801
    """hidden_states (batch, channels, tokens), conv_state (batch, channels, kernel), advanced in place."""

    can_torch_compile = True
    has_backward = False

    def forward(self, hidden_states, conv_state, weight, bias=None, activation=None):
        _expect_silu(activation)
        if conv_state.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"`conv_state` holds {conv_state.shape[-1]} inputs and `weight` has {weight.shape[-1]} taps: they "
                "have to be as many."
            )
        if hidden_states.dim() == 2:
            return _conv_update(conv_state, hidden_states, weight, bias)
        steps = [_conv_update(conv_state, x, weight, bias) for x in hidden_states.unbind(-1)]
        return torch.stack(steps, -1)


class mamba_chunk_scan_combined(nn.Module):  # noqa: N801
    """hidden_states (batch, seq, heads, head_dim), dt (batch, seq, heads) before its bias and softplus."""

    can_torch_compile = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs,
    ):
        _expect_none(kwargs, "z", "cu_seqlens")
        dt = _time_steps(dt, dt_bias, dt_softplus, dt_limit)
        D = torch.zeros_like(A) if D is None else D
        y, state = _scan(hidden_states, dt, A, B, C, D, chunk_size, initial_states, kwargs.get("seq_idx"))
        return (y, state) if return_final_states else y


class selective_state_update(nn.Module):  # noqa: N801
    """One token: state (batch, heads, head_dim, state_size), advanced in place; dt, A, D and dt_bias expanded over head_dim."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        state: torch.Tensor,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        z: torch.Tensor | None = None,
        **kwargs,
    ):
        _expect_none(kwargs, "state_batch_indices")
        for name, value, dims in (("dt", dt, 1), ("A", A, 2), ("D", D, 1), ("dt_bias", dt_bias, 1)):
            if value is not None and any(value.stride(-1 - d) and value.shape[-1 - d] > 1 for d in range(dims)):
                raise ValueError(f"`{name}` differs inside a head: the kernel takes one number a head, expanded.")
        A, dt, D = A[..., 0, 0], dt[..., 0], torch.zeros_like(A[..., 0, 0]) if D is None else D[..., 0]
        dt = _time_steps(dt, None if dt_bias is None else dt_bias[..., 0], dt_softplus, (0.0, float("inf")))
        y = _step(state, hidden_states, dt, A, B, C, D)
        return y if z is None else (y.float() * F.silu(z.float())).to(y.dtype)


class mamba_split_conv1d_scan_combined(nn.Module):  # noqa: N801
    """From the input projection (batch, seq, z + x + B + C + dt) to the mixer's output; gate first, then norm."""

    can_torch_compile = True

    def forward(
        self,
        zxbcdt: torch.Tensor,
        conv1d_weight: torch.Tensor,
        conv1d_bias: torch.Tensor | None,
        dt_bias: torch.Tensor,
        A: torch.Tensor,
        D: torch.Tensor,
        chunk_size: int,
        initial_states: torch.Tensor | None = None,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        activation: str = "silu",
        rmsnorm_weight: torch.Tensor | None = None,
        rmsnorm_eps: float = 1e-6,
        outproj_weight: torch.Tensor | None = None,
        outproj_bias: torch.Tensor | None = None,
        headdim: int | None = None,
        ngroups: int = 1,
        norm_before_gate: bool = True,
        **kwargs,
    ):
        _expect_silu(activation)
        if norm_before_gate or rmsnorm_weight is None or headdim is None:
            raise ValueError("The kernel wants `norm_before_gate=False`, `rmsnorm_weight` and `headdim`.")
        batch, length, _ = zxbcdt.shape
        heads, width = A.shape[0], A.shape[0] * headdim
        shared = conv1d_weight.shape[0] - width  # of B and C together
        z, xBC, dt = zxbcdt.split([width, width + shared, heads], dim=-1)
        seq_idx = kwargs.get("seq_idx")
        x, B, C = _conv(xBC, conv1d_weight, conv1d_bias, None, seq_idx).split(
            [width, shared // 2, shared // 2], dim=-1
        )
        y, state = _scan(
            x.view(batch, length, heads, headdim),
            _time_steps(dt, dt_bias, True, dt_limit),
            A,
            B.view(batch, length, ngroups, -1),
            C.view(batch, length, ngroups, -1),
            D,
            chunk_size,
            initial_states,
            seq_idx,
        )
        y = gated_rms_norm(y.reshape(batch, length, width), z, rmsnorm_weight, rmsnorm_eps, width // ngroups)
        y = y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)
        return (y, state) if return_final_states else y


__all__ = [
    "RMSNorm",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "selective_state_update",
]
