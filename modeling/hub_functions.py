"""The names under which transformers' NemotronH lets kernels in: a `KernelConfig` written for it applies here too.

`RMSNorm` is a layer (`norms.py`); the others are functions of the Mamba-2 mixer. `kernelize` (`use_kernels=True`) looks for
functions in a module's `_kernel_funcs`, checks that a kernel's arguments are those of the `forward` here, and puts the
kernel in its place. Each mixer has functions of its own, so that kernels of one model do not serve another. Where nothing
was put in place, the registry of `kernels_hub` chooses. `rotary_pos_emb`, which transformers registers as well, is left
out: this architecture has no rotary embedding that a kernel could compute.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class _Function(nn.Module):
    kernel_layer_name: str


class CausalConv1d(_Function):
    kernel_layer_name = "causal_conv1d_fn"

    def forward(self, hidden_states, weight, bias=None, activation=None, **kwargs):
        raise NotImplementedError


class CausalConv1dUpdate(_Function):
    kernel_layer_name = "causal_conv1d_update"

    def forward(self, hidden_states, conv_state, weight, bias=None, activation=None):
        raise NotImplementedError


class ChunkScan(_Function):
    kernel_layer_name = "mamba_chunk_scan_combined"

    def forward(
        self,
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        dt_bias=None,
        initial_states=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        **kwargs,
    ):
        raise NotImplementedError


class StateUpdate(_Function):
    kernel_layer_name = "selective_state_update"

    def forward(self, state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **kwargs):
        raise NotImplementedError


class WholeMixer(_Function):
    kernel_layer_name = "mamba_split_conv1d_scan_combined"

    def forward(
        self,
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        initial_states=None,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        activation="silu",
        rmsnorm_weight=None,
        rmsnorm_eps=1e-6,
        outproj_weight=None,
        outproj_bias=None,
        headdim=None,
        ngroups=1,
        norm_before_gate=True,
        **kwargs,
    ):
        raise NotImplementedError


def mamba2_functions() -> dict[str, nn.Module]:
    """The functions of one mixer, by the names of its `_kernel_funcs`."""
    functions = (CausalConv1d(), CausalConv1dUpdate(), ChunkScan(), StateUpdate(), WholeMixer())
    return {function.kernel_layer_name: function for function in functions}


def put_in_place(function: nn.Module) -> Callable[..., torch.Tensor] | None:
    """The kernel that `kernelize` put in the place of `function`, or None."""
    forward = function.__dict__.get("forward")
    return None if forward is None or forward.__func__ is type(function).forward else function
