"""Scales that come from data: of what quantised layers take in, and of an FP8 cache.

Weights are quantised without data. Hardware that multiplies quantised operands also needs the range of the activations; here it
is measured on sample text, as the largest magnitude seen, all experts of a layer together, as ModelOpt does it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..kernels_hub.reference.nvfp4 import E4M3_MAX
from ..modeling.attention import NemotronHAttention
from ..modeling.quantized_layers import QuantizedExperts, QuantizedLinear
from .quantizer import PROJECTIONS, add_cache_scale

CACHE_SCALES = {"k_proj": "k_scale", "v_proj": "v_scale"}
ROUNDINGS = ("simulate_activations", "quantize_activations")


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterable[Tensor], cache: bool = True) -> PreTrainedModel:
    """Measure the input scales of a quantised model, and the scales of an FP8 cache, in place.

    Layers that no token reaches, such as those of MTP, keep the scale they have. Nothing is rounded while it is measured, also
    where `simulate_activations` or `quantize_activations` has been called. Adapters stay.

    Args:
        batches: sample token ids, each (batch, seq) int64, without padding.
        cache: also store `k_scale` and `v_scale`, which tells readers to keep keys and values in FP8.

    Returns:
        The same model, in the mode (training or not) it was in.

    Raises:
        ValueError: the model has no quantised layer, or some on disk; there is no batch, something that is no batch, or an
            activation that is not finite.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedExperts)}
    if not layers:
        raise ValueError("The model has no quantised layer to calibrate: quantise it first.")
    waiting = [n for n, m in layers.items() if any(p.is_meta for p in m.parameters())]
    if waiting:
        raise ValueError(
            f"Layers that wait on disk cannot be calibrated, such as {waiting[0]}: load the model into memory."
        )
    largest: dict[str, Tensor] = {}

    def note(name: str, activations: Tensor) -> None:
        if activations.numel():
            amax = activations.abs().amax().float()
            largest[name] = torch.maximum(largest.get(name, amax), amax)

    hooks = []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(_observer(name, note)))
    caches = [n for n, m in model.named_modules() if isinstance(m, NemotronHAttention)] if cache else []
    for name in caches:
        for projection in CACHE_SCALES:
            path = f"{name}.{projection}"
            hooks.append(
                model.get_submodule(path).register_forward_hook(lambda m, x, y, path=path: note(f"{path} cache", y))
            )
    # Roundings with the scales that are to be measured would show in all that follows, and cut off what is beyond them.
    rounding = [(m, n) for m in model.modules() for n in ROUNDINGS if getattr(m, n, False)]
    for module, name in rounding:
        setattr(module, name, False)
    training = model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="Calibrating", disable=not logging.is_progress_bar_enabled()):
            _check_batch(batch)
            model(batch.to(model.device), use_cache=False)
    finally:
        for module, name in rounding:
            setattr(module, name, True)
        for hook in hooks:
            hook.remove()
        model.train(training)
    if not largest:
        raise ValueError("There was no sample text to calibrate with: `batches` is empty.")
    wrong = [name for name, amax in largest.items() if not amax.isfinite()]
    if wrong:
        raise ValueError(f"The sample text gives activations that are not finite at {', '.join(wrong)}.")

    for name, layer in layers.items():
        for projection in PROJECTIONS if isinstance(layer, QuantizedExperts) else ("",):
            amax = largest.get(f"{name} {projection}".rstrip())
            if amax is not None and amax > 0:
                stored = f"{projection}_input_scale" if projection else "input_scale"
                getattr(layer, stored).fill_(amax / layer.weight_format.divisor)
    for name in caches:
        for projection, scale in CACHE_SCALES.items():
            amax = largest.get(f"{name}.{projection} cache")
            if amax is not None:
                linear = add_cache_scale(model, f"{name}.{projection}", scale)
                getattr(linear, scale).fill_(torch.where(amax > 0, amax / E4M3_MAX, 1.0))
                quantizer.quantization_config.fp8_cache = True
    return model


def _check_batch(batch: Tensor) -> None:
    if not isinstance(batch, Tensor) or batch.dim() != 2 or not batch.numel():
        what = f"of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
        raise ValueError(f"`batches` holds {what}: each must be a tensor of token ids, (batch, seq), without padding.")


def _observer(name: str, note):
    """A hook that notes what a quantised layer is given, and what the experts' second projection is given."""

    def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(layer, QuantizedLinear):
            note(name, inputs[0])
            return
        x, index, _ = inputs
        note(f"{name} up_proj", x)
        up = layer.stored("up_proj")
        for expert in index.unique().tolist():
            rows = x[(index == expert).any(-1)]
            hidden = layer.weight_format.linear(rows, *(stored[expert] for stored in up)).relu().square()
            note(f"{name} down_proj", hidden)

    return observe
