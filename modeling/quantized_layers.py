"""Linear maps and routed experts whose frozen weights are stored as NVIDIA ModelOpt stores them, in NVFP4 or FP8.

Activations stay in full precision (W4A16, W8A16) unless `simulate_activations` asks for the stored input scales to be applied,
which gives the numerics of hardware that multiplies quantised operands. Gradients flow to the input, never to the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels_hub.reference.fp8 import dequantize_fp8
from ..kernels_hub.reference.nvfp4 import BLOCK, dequantize_nvfp4
from ..kernels_hub.reference.quantized_experts import experts_with_low_rank, fp8_experts, nvfp4_experts
from ..kernels_hub.reference.quantized_linear import fp8_linear, nvfp4_linear, simulate_fp8, simulate_nvfp4
from .linear import NemotronHLinear


@dataclass(frozen=True)
class WeightFormat:
    """How a weight (out, in) is stored, and the operations that work on what is stored.

    Attributes:
        name: ModelOpt's `quant_algo`.
        stored: by name in a checkpoint, what a row's length is divided by (0: a scalar) and the dtype; `weight` first.
        dequantize: (*stored, dtype) -> (out, in).
        linear: (x, *stored) -> x @ W^T.
        experts: (x, index, weights, up, down, input_scales) -> as in `kernels_hub/reference/quantized_experts.py`.
        simulate: (x, input_scale) -> x rounded as the hardware would.
        bits, group_size, divisor: for the configuration's JSON; a tensor's scale is its amax / divisor.
    """

    name: str
    stored: dict[str, tuple[int, torch.dtype]]
    dequantize: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    experts: Callable[..., Tensor]
    simulate: Callable[[Tensor, Tensor], Tensor]
    bits: int
    group_size: int | None
    divisor: float

    def empty(self, *shape: int) -> dict[str, Tensor]:
        """Uninitialised storage for weights of `shape` (..., out, in), input scale included."""
        *batch, rows, columns = shape
        sizes = {
            name: (*batch, rows, columns // part) if part else tuple(batch) for name, (part, _) in self.stored.items()
        }
        tensors = {name: torch.empty(sizes[name], dtype=dtype) for name, (_, dtype) in self.stored.items()}
        return {**tensors, "input_scale": torch.empty(tuple(batch), dtype=torch.float32)}


FORMATS = {
    "NVFP4": WeightFormat(
        name="NVFP4",
        stored={
            "weight": (2, torch.uint8),
            "weight_scale": (BLOCK, torch.float8_e4m3fn),
            "weight_scale_2": (0, torch.float32),
        },
        dequantize=dequantize_nvfp4,
        linear=nvfp4_linear,
        experts=nvfp4_experts,
        simulate=simulate_nvfp4,
        bits=4,
        group_size=BLOCK,
        divisor=6.0 * 448.0,
    ),
    "FP8": WeightFormat(
        name="FP8",
        stored={"weight": (1, torch.float8_e4m3fn), "weight_scale": (0, torch.float32)},
        # One scale for each of possibly several stacked matrices.
        dequantize=lambda weight, scale, dtype: dequantize_fp8(weight, scale[..., None, None], dtype),
        linear=fp8_linear,
        experts=fp8_experts,
        simulate=simulate_fp8,
        bits=8,
        group_size=None,
        divisor=448.0,
    ),
}


class _KeepsDtypes(nn.Module):
    """A module some of whose tensors have a dtype that means something: `model.bfloat16()` must not reach them."""

    _kept: tuple[str, ...] = ()

    def _apply(self, fn, recurse: bool = True):
        kept = {id(getattr(self, name)) for name in self._kept}

        def keep(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in kept and new.dtype != tensor.dtype else new

        return super()._apply(keep, recurse)

    def _store(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._kept = (*self._kept, name)


class _FeedsCache(_KeepsDtypes):
    """A map whose output may be kept in an FP8 cache, of which it then carries the scale."""

    cache_scale: str | None = None
    simulate_activations = False

    def add_cache_scale(self, name: str) -> None:
        """Make room for `k_scale` or `v_scale`, float32 ()."""
        self.register_buffer(name, torch.empty((), dtype=torch.float32, device=self.weight.device))
        self.cache_scale = name
        self._kept = (*dict.fromkeys((*self._kept, name)),)

    def _as_cached(self, out: Tensor) -> Tensor:
        if self.cache_scale is None or not self.simulate_activations:
            return out
        return simulate_fp8(out, getattr(self, self.cache_scale))


class CacheScaledLinear(_FeedsCache, NemotronHLinear):
    """A linear map in full precision that carries the scale of the FP8 cache it feeds."""

    def forward(self, x: Tensor) -> Tensor:
        return self._as_cached(super().forward(x))


class QuantizedLinear(_FeedsCache, nn.Linear):
    """`nn.Linear` with a frozen quantised weight. Input (..., in), output (..., out), both in the input's dtype.

    `weight`, `weight_scale`, in NVFP4 `weight_scale_2`, and `input_scale` are as the checkpoint stores them.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, weight_format: WeightFormat, dtype: torch.dtype
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight_format = in_features, out_features, weight_format
        self.compute_dtype = dtype  # read by PEFT, which would otherwise make adapters in the weight's dtype
        for name, tensor in weight_format.empty(out_features, in_features).items():
            self._store(name, tensor)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def stored(self) -> tuple[Tensor, ...]:
        """The weight and its scales, in the order the format's operations take them."""
        return tuple(getattr(self, name) for name in self.weight_format.stored)

    def forward(self, x: Tensor) -> Tensor:
        if self.simulate_activations:
            x = self.weight_format.simulate(x, self.input_scale)
        out = self.weight_format.linear(x, *self.stored())
        return self._as_cached(out if self.bias is None else out + self.bias.to(out.dtype))

    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        """The same map in full precision; this module stays as it is."""
        linear = NemotronHLinear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype
        )
        linear.weight = nn.Parameter(self.weight_format.dequantize(*self.stored(), dtype=dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.weight_format.name}"


class QuantizedExperts(_KeepsDtypes):
    """All routed experts of a layer, frozen and quantised, in place of `NemotronHExperts`.

    For NAME in `up_proj` and `down_proj`: codes in `NAME`, the rest in `NAME_weight_scale` and so on, each with a leading
    axis of experts.
    """

    def __init__(self, num_experts: int, intermediate: int, width: int, weight_format: WeightFormat):
        super().__init__()
        self.num_experts, self.weight_format = num_experts, weight_format
        self.simulate_activations = False
        # Adapters, by projection, for as long as they wrap a call: see `training/packed_adapters.py`.
        self.low_rank: dict[str, list[tuple[Tensor, Tensor]]] = {}
        shapes = {"up_proj": (intermediate, width), "down_proj": (width, intermediate)}
        self.shapes = {name: (num_experts, *shape) for name, shape in shapes.items()}  # of what is packed
        for projection, shape in self.shapes.items():
            for name, tensor in weight_format.empty(*shape).items():
                self._store(expert_tensor(projection, name), tensor)

    def stored(self, projection: str) -> tuple[Tensor, ...]:
        """The weights of one projection and their scales, in the order the format's operations take them."""
        return tuple(getattr(self, expert_tensor(projection, name)) for name in self.weight_format.stored)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        scales = (self.up_proj_input_scale, self.down_proj_input_scale) if self.simulate_activations else None
        up, down = self.stored("up_proj"), self.stored("down_proj")
        if nn.utils.parametrize.is_parametrized(self):
            raise RuntimeError(
                "The packed codes of quantised experts are parametrised, as PEFT does it for `target_parameters`: they are no "
                "weights to add to. Make and load adapters with `add_lora`, `lora_config` and `load_lora` of training/lora.py."
            )
        if self.low_rank:
            operations = self.weight_format.linear, self.weight_format.simulate
            return experts_with_low_rank(
                hidden_states, top_k_index, top_k_weights, up, down, scales, self.low_rank, *operations
            )
        return self.weight_format.experts(hidden_states, top_k_index, top_k_weights, up, down, scales)

    def dequantize(self, projection: str, dtype: torch.dtype) -> Tensor:
        """The stacked weights of one projection, (experts, out, in)."""
        stored = self.stored(projection)
        # One expert at a time: the float32 intermediates are several times as large as the result.
        return torch.stack(
            [self.weight_format.dequantize(*(t[e] for t in stored), dtype=dtype) for e in range(self.num_experts)]
        )

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, format={self.weight_format.name}"


def expert_tensor(projection: str, name: str) -> str:
    """What `QuantizedExperts` calls the tensor that a checkpoint calls `experts.{e}.{projection}.{name}`."""
    return projection if name == "weight" else f"{projection}_{name}"


def simulate_activations(model: nn.Module, enabled: bool = True) -> None:
    """Round the inputs of every quantised layer of `model` with its stored input scale, or stop doing so.

    Keys and values are rounded as well where the checkpoint has scales of an FP8 cache.

    Raises:
        ValueError: `model` has no quantised layer.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedExperts | CacheScaledLinear)]
    if not layers:
        raise ValueError("The model has no quantised layer whose activations could be simulated.")
    for layer in layers:
        layer.simulate_activations = enabled
