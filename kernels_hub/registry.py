"""Which implementation serves each op: a kernel from a repository, an installed package, the bundled Triton kernels, or torch.

The choice is made at each call from what the tensors are (device, dtype, shape), by plain tests: nothing is tried and
caught. Left alone, the best that can serve does. To force one:

    NEMOTRON_SUPER_KERNELS=torch                        in the environment, for every op
    NEMOTRON_SUPER_KERNELS=torch,rms_norm=triton        every op, then single ones
    with use_kernels("torch"): ...                      for a stretch of code; also use_kernels(ssd_chunk_scan="triton")

A forced choice that cannot serve a call raises `KernelError`, naming the op and the reason. `report()` says what serves.

Sources: `hub`, a kernel repository added with `add_kernel_repository`, or what `use_kernels=True` of transformers put in the
place of a function (`hub=` at the call); `triton`, the kernels that travel with this package; `package`, mamba-ssm,
causal-conv1d or Liger where installed, only where forced: beside them the bundled kernels took less time or as much, but for up to 1.2
times as much for a long prompt's convolution (H200, 2026-12-01, `tests/benchmarks/kernels.py`); `torch`, the reference, which serves
everything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import conventions
from .reference.add_rms_norm import add_rms_norm as _add_rms_norm
from .reference.causal_conv1d import causal_conv1d as _causal_conv1d
from .reference.causal_conv1d import causal_conv1d_update as _causal_conv1d_update
from .reference.causal_conv1d import conv_misfit
from .reference.decode_attention import decode_attention as _decode_attention
from .reference.dispatch import misshapen
from .reference.fill_slots import fill_slots as _fill_slots
from .reference.keep_drafts import keep_drafts as _keep_drafts
from .reference.likeliest import likeliest as _likeliest
from .reference.linear import joint_linear as _joint_linear
from .reference.linear import small_batch_linear as _small_batch_linear
from .reference.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy
from .reference.moe_experts import experts_misfit, pairs_misfit
from .reference.moe_experts import moe_experts as _moe_experts
from .reference.quantized_experts import fp8_experts as _fp8_experts
from .reference.quantized_experts import nvfp4_experts as _nvfp4_experts
from .reference.quantized_linear import fp8_linear as _fp8_linear
from .reference.quantized_linear import nvfp4_linear as _nvfp4_linear
from .reference.relu_squared import relu_squared as _relu_squared
from .reference.replay import causal_conv1d_replay as _causal_conv1d_replay
from .reference.replay import selective_state_replay as _selective_state_replay
from .reference.rms_norm import gated_rms_norm as _gated_rms_norm
from .reference.rms_norm import rms_norm as _rms_norm
from .reference.selective_state_update import selective_state_update as _selective_state_update
from .reference.ssd_chunk_scan import scan_misfit
from .reference.ssd_chunk_scan import ssd_chunk_scan as _ssd_chunk_scan
from .reference.time_step import step_and_decay as _step_and_decay
from .reference.topk_routing import route_few_tokens as _route_few_tokens
from .reference.topk_routing import router_logits as _router_logits
from .reference.topk_routing import topk_routing as _topk_routing

BUNDLE = Path(__file__).parent / "nemotron-h-kernels"
SETTING = "NEMOTRON_SUPER_KERNELS"
SOURCES = ("hub", "triton", "package", "torch")
_SERVED = (torch.bfloat16, torch.float32)
# Of a call of experts in float32; what serves more has to know on the host how many tokens each expert has.
FLOAT32_TOKENS = 128


class KernelError(RuntimeError):
    """A forced kernel cannot serve, or the setting names what does not exist."""


def _dtype_of(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = _SERVED) -> str | None:
    if tensor.dtype in dtypes:
        return None
    return f"`{name}` is {tensor.dtype}, the kernel serves {', '.join(str(d) for d in dtypes)}"


def _dense_tail(name: str, tensor: Tensor, dims: int) -> str | None:
    """The last `dims` dimensions have to lie without gaps."""
    stride = 1
    for dim in range(-1, -dims - 1, -1):
        if tensor.stride(dim) != stride and tensor.shape[dim] > 1:
            return f"`{name}` has strides {tensor.stride()}: its last {dims} dimensions have to be contiguous"
        stride *= tensor.shape[dim]
    return None


# Why the Triton kernel of an op cannot serve these arguments, or None. Devices are looked at before.


def _norm_limits(x: Tensor, weight: Tensor, eps: float) -> str | None:
    if x.shape[-1] > 65536:
        return f"`x` is {x.shape[-1]} wide, the kernel holds at most 65536 in one program"
    return _dtype_of("x", x) or misshapen(("weight", weight, x.shape[-1:]))


def _gated_norm_limits(y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> str | None:
    if y.shape[-1] % group_size:
        return f"`y` is {y.shape[-1]} wide, which groups of {group_size} do not divide"
    misfit = misshapen(("z", z, y.shape), ("weight", weight, y.shape[-1:]))
    return misfit or _dtype_of("y", y) or _dtype_of("z", z)


def _conv_limits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> str | None:
    if x.shape[0] > 65535:
        return f"`x` has {x.shape[0]} rows, a launch takes 65535"
    return conv_misfit(x, weight, bias, state, seq_idx) or _dtype_of("x", x)


def _conv_update_limits(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    misfit = misshapen(
        ("x", x, state.shape[:2]), ("weight", weight, state.shape[1:]), ("bias", bias, state.shape[1:2])
    )
    return misfit or _dtype_of("x", x) or _dense_tail("state", state, 2)


def _scan_limits(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> str | None:
    if x.numel() == 0:
        return "`x` is empty"
    for name, size, served in (
        ("head_dim", x.shape[-1], (16, 32, 64)),
        ("state_size", B.shape[-1], (16, 32, 64, 128)),
    ):
        if size not in served and (x.is_cuda or size > served[-1]):
            return f"{name} {size}: the compiled kernel serves {', '.join(map(str, served))}"
    if x.is_cuda and x.dtype != torch.bfloat16:
        return f"`x` is {x.dtype}, the compiled kernel serves torch.bfloat16"
    if B.dtype != x.dtype or C.dtype != x.dtype:
        return f"`x`, `B` and `C` are {x.dtype}, {B.dtype} and {C.dtype}: the kernel wants one dtype"
    return scan_misfit(x, dt, A, B, C, D, initial_state, seq_idx) or _dtype_of("x", x)


def _step_limits(dt: Tensor, dt_bias: Tensor, A_log: Tensor, *time_step: Any, **named: Any) -> str | None:
    if not 0 < dt.shape[0] < 65536:
        return f"`dt` has {dt.shape[0]} rows, a launch takes 1 to 65535"
    return _dtype_of("dt", dt) or misshapen(("dt_bias", dt_bias, dt.shape[-1:]), ("A_log", A_log, dt.shape[-1:]))


def _state_update_limits(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *others: Any, **named: Any
) -> str | None:
    misfit = _state_misfit(state, (state.shape[0],), x, dt, A, B, C, D)
    return misfit or conventions.rounds_to_nearest(state) or _dtype_of("x", x) or _dense_tail("state", state, 2)


def _state_misfit(
    state: Tensor, tokens: tuple[int, ...], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> str | None:
    """Of one token a row, or of some: `tokens` are the dimensions in front."""
    _, heads, head_dim, size = state.shape
    if B.shape[:-2] != tokens or B.shape[-1] != size or heads % B.shape[-2]:
        return f"`B` has shape {tuple(B.shape)}, `state` {tuple(state.shape)}"
    per_head = (heads,)
    return misshapen(
        ("x", x, (*tokens, heads, head_dim)), ("dt", dt, (*tokens, heads)), ("A", A, per_head), ("D", D, per_head), ("C", C, B.shape)
    )  # fmt: skip


def _logits_limits(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype == weight.dtype == torch.bfloat16 and not x.is_cuda:
        return "in bfloat16 the kernel needs a GPU"
    return _product_misfit(x, weight) or _dtype_of("x", x)


def _product_misfit(x: Tensor, weight: Tensor) -> str | None:
    if weight.dtype != x.dtype:
        return f"`x` and `weight` are {x.dtype} and {weight.dtype}: the kernel wants one dtype"
    if weight.shape[-1] != x.shape[-1]:
        return f"`x` is {tuple(x.shape)}, `weight` {tuple(weight.shape)}"
    return None


def _routing_limits(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    normalise: bool = True,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
) -> str | None:
    reason = _dtype_of("logits", logits, (torch.float32,)) or _dtype_of("bias", bias, (torch.float32,))
    return _choice_limits(logits.shape[-1], bias, top_k, n_group) or reason


def _choice_limits(experts: int, bias: Tensor, top_k: int, n_group: int) -> str | None:
    if top_k > experts:
        return f"`top_k` is {top_k}, there are {experts} experts"
    if n_group > 1:
        return f"`n_group` is {n_group}, the kernel knows one group"
    misfit = misshapen(("bias", bias, (experts,)))
    return misfit or (f"{experts} experts, the kernel serves up to 4096" if experts > 4096 else None)


def _route_few_limits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    narrowing: Tensor | None,
    top_k: int,
    normalise: bool = True,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
) -> str | None:
    products = (_small_linear_limits(x, w) for w in (weight, narrowing) if w is not None)
    reason = next(filter(None, products), None) or _dtype_of("bias", bias, (torch.float32,))
    return _choice_limits(weight.shape[0], bias, top_k, n_group) or reason


def _experts_limits(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> str | None:
    if up.dtype != x.dtype or down.dtype != x.dtype:
        return f"`x`, `up` and `down` are {x.dtype}, {up.dtype} and {down.dtype}: the kernel wants one dtype"
    if x.dtype == torch.float32 and (torch.is_grad_enabled() or x.shape[0] > FLOAT32_TOKENS):
        return f"in float32 the kernel serves up to {FLOAT32_TOKENS} tokens, without gradients"
    if up.shape[0] > 32767:
        return f"{up.shape[0]} experts, the kernel serves up to 32767"
    if x.dtype == torch.bfloat16 and (x.shape[1] % 8 or up.shape[1] % 8):
        return f"width {x.shape[1]} and intermediate {up.shape[1]}: grouped_mm wants multiples of 8"
    misfit = experts_misfit(x, index, weights, up, down)
    return misfit or _dtype_of("x", x) or _dense_tail("up", up, 3) or _dense_tail("down", down, 3)


def _packed_limits(x: Tensor, *matrices: tuple[Tensor, ...]) -> str | None:
    """Of quantised weights, each with its scales behind it."""
    for codes, *scales in matrices:
        if codes.dtype == torch.float8_e4m3fn and codes.shape[-1] % 8:
            return f"a weight has rows of {codes.shape[-1]}, the kernel serves FP8 in multiples of 8"
        for tensor in (codes, *scales):
            if not tensor.is_contiguous():
                return (
                    f"a weight's storage has shape {tuple(tensor.shape)} and strides {tensor.stride()}: not contiguous"
                )
        # A compiler cannot trace where a tensor begins; behind it, the kernel's view as words refuses what this would.
        if not torch.compiler.is_compiling() and codes.storage_offset() % 8:
            return f"a weight begins at byte {codes.storage_offset()} of its storage, not at a multiple of 8"
    return _dtype_of("x", x)


def _packed_misfit(name: str, width: int, codes: Tensor, *scales: Tensor) -> str | None:
    """Of a quantised weight (..., out, in) whose inputs are `width` wide."""
    two = codes.dtype == torch.uint8  # numbers of NVFP4 in a byte, and scales of 16 of them
    inputs = 2 * codes.shape[-1] if two else codes.shape[-1]
    if inputs != width:
        return f"`{name}` has {inputs} inputs, and {width} come"
    wanted = [(*codes.shape[:-1], inputs // 16), codes.shape[:-2]] if two else [codes.shape[:-2]]
    return misshapen(*((f"{name}'s scale", *pair) for pair in zip(scales, wanted, strict=True)))


def _nvfp4_linear_limits(
    x: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor, *epilogue: Any, **named: Any
) -> str | None:
    weight = packed, scale, global_scale
    return _packed_misfit("weight", x.shape[-1], *weight) or _packed_limits(x, weight)


def _fp8_linear_limits(x: Tensor, weight: Tensor, scale: Tensor, *epilogue: Any, **named: Any) -> str | None:
    return _packed_misfit("weight", x.shape[-1], weight, scale) or _packed_limits(x, (weight, scale))


def _packed_experts_limits(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    input_scales: tuple[Tensor, Tensor] | None = None,
) -> str | None:
    if input_scales is not None:
        return "activations are simulated, which the kernel does not do"
    if up[0].shape[0] > 32767:
        return f"{up[0].shape[0]} experts, the kernel serves up to 32767"
    misfit = pairs_misfit(x, index, weights) or _packed_misfit("up", x.shape[-1], *up)
    misfit = misfit or _packed_misfit("down", up[0].shape[-2], *down)
    if misfit is None and (down[0].shape[0] != up[0].shape[0] or down[0].shape[-2] != x.shape[-1]):
        misfit = f"`down` is {tuple(down[0].shape)}, `up` {tuple(up[0].shape)} and `x` {tuple(x.shape)}"
    return misfit or _packed_limits(x, up, down)


def _add_norm_limits(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    if residual.dtype != x.dtype or residual.shape != x.shape:
        return f"`x` and `residual` are {x.dtype} {tuple(x.shape)} and {residual.dtype} {tuple(residual.shape)}"
    return _norm_limits(x, weight, eps)


def _conv_replay_limits(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    drafts: Tensor | None = None,
    settled: int = 0,
    kept: Tensor | None = None,
) -> str | None:
    if x.shape[0] != state.shape[0] or x.shape[-1] < state.shape[1]:
        return f"`x` has shape {tuple(x.shape)}, `state` {tuple(state.shape)}"
    misfit = misshapen(("weight", weight, state.shape[1:]), ("bias", bias, state.shape[1:2]))
    if misfit is not None:
        return misfit
    if drafts is None:
        return _replayed(0, settled) or _dtype_of("x", x) or _dense_tail("state", state, 2)
    if drafts.dtype != x.dtype or x.shape[1] > drafts.shape[1]:
        return f"`drafts` is {drafts.dtype} {tuple(drafts.shape)}, it has to take `x`, {x.dtype} {tuple(x.shape)}"
    dense = _dense_tail("state", state, 2) or _dense_tail("drafts", drafts, 1)
    return _replayed(drafts.shape[1], settled) or _dtype_of("x", x) or dense


def _state_replay_limits(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    settled: int = 0,
    *time_step: Any,
    **named: Any,
) -> str | None:
    nearest = conventions.rounds_to_nearest(state) if settled else None
    if nearest is not None:
        return nearest
    if x.shape[1] > 96:
        return f"{x.shape[1]} tokens, the kernel replays up to 96"
    misfit = _state_misfit(state, (state.shape[0], x.shape[1]), x, dt, A, B, C, D)
    if misfit is not None:
        return misfit
    return _replayed(x.shape[1], settled) or _dtype_of("x", x) or _dense_tail("state", state, 2)


def _replayed(tokens: int, settled: int) -> str | None:
    return None if 0 <= settled <= tokens else f"`settled` is {settled}, there are {tokens} tokens"


def _small_linear_limits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu2: bool = False, plus: tuple[Tensor, ...] = ()
) -> str | None:
    if x.numel() > 64 * x.shape[-1]:
        return f"`x` is {tuple(x.shape)}, the kernel serves (..., in) with up to 64 tokens in all"
    out = *x.shape[:-1], weight.shape[0]
    misfit = _product_misfit(x, weight) or misshapen(
        ("bias", bias, weight.shape[:1]), *(("plus", term, out) for term in plus)
    )
    return misfit or _dtype_of("x", x)


def _joint_linear_limits(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    if not 1 <= len(weights) <= 3:
        return f"{len(weights)} weights, the kernel takes up to three"
    return next(filter(None, (_small_linear_limits(x, weight) for weight in weights)), None)


def _relu_squared_limits(x: Tensor) -> str | None:
    return _dtype_of("x", x)


def _decode_attention_limits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    last: Tensor,
    there: Tensor | None,
    scaling: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> str | None:
    fp8 = key.dtype == torch.float8_e4m3fn
    misfit = _attention_misfit(query, key, value, last, there)
    if misfit is not None:
        return misfit
    if value.dtype != key.dtype or (key.dtype != query.dtype and not fp8):
        return f"`query`, `key` and `value` are {query.dtype}, {key.dtype} and {value.dtype}"
    if fp8 != (k_scale is not None) or fp8 != (v_scale is not None):
        return f"`key` and `value` are {key.dtype}: the kernel wants `k_scale` and `v_scale` with FP8, and only then"
    if fp8 and query.is_cuda and _capability(query.device.index) < (8, 9):
        return "FP8 needs a GPU of compute capability 8.9"
    if fp8 and query.dtype != torch.float32:
        for name, tensor in (("key", key), ("value", value)):
            # A compiler cannot trace where a tensor begins; behind it, the kernel's view as pairs refuses what this would.
            begins = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
            if any(n % 2 for n in (begins, tensor.shape[-1], *tensor.stride()[:-1])):
                return f"`{name}` has rows of {tensor.shape[-1]} FP8 numbers that begin at odd places: they are read in pairs"
    if query.shape[-1] > 256:
        return f"head_dim {query.shape[-1]}, the kernel serves up to 256"
    if query.shape[0] > 65535:
        return f"`query` has {query.shape[0]} rows, a launch takes 65535"
    holes = None if there is None else _dense_tail("there", there, 1)
    return _dtype_of("query", query) or _dense_tail("key", key, 1) or _dense_tail("value", value, 1) or holes


def _attention_misfit(query: Tensor, key: Tensor, value: Tensor, last: Tensor, there: Tensor | None) -> str | None:
    batch, heads, tokens, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or heads % key.shape[1]:
        return f"`query` has shape {tuple(query.shape)}, `key` {tuple(key.shape)}"
    return misshapen(
        ("value", value, key.shape), ("last", last, (batch, tokens)), ("there", there, (batch, key.shape[2]))
    )


def _fill_slots_limits(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    index: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> str | None:
    fp8 = k_scale is not None
    if fp8 != (v_scale is not None) or new_values.dtype != new_keys.dtype:
        return "the kernel wants keys and values of one dtype, and scales for both or for none"
    batch, heads, tokens, head_dim = new_keys.shape
    misfit = misshapen(
        ("keys", keys, (batch, heads, keys.shape[2], head_dim)),
        ("values", values, keys.shape),
        ("new_values", new_values, new_keys.shape),
        ("index", index, (batch, tokens)),
    )
    if misfit is not None:
        return misfit
    wanted = torch.float8_e4m3fn if fp8 else new_keys.dtype
    if keys.dtype != wanted or values.dtype != wanted:
        return f"`keys` and `values` are {keys.dtype} and {values.dtype}, the kernel would write {wanted}"
    if fp8 and keys.is_cuda and _capability(keys.device.index) < (8, 9):
        return "FP8 needs a GPU of compute capability 8.9"
    return _dtype_of("new_keys", new_keys) or _dense_tail("keys", keys, 1) or _dense_tail("values", values, 1)


def _likeliest_limits(logits: Tensor, out: Tensor) -> str | None:
    misfit = misshapen(("out", out, logits.shape[:-1]))
    if misfit is not None:
        return misfit
    if out.dim() > 2:
        return f"`out` has {out.dim()} dimensions, the kernel serves up to 2"
    if logits.numel() // max(1, logits.shape[-1]) > 2**31 - 1 or logits.shape[-1] > 2**27:
        return f"`logits` is {tuple(logits.shape)}, a launch takes 2^31 - 1 rows of 2^27 classes"
    return _dtype_of("logits", logits)


def _keep_drafts_limits(
    tokens: Tensor,
    own: Tensor,
    stops: Tensor,
    room: Tensor,
    kept: Tensor,
    newest: Tensor,
    positions: Tensor,
    accepted: Tensor,
) -> str | None:
    rows = own.shape[:1]
    misfit = misshapen(
        ("tokens", tokens, own.shape), ("room", room, rows), ("kept", kept, rows), ("newest", newest, rows),
        ("accepted", accepted, rows), ("positions", positions, (*rows, *positions.shape[1:])),
    )  # fmt: skip
    if misfit is not None:
        return misfit
    if own.shape[1] > 64 or stops.shape[0] > 1024:
        return f"{own.shape[1]} tokens and {stops.shape[0]} stops, the kernel serves up to 64 and 1024"
    named = {"tokens": tokens, "own": own, "stops": stops, "room": room, "kept": kept, "newest": newest}
    gaps = (_dense_tail(name, tensor, 1) for name, tensor in {**named, "positions": positions}.items())
    return next(filter(None, gaps), None)


def _cross_entropy_limits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> str | None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.dtype != hidden.dtype:
        return f"`hidden` is {hidden.dtype} {tuple(hidden.shape)}, `weight` {weight.dtype} {tuple(weight.shape)}"
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        return f"`targets` is {targets.dtype} {tuple(targets.shape)}, the kernel wants int64 {tuple(hidden.shape[:1])}"
    if weights is not None and (weights.shape != targets.shape or not weights.is_floating_point()):
        return f"`weights` is {weights.dtype} {tuple(weights.shape)}, the kernel wants floats {tuple(targets.shape)}"
    if weights is not None and torch.is_grad_enabled() and weights.requires_grad:
        return "`weights` require a gradient, and get none here: detach them"
    return _dtype_of("hidden", hidden)


class Op:
    """One op: call it with the arguments of its reference, and what serves best answers.

    Args:
        limits: why the bundled kernel cannot serve such arguments, or None.
        gradient: whether kernels have one; without it they serve where nothing wants one.
    """

    def __init__(self, name: str, reference: Callable, limits: Callable, gradient: bool = True):
        self.name, self.reference, self.limits, self.gradient = name, reference, limits, gradient
        self.kernels: dict[str, Callable] = {}  # by source, once loaded

    def __call__(self, *args: Any, hub: Callable | None = None, **kwargs: Any) -> Any:
        forced = _forced.get(self.name)
        if hub is not None and forced in (None, "hub"):
            # Whoever kernelized the model has chosen this one: it speaks the convention of the name it was chosen by.
            return getattr(conventions, self.name)(hub, *args, **kwargs)
        # Without these lines first, a decoded token would pay for choices that have one outcome.
        first = args[0] if args else _first_tensor(kwargs)
        if forced == "torch" or (forced is None and not first.is_cuda):
            return self.reference(*args, **kwargs)
        if forced is None and _bundled_alone(first.device) and self._within(self.limits, args, kwargs) is None:
            return self._kernel("triton")(*args, **kwargs)
        source, kernel, reason = self.choose(*args, **kwargs)
        if forced is not None and source != forced:
            raise KernelError(f"`{self.name}` is forced to {forced!r}, which cannot serve this call: {reason}.")
        return kernel(*args, **kwargs)

    def choose(self, *args: Any, **kwargs: Any) -> tuple[str, Callable, str]:
        """What serves these arguments: source, function, and why nothing better does (empty if nothing is)."""
        forced = _forced.get(self.name)
        first = args[0] if args else _first_tensor(kwargs)
        reasons: list[str] = []
        for source in ("hub", "package", "triton") if forced is None else (forced,):
            reason = _cannot_load(source, self.name) or _cannot_run(first.device, forced is not None)
            reason = reason or self._cannot_serve(source, first, *args, **kwargs)
            if reason is None:
                return source, self._kernel(source), "; ".join(reasons)
            reasons.append(f"{source}: {reason}" if forced is None else reason)
        return "torch", self.reference, "; ".join(reasons)

    def _cannot_serve(self, source: str, first: Tensor, *args: Any, **kwargs: Any) -> str | None:
        if source == "package":
            limits = conventions.PACKAGES[self.name].limits
            return _dtype_of("the first argument", first) or self._within(limits, args, kwargs)
        return self._within(self.limits, args, kwargs)

    def _within(self, limits: Callable, args: tuple, kwargs: dict[str, Any]) -> str | None:
        if not self.gradient and torch.is_grad_enabled() and _wants_gradient((*args, *kwargs.values())):
            return "the kernel has no gradient: call it under `torch.no_grad()`"
        return limits(*args, **kwargs)

    def _kernel(self, source: str) -> Callable:
        if source not in self.kernels:
            if source == "package":
                adapter, package = getattr(conventions, self.name), conventions.PACKAGES[self.name].load()
                self.kernels[source] = functools.partial(adapter, package)
            else:
                module = _repositories[0] if source == "hub" else _bundle()
                self.kernels[source] = getattr(module, self.name)
        return self.kernels[source]


def _wants_gradient(values: Iterable[Any]) -> bool:
    return any(
        value.requires_grad
        if isinstance(value, Tensor)
        else isinstance(value, list | tuple) and _wants_gradient(value)
        for value in values
    )


def _first_tensor(named: dict[str, Any]) -> Tensor:
    return next(value for value in named.values() if isinstance(value, Tensor))


causal_conv1d = Op("causal_conv1d", _causal_conv1d, _conv_limits)
causal_conv1d_update = Op("causal_conv1d_update", _causal_conv1d_update, _conv_update_limits, gradient=False)
ssd_chunk_scan = Op("ssd_chunk_scan", _ssd_chunk_scan, _scan_limits)
step_and_decay = Op("step_and_decay", _step_and_decay, _step_limits, gradient=False)
selective_state_update = Op("selective_state_update", _selective_state_update, _state_update_limits, gradient=False)
rms_norm = Op("rms_norm", _rms_norm, _norm_limits)
gated_rms_norm = Op("gated_rms_norm", _gated_rms_norm, _gated_norm_limits)
router_logits = Op("router_logits", _router_logits, _logits_limits)
topk_routing = Op("topk_routing", _topk_routing, _routing_limits)
moe_experts = Op("moe_experts", _moe_experts, _experts_limits)
nvfp4_linear = Op("nvfp4_linear", _nvfp4_linear, _nvfp4_linear_limits)
fp8_linear = Op("fp8_linear", _fp8_linear, _fp8_linear_limits)
nvfp4_experts = Op("nvfp4_experts", _nvfp4_experts, _packed_experts_limits)
fp8_experts = Op("fp8_experts", _fp8_experts, _packed_experts_limits)
linear_cross_entropy = Op("linear_cross_entropy", _linear_cross_entropy, _cross_entropy_limits)
relu_squared = Op("relu_squared", _relu_squared, _relu_squared_limits)
small_batch_linear = Op("small_batch_linear", _small_batch_linear, _small_linear_limits, gradient=False)
fill_slots = Op("fill_slots", _fill_slots, _fill_slots_limits, gradient=False)
decode_attention = Op("decode_attention", _decode_attention, _decode_attention_limits, gradient=False)
likeliest = Op("likeliest", _likeliest, _likeliest_limits)
keep_drafts = Op("keep_drafts", _keep_drafts, _keep_drafts_limits)
# Made of other ops: where these kernels do not serve, what serves those does.
joint_linear = Op(
    "joint_linear", functools.partial(_joint_linear, multiply=small_batch_linear), _joint_linear_limits, gradient=False
)
causal_conv1d_replay = Op(
    "causal_conv1d_replay",
    functools.partial(_causal_conv1d_replay, conv=causal_conv1d),
    _conv_replay_limits,
    gradient=False,
)
selective_state_replay = Op(
    "selective_state_replay",
    functools.partial(_selective_state_replay, scan=ssd_chunk_scan),
    _state_replay_limits,
    gradient=False,
)
route_few_tokens = Op(
    "route_few_tokens",
    functools.partial(_route_few_tokens, logits_of=router_logits, choose=topk_routing, multiply=small_batch_linear),
    _route_few_limits,
    gradient=False,
)
add_rms_norm = Op("add_rms_norm", functools.partial(_add_rms_norm, norm=rms_norm), _add_norm_limits)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        causal_conv1d,
        causal_conv1d_update,
        ssd_chunk_scan,
        step_and_decay,
        selective_state_update,
        rms_norm,
        gated_rms_norm,
        router_logits,
        topk_routing,
        route_few_tokens,
        moe_experts,
        *(nvfp4_linear, fp8_linear, nvfp4_experts, fp8_experts),
        linear_cross_entropy,
        relu_squared,
        small_batch_linear,
        joint_linear,
        fill_slots,
        decode_attention,
        likeliest,
        keep_drafts,
        causal_conv1d_replay,
        selective_state_replay,
        add_rms_norm,
    )
}

_repositories: list[ModuleType] = []  # at most one
_has_triton = importlib.util.find_spec("triton") is not None


def _parse(setting: str, said_by: str = SETTING) -> dict[str, str]:
    """`"torch,rms_norm=triton"` -> the forced source of each op."""
    forced: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in setting.split(","))):
        name, equals, source = part.rpartition("=")
        if equals and name not in OPS:
            raise KernelError(f"{said_by} names the op {name!r}; there are {', '.join(OPS)}.")
        if source not in (*SOURCES, "auto"):
            raise KernelError(f"{said_by} names the source {source!r}; there are auto, {', '.join(SOURCES)}.")
        for op in (name,) if equals else OPS:
            forced.pop(op, None)
            if source != "auto":
                forced[op] = source
    return forced


_environment = _parse(os.environ.get(SETTING, ""))
# Those that last: what each makes of what was forced before it.
_contexts: list[Callable[[dict[str, str]], dict[str, str]]] = []
_forced = _environment


def _force() -> None:
    global _forced
    _forced = functools.reduce(lambda forced, context: context(forced), _contexts, _environment)


@contextlib.contextmanager
def use_kernels(source: str = "", **by_op: str) -> Iterator[None]:
    """Force what serves, for every op or for those named, while the context lasts; in all threads, as autograd has its own.

    Args:
        source: `torch`, `triton`, `package`, `hub`, or `auto` for the best; for every op.
        by_op: the same for single ops, such as `ssd_chunk_scan="triton"`.

    Raises:
        KernelError: an unknown op or source; later, where a forced kernel cannot serve a call.
    """
    setting = ",".join([source, *(f"{name}={wanted}" for name, wanted in by_op.items())])
    wanted = _parse(setting, "`use_kernels`")

    def context(before: dict[str, str]) -> dict[str, str]:
        # What is not named stays as it was.
        return wanted if source else {**wanted, **{k: v for k, v in before.items() if k not in by_op}}

    _contexts.append(context)
    _force()
    try:
        yield
    finally:
        _contexts.remove(context)  # not the last one, where those of several threads end in another order
        _force()


def add_kernel_repository(repository: str | Path, version: int | None = None, trust_remote_code: bool = False) -> None:
    """Serve ops from a kernel repository, through the `kernels` library, before the bundled kernels.

    Args:
        repository: a folder with `build/` in it, or the name of a repository on the hub.
        version: version of a repository on the hub; needed there, so that what runs does not change by itself.
        trust_remote_code: allow a publisher whom the `kernels` library does not know.

    Raises:
        KernelError: `kernels` is not installed, no version was given, or the repository has none of the ops.
    """
    if importlib.util.find_spec("kernels") is None:
        raise KernelError("Kernel repositories are loaded by the `kernels` library: pip install kernels.")
    import kernels

    if Path(repository).is_dir():
        module = kernels.get_local_kernel(Path(repository))
    elif version is None:
        raise KernelError(f"Give the `version` of {str(repository)!r}: an unpinned kernel may change under you.")
    else:
        module = kernels.get_kernel(str(repository), version=version, trust_remote_code=trust_remote_code)
    if not any(hasattr(module, name) for name in OPS):
        raise KernelError(f"{str(repository)!r} has none of the ops {', '.join(OPS)}.")
    _repositories[:] = [module]
    for op in OPS.values():
        op.kernels.pop("hub", None)


def _cannot_load(source: str, op: str) -> str | None:
    if source == "hub":
        if not _repositories:
            return "no kernel repository was added"
        return None if hasattr(_repositories[0], op) else "the kernel repository lacks it"
    if source == "package":
        return _no_package(op)
    if source == "triton" and not _has_triton:
        return "triton is not installed"
    return None


def _no_package(op: str) -> str | None:
    package = conventions.PACKAGES.get(op)
    if package is None:
        return "no package has a kernel for it"
    if not conventions.INSTALLED[package.package]:
        return f"{package.package} is not installed"
    if _forced.get(op) != "package":
        return f"{package.package} serves only where forced: the bundled kernel is faster, or takes up to 1.2 times as long"
    if "package" not in OPS[op].kernels:
        try:
            OPS[op]._kernel("package")
        except Exception as error:  # of a broken or another version's package, which may raise anything
            kernel = f"`{package.attribute}` of {package.module}"
            return f"{package.package} is installed, but {kernel} cannot be loaded: {type(error).__name__}: {error}"
    return None


def _cannot_run(device: torch.device, forced: bool) -> str | None:
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels were not tried on AMD GPUs"
        return None if _capability(device.index) >= (8, 0) else "the GPU is older than compute capability 8.0"
    if device.type == "cpu" and forced and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter: slow, for tests
    return f"the tensors are on {device.type!r}, Triton serves 'cuda'"


def _bundled_alone(device: torch.device) -> bool:
    """Whether nothing comes before the bundled kernels, and they run there: no reasons have to be found."""
    return _has_triton and not _repositories and _cannot_run(device, False) is None


_capabilities: dict[int | None, tuple[int, int]] = {}


def _capability(index: int | None) -> tuple[int, int]:
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


BUNDLED = "nemotron_h_kernels_bundled"  # as which the bundled kernels are imported


def _bundle() -> ModuleType:
    """The bundled kernels, imported from their files as the `kernels` library does: their folder is no package name."""
    name = BUNDLED
    if name not in sys.modules:
        file = BUNDLE / "build" / "torch-cuda" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.exists():
            raise KernelError(f"The bundled kernels are missing: {file} does not exist. Install the package again.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


if _has_triton and torch.version.cuda is not None:
    _bundle()  # now, since a compiler that traces a model cannot follow an import


def _example(op: str, device: torch.device, dtype: torch.dtype) -> tuple:
    """Small arguments of the kind a model gives the op."""

    def t(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    real = torch.float32
    index = t(2, 2, dtype=torch.int64)
    byte, fp8 = torch.uint8, torch.float8_e4m3fn
    routed = t(2, 16), index, t(2, 2, dtype=real)
    return {
        "causal_conv1d": (t(1, 4, 16), t(16, 4)),
        "causal_conv1d_update": (t(1, 16, 4), t(1, 16), t(16, 4)),
        "ssd_chunk_scan": (t(1, 4, 2, 64), t(1, 4, 2, dtype=real), t(2), t(1, 4, 1, 128), t(1, 4, 1, 128), t(2)),
        "step_and_decay": (t(1, 4, 2), t(2), t(2)),
        "selective_state_update": (
            *(t(1, 2, 16, 16, dtype=real), t(1, 2, 16), t(1, 2, dtype=real), t(2), t(1, 1, 16), t(1, 1, 16), t(2)),
        ),
        "rms_norm": (t(2, 16), t(16), 1e-5),
        "gated_rms_norm": (t(2, 16), t(2, 16), t(16), 1e-5, 8),
        "router_logits": (t(2, 16), t(8, 16)),
        "topk_routing": (t(2, 8, dtype=real), t(8, dtype=real), 2),
        "route_few_tokens": (t(2, 16), t(8, 16), t(8, dtype=real), t(4, 16), 2),
        "moe_experts": (*routed, t(8, 32, 16), t(8, 16, 32)),
        "nvfp4_linear": (t(2, 16), t(8, 8, dtype=byte), t(8, 1, dtype=fp8), t(dtype=real)),
        "fp8_linear": (t(2, 16), t(8, 16, dtype=fp8), t(dtype=real)),
        "nvfp4_experts": (
            *routed,
            (t(8, 32, 8, dtype=byte), t(8, 32, 1, dtype=fp8), t(8, dtype=real)),
            (t(8, 16, 16, dtype=byte), t(8, 16, 2, dtype=fp8), t(8, dtype=real)),
        ),
        "fp8_experts": (
            *routed,
            (t(8, 32, 16, dtype=fp8), t(8, dtype=real)),
            (t(8, 16, 32, dtype=fp8), t(8, dtype=real)),
        ),
        "linear_cross_entropy": (t(2, 16), t(32, 16), t(2, dtype=torch.int64)),
        "relu_squared": (t(2, 16),),
        "small_batch_linear": (t(2, 16), t(8, 16)),
        "joint_linear": (t(2, 16), (t(8, 16), t(4, 16))),
        "fill_slots": (
            *(t(1, 2, 8, 16), t(1, 2, 8, 16), t(1, 2, 1, 16), t(1, 2, 1, 16)),
            t(1, 1, dtype=torch.int64),
        ),
        "decode_attention": (t(1, 4, 1, 16), t(1, 2, 8, 16), t(1, 2, 8, 16), t(1, 1, dtype=torch.int64), None, 0.25),
        "likeliest": (t(2, 16), t(2, dtype=torch.int64)),
        "keep_drafts": (index, index, *(t(2, dtype=torch.int64) for _ in range(4)), index, t(2, dtype=torch.int64)),
        "causal_conv1d_replay": (t(1, 16, 4), t(1, 3, 16), t(16, 4)),
        "selective_state_replay": (
            *(t(1, 2, 64, 128, dtype=real), t(1, 3, 2, 64), t(1, 3, 2, dtype=real), t(2)),
            *(t(1, 3, 1, 128), t(1, 3, 1, 128), t(2)),
        ),
        "add_rms_norm": (t(2, 16), t(2, 16), t(16), 1e-5),
    }[op]


def report(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """A table: each op, what serves it for tensors of this device and dtype, and why nothing better does."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = [("op", "served by", "why not better")]
    with torch.no_grad():
        for name, op in OPS.items():
            forced = _forced.get(name)
            source, _, reason = op.choose(*_example(name, device, dtype))
            if forced == source:
                reason = "forced" + (f" by {SETTING}" if not _contexts else " by `use_kernels`")
            elif forced is not None:
                source, reason = "none", f"forced to {forced}: {reason}"
            rows.append((name, source, reason))
    found = "is installed" if conventions.INSTALLED["flash_attn"] else "is not installed"
    rows.append(("attention", "transformers", f"set by `attn_implementation`; flash_attn {found}"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join([f"{device}, {str(dtype).removeprefix('torch.')}", *lines])
