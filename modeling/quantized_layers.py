"""Linear maps and routed experts whose frozen weights are stored as NVIDIA ModelOpt stores them, in NVFP4 or FP8.

Activations stay in full precision (W4A16, W8A16) unless `quantize_activations` asks for products of quantised operands (W8A8,
W4A4), or `simulate_activations` for their numerics on any hardware. Gradients flow to the input, never to the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels_hub.reference.fp8 import dequantize_fp8
from ..kernels_hub.reference.linear import finished
from ..kernels_hub.reference.nvfp4 import BLOCK, dequantize_nvfp4
from ..kernels_hub.reference.quantized_experts import experts_with_low_rank
from ..kernels_hub.reference.quantized_linear import simulate_fp8, simulate_nvfp4
from ..kernels_hub.registry import fp8_experts, fp8_linear, nvfp4_experts, nvfp4_linear
from ..kernels_hub.scaled_linear import fp8_unsupported, nvfp4_unsupported, scaled_fp8_linear, scaled_nvfp4_linear
from .linear import NemotronHLinear


@dataclass(frozen=True)
class WeightFormat:
    """How a weight (out, in) is stored, and the operations that work on what is stored.

    Attributes:
        name: ModelOpt's `quant_algo`.
        stored: by name in a checkpoint, what a row's length is divided by (0: a scalar) and the dtype; `weight` first.
        dequantize: (*stored, dtype) -> (out, in).
        linear: (x, *stored, relu2, plus) -> x @ W^T, and what follows it.
        experts: (x, index, weights, up, down, input_scales) -> as in `kernels_hub/reference/quantized_experts.py`.
        simulate: (x, input_scale) -> x rounded as the hardware would.
        scaled_linear: (x, *stored, input_scale) -> x @ W^T with x rounded, on hardware that multiplies such operands.
        unsupported: (device, out, in) -> why `scaled_linear` cannot run there, or None.
        bits, group_size, divisor: for the configuration's JSON; a tensor's scale is its amax / divisor.
    """

    name: str
    stored: dict[str, tuple[int, torch.dtype]]
    dequantize: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    experts: Callable[..., Tensor]
    simulate: Callable[[Tensor, Tensor], Tensor]
    scaled_linear: Callable[..., Tensor]
    unsupported: Callable[[torch.device, int, int], str | None]
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


def _dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """With one scale for each of possibly several stacked matrices. Has a name so that a model can be pickled."""
    return dequantize_fp8(weight, scale[..., None, None], dtype)


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
        scaled_linear=scaled_nvfp4_linear,
        unsupported=nvfp4_unsupported,
        bits=4,
        group_size=BLOCK,
        divisor=6.0 * 448.0,
    ),
    "FP8": WeightFormat(
        name="FP8",
        stored={"weight": (1, torch.float8_e4m3fn), "weight_scale": (0, torch.float32)},
        dequantize=_dequantize_fp8,
        linear=fp8_linear,
        experts=fp8_experts,
        simulate=simulate_fp8,
        scaled_linear=scaled_fp8_linear,
        unsupported=fp8_unsupported,
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

    def bare_weight(self) -> Tensor | None:
        return None if self.simulate_activations else super().bare_weight()


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
        self.quantize_activations = False

    def stored(self) -> tuple[Tensor, ...]:
        """The weight and its scales, in the order the format's operations take them."""
        return tuple(getattr(self, name) for name in self.weight_format.stored)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantize_activations:
            out = self.weight_format.scaled_linear(x, *self.stored(), self.input_scale)
        else:
            if self.simulate_activations:
                x = self.weight_format.simulate(x, self.input_scale)
            out = self.weight_format.linear(x, *self.stored())
        return self._as_cached(out if self.bias is None else out + self.bias.to(out.dtype))

    def product(self, x: Tensor, relu2: bool, plus: tuple[Tensor, ...]) -> Tensor:
        """See `modeling/linear.py`."""
        if self.quantize_activations or self.simulate_activations or self.bias is not None or self.cache_scale:
            return finished(self(x), relu2, plus)
        return self.weight_format.linear(x, *self.stored(), relu2, plus)

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
    axis of experts. They may lie in another memory than the tokens: then the chosen experts alone are fetched, at each call,
    packed as they are, which waits for the tokens' device to say which those are.
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
        low_rank = self.low_rank
        if nn.utils.parametrize.is_parametrized(self):
            raise RuntimeError(
                "The packed codes of quantised experts are parametrised, as PEFT does it for `target_parameters`: they are no "
                "weights to add to. Make and load adapters with `add_lora`, `lora_config` and `load_lora` of training/lora.py."
            )
        if self.up_proj.device != hidden_states.device:
            up, down, scales, top_k_index, chosen = _fetch(up, down, scales, top_k_index)
            low_rank = {name: [(a[chosen], b[chosen]) for a, b in pairs] for name, pairs in low_rank.items()}
        if low_rank:
            operations = self.weight_format.linear, self.weight_format.simulate
            return experts_with_low_rank(
                hidden_states, top_k_index, top_k_weights, up, down, scales, low_rank, *operations
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


def _fetch(up: tuple, down: tuple, scales: tuple | None, index: Tensor) -> tuple:
    """The chosen experts' tensors on the device of `index`, `index` (tokens, top_k) renumbered to go with them, and the chosen."""
    chosen, renumbered = index.unique(return_inverse=True)
    experts = chosen.tolist()

    def fetched(stacked: Tensor) -> Tensor:
        out = torch.empty(len(experts), *stacked.shape[1:], dtype=stacked.dtype, device=index.device)
        for slot, expert in zip(out, experts, strict=True):
            slot.copy_(stacked[expert], non_blocking=True)
        return out

    groups = (None if tensors is None else tuple(map(fetched, tensors)) for tensors in (up, down, scales))
    return *groups, renumbered, chosen


def offload_experts(model: nn.Module, layers: int | None = None) -> int:
    """Keep quantised routed experts in CPU memory, pinned where there is a GPU, for a model that does not fit otherwise.

    Each call then fetches the experts that its tokens chose: for one token of Super 68 MB a layer.

    Args:
        model: in place; moving it to a device afterwards moves the experts as well.
        layers: how many sets of experts, counted from the last; all by default.

    Returns:
        Bytes that were moved.

    Raises:
        ValueError: the model has no quantised experts; `layers` is more than it has sets of them, or less than 0.
    """
    sets = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    if not sets and layers is None:
        raise ValueError("The model has no quantised experts that could be kept in CPU memory: quantise it first.")
    if not 0 <= (len(sets) if layers is None else layers) <= len(sets):
        raise ValueError(f"`layers` is {layers}: the model has {len(sets)} quantised sets of experts.")
    moved = 0
    for experts in sets[len(sets) - (len(sets) if layers is None else layers) :]:
        for parameter in experts.parameters():
            moved += parameter.nbytes
            parameter.data = parameter.data.cpu()
            if torch.cuda.is_available():
                parameter.data = parameter.data.pin_memory()
    return moved


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
        if enabled and isinstance(layer, QuantizedLinear):
            layer.quantize_activations = False


def quantize_activations(model: nn.Module, formats: Sequence[str] = ("FP8",)) -> None:
    """Let hardware multiply quantised operands (W8A8, W4A4): inputs of linear maps are rounded with their stored scales.

    Routed experts keep their inputs in full precision. Calibrate the input scales first, if the checkpoint did not come with them.

    Args:
        formats: of which linear maps, "FP8" or "NVFP4" (needs Blackwell, never run there), or both; those of others, and with `()`
            all, take inputs in full precision again.

    Raises:
        ValueError: an unknown format; no linear map is in it; a device that cannot. Nothing is changed then.
    """
    formats = (formats,) if isinstance(formats, str) else formats
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for wanted in formats:
        if wanted not in FORMATS:
            raise ValueError(f"Unknown format {wanted!r}: known are {', '.join(FORMATS)}.")
        chosen = {name: layer for name, layer in layers.items() if layer.weight_format.name == wanted}
        if not chosen:
            raise ValueError(f"The model has no linear map in {wanted} whose inputs could be quantised.")
        for name, layer in chosen.items():
            reason = FORMATS[wanted].unsupported(layer.weight.device, layer.out_features, layer.in_features)
            if reason is not None:
                raise ValueError(
                    f"The inputs of {name} cannot be quantised: {reason}. `simulate_activations` gives the same numerics anywhere."
                )
    for layer in layers.values():
        layer.quantize_activations = layer.weight_format.name in formats
        if layer.quantize_activations:
            layer.simulate_activations = False
