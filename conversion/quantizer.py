"""Checkpoints in ModelOpt's formats, opened, made and saved through transformers' own `from_pretrained` and `save_pretrained`.

A quantised checkpoint is loaded into modules that hold its tensors as they are: what is packed stays packed, also where experts
are stacked. A full-precision checkpoint is loaded first and then quantised module by module (`quantize_model`), so that at most
one module exists twice.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging

from ..modeling.attention import NemotronHAttention
from ..modeling.latent_moe import NemotronHExperts, NemotronHTopkRouter
from ..modeling.linear import NemotronHLinear
from ..modeling.quantized_layers import (
    FORMATS,
    CacheScaledLinear,
    QuantizedExperts,
    QuantizedLinear,
    WeightFormat,
    expert_tensor,
)
from ..modeling.weight_checks import is_quantised, is_scale, listed, published_name, read_headers
from .nvfp4 import check_rows, quantize_weight, weight_amax
from .quantization_config import MIXED, NVFP4Config, layer_entry

logger = logging.get_logger(__name__)

PROJECTIONS = ("up_proj", "down_proj")
_DTYPES = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
# What the release recipe makes of a linear map, by the end of its name. The rest stays as it is.
_RELEASE = {
    "mixer.in_proj": "FP8",
    "mixer.out_proj": "FP8",
    "shared_experts.up_proj": "FP8",
    "shared_experts.down_proj": "FP8",
}


class ModelOptQuantizer(HfQuantizer):
    """What transformers asks of a quantisation method; see `NVFP4Config` for what it can be asked to do."""

    requires_calibration = False
    quantization_config: NVFP4Config
    # The modules' shapes are those of the checkpoint, so that its headers can be compared with them.
    headers_as_published = True

    def validate_environment(self, device_map=None, **kwargs) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            kind = torch.device(device).type if isinstance(device, str | torch.device) and _is_device(device) else None
            if kind not in (None, "cpu", "cuda", "xpu", "meta"):
                raise ValueError(
                    f"`device_map` asks for {str(device)!r}, which has no float8: NVFP4 and FP8 weights need a CPU or a GPU that has."
                )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files=None, **kwargs) -> None:
        if not self.pre_quantized:
            return
        headers = {name: dtype for name, (_, dtype) in read_headers(checkpoint_files or []).items()}
        install_empty(model, self.quantization_config)
        if self.quantization_config.fp8_cache:
            _add_cache_scales(model, headers)
        check_scale_headers(model, headers)

    def update_weight_conversions(self, weight_conversions, model):
        """The model's own, and those that stack what belongs to the experts' weights."""
        tensors = ["input_scale", *dict.fromkeys(n for f in FORMATS.values() for n in f.stored if n != "weight")]
        return weight_conversions + [
            WeightConverter(
                source_patterns=f"mixer.experts.*.{projection}.{name}",
                target_patterns=f"mixer.experts.{expert_tensor(projection, name)}",
                operations=[MergeModulelist(dim=0)],
            )
            for projection in PROJECTIONS
            for name in tensors
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        if self.pre_quantized:
            refuse_bad_scales(model)
            _freeze(model)
        else:
            self.quantization_config = _quantize(model, self.quantization_config)
            model.config.quantization_config = self.quantization_config
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # Layers of two dtypes do not multiply: by default what was packed gets the dtype that the rest has now, which need not
        # be that of the configuration; otherwise the rest goes along.
        if dtype is not None:
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return super().dequantize(model, model.dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                model.set_submodule(name, module.dequantize(dtype).train(module.training))
            elif isinstance(module, QuantizedExperts):
                with torch.device("meta"):
                    experts = NemotronHExperts(model.config)
                for projection in PROJECTIONS:
                    setattr(experts, projection, nn.Parameter(module.dequantize(projection, dtype)))
                model.set_submodule(name, experts.train(module.training))
            elif isinstance(module, CacheScaledLinear):
                linear = NemotronHLinear(
                    module.in_features, module.out_features, module.bias is not None, device="meta"
                )
                linear.weight, linear.bias = module.weight, module.bias
                model.set_submodule(name, linear.train(module.training))
        return model

    def write_json(self, folder: str | Path) -> None:
        """Write hf_quant_config.json, which ModelOpt's readers look for beside config.json."""
        text = json.dumps(self.quantization_config.to_hf_quant_config(), indent=4)
        (Path(folder) / "hf_quant_config.json").write_text(text, encoding="utf-8")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters and full-precision leaves; the packed weights are frozen

    @property
    def is_qat_trainable(self) -> bool:
        return True  # by which `Trainer` knows that the leaves train without adapters too


def register() -> None:
    """Make transformers open checkpoints whose `quant_method` is `modelopt`."""
    register_quantization_config("modelopt")(NVFP4Config)
    register_quantizer("modelopt")(ModelOptQuantizer)


def quantize_model(model: PreTrainedModel, config: NVFP4Config) -> PreTrainedModel:
    """Quantise a model in memory, in place and without data, so that `save_pretrained` writes a quantised checkpoint.

    Args:
        model: in full precision, on any device; a PEFT model must be merged first.

    Returns:
        The same model.

    Raises:
        ValueError: the model is quantised already; a weight with NaN or infinity, or that is not in memory; what
            `module_formats` refuses.

    Example:

    ```python
    >>> from nemotron_super import NemotronHForCausalLM, NVFP4Config, quantize_model
    >>> model = NemotronHForCausalLM.from_pretrained("model_card/nemotron-h-tiny")
    >>> model = quantize_model(model, NVFP4Config(recipe="nvfp4"))
    ```
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantised already: call its `dequantize()` first.")
    quantizer = ModelOptQuantizer(_quantize(model, config), pre_quantized=False)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, "modelopt"
    model.config.quantization_config = quantizer.quantization_config
    return model


def install_empty(model: PreTrainedModel, config: NVFP4Config) -> PreTrainedModel:
    """Put quantised modules without values in the place of those that `config` wants quantised, all on the meta device.

    For a model that is itself on the meta device: to be loaded into, or, through `to_empty`, to be filled otherwise.

    Raises:
        ValueError: what `module_formats` refuses.
    """
    config = config if config.recipe is None else resolve_recipe(model, config.recipe)
    with torch.device("meta"):
        for name, weight_format in module_formats(model, config).items():
            model.set_submodule(name, _empty(model.get_submodule(name), weight_format))
    return model


def module_formats(model: PreTrainedModel, config: NVFP4Config) -> dict[str, WeightFormat]:
    """The format of every module of `model` that `config`, which is no recipe, wants quantised, by the module's name.

    Raises:
        ValueError: experts of one layer in different formats; `quantized_layers` that names a module that is not there or
            is no linear map; embeddings quantised through a tied head; rows that NVFP4's blocks do not divide.
    """
    found, known = {}, set()
    for name, module in quantizable(model):
        published = published_modules(model, name, module)
        known.update(published)
        formats = {config.format_of(p) for p in published}
        if len(formats) > 1:
            odd = {f: next(p for p in published if config.format_of(p) == f) for f in formats}
            raise ValueError(
                "The experts of one layer must be stored in one format, but "
                + ", ".join(f"{p} is in {f or 'full precision'}" for f, p in odd.items())
                + "."
            )
        algo = formats.pop()
        if algo is None:
            continue
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise ValueError(
                "`lm_head` is to be quantised but shares its weight with the embeddings, which cannot be."
            )
        if algo == "NVFP4":
            for width in _row_lengths(module):
                check_rows(width, published[0])
        found[name] = FORMATS[algo]
    absent = [m for m in config.quantized_layers or () if m not in known and not _left_out(model, m)]
    if absent:
        modules = {_published(model, name): type(module).__name__ for name, module in model.named_modules()}
        reasons = [f"{m} is a {modules[m]}, not a linear map" if m in modules else f"{m} is not there" for m in absent]
        raise ValueError(f"`quantized_layers` names modules that cannot be quantised: {listed(reasons, '; ')}.")
    return found


def quantizable(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear map and every set of experts, quantised or not, in the order of the modules.

    Only of what a published checkpoint can hold: a classifier's head is none of it.
    """
    for name, module in model.named_modules():
        published = _published(model, name).startswith(("backbone.", "mtp.", "lm_head"))
        if published and isinstance(module, nn.Linear | NemotronHExperts | QuantizedExperts):
            yield name, module


def published_modules(model: PreTrainedModel, name: str, module: nn.Module) -> list[str]:
    """What a published checkpoint calls a module of `quantizable`: a set of experts is two names per expert."""
    published = _published(model, name)
    if isinstance(module, nn.Linear):
        return [published]
    return [f"{published}.{e}.{projection}" for e in range(module.num_experts) for projection in PROJECTIONS]


def check_scale_headers(model: PreTrainedModel, headers: dict[str, str]) -> None:
    """Compare the tensors that the quantised modules of `model` need with those of a checkpoint, before any is loaded.

    Args:
        headers: dtype, as safetensors spells it, by published tensor name.

    Raises:
        ValueError: tensors that are missing or of another dtype, and scales or codes that belong to no quantised module.
    """
    wanted: dict[str, torch.dtype] = {}
    for name, module in quantizable(model):
        published = published_modules(model, name, module)
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            stored = module.weight_format.stored | {"input_scale": (0, torch.float32)}
            wanted |= {f"{p}.{tensor}": dtype for p in published for tensor, (_, dtype) in stored.items()}
        scales = [s for s in ("k_scale", "v_scale") if s in dict(module.named_buffers(recurse=False))]
        wanted |= {f"{published[0]}.{s}": torch.float32 for s in scales}
    missing = [name for name in wanted if name not in headers]
    if missing:
        raise ValueError(
            f"The checkpoint lacks {listed(missing)}, which its quantisation configuration calls for. Is a file missing, or "
            "does the configuration belong to another checkpoint?"
        )
    unwanted = {n: d for n, d in headers.items() if n not in wanted and not _left_out(model, n)}
    surplus = [n if is_scale(n) else f"{n} ({d})" for n, d in unwanted.items() if is_quantised(n, d)]
    if surplus:
        raise ValueError(
            "The checkpoint holds scales or packed weights for what its quantisation configuration leaves in full precision: "
            f"{listed(surplus)}."
        )
    other = [f"{n} is {headers[n]}, not {_DTYPES[d]}" for n, d in wanted.items() if headers[n] != _DTYPES[d]]
    if other:
        raise ValueError(f"The checkpoint does not fit its quantisation configuration: {listed(other, '; ')}.")


def refuse_bad_scales(model: PreTrainedModel) -> None:
    """Raise where a loaded scale cannot be one.

    Single blocks may have a scale of zero: older writers let the scale of blocks of next to nothing underflow.

    Raises:
        ValueError: naming float32 scales that are not positive and finite; block scales with NaN or a negative number, or
            that are all zero; FP8 weights with NaN.
    """
    bad = []
    for name, module in model.named_modules():
        published = _published(model, name)
        if isinstance(module, QuantizedExperts):
            for projection in PROJECTIONS:
                for stored in (*module.weight_format.stored, "input_scale"):
                    wrong = _bad_rows(getattr(module, expert_tensor(projection, stored)), stored)
                    bad += [f"{published}.{e}.{projection}.{stored}" for e in wrong]
        elif isinstance(module, QuantizedLinear | CacheScaledLinear):
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            bad += [f"{published}.{stored}" for stored, tensor in tensors if _bad_rows(tensor[None], stored)]
    if bad:
        raise ValueError(
            f"The checkpoint holds scales that are zero, negative, NaN or infinite, or weights that are NaN: {listed(bad)}. It "
            "is damaged: fetch or export it again."
        )


def _bad_rows(tensor: Tensor, stored: str) -> list[int]:
    """Which entries of (n, ...), n tensors that a checkpoint calls `stored`, are no scale, or hold NaN."""
    scale = is_scale(f".{stored}")
    if tensor.is_meta:  # offloaded to disk
        return []
    if tensor.dtype == torch.float8_e4m3fn:
        code = tensor.view(torch.uint8).flatten(1)  # sign, four bits of exponent, three of mantissa; 127 is NaN
        bad = ((code & 127) == 127).any(1)
        if scale:
            largest = code.amax(1)
            bad |= (largest > 127) | (largest == 0)
    elif scale:
        bad = ~(tensor.isfinite() & (tensor > 0))
    else:
        return []
    return bad.nonzero().flatten().tolist()


def refuse_unquantizable(model_class: type[PreTrainedModel], model_config, config: NVFP4Config) -> None:
    """Look for what `quantize_model` would refuse of such a model, whatever its weights are.

    Raises:
        ValueError: as `quantize_model`.
    """
    with torch.device("meta"):
        model = model_class(copy.deepcopy(model_config))
    _plan(model, config)


def _plan(model: PreTrainedModel, config: NVFP4Config) -> tuple[NVFP4Config, dict[str, WeightFormat]]:
    """The configuration with its recipe, if it has one, spelt out, and the formats of the modules that it quantises."""
    config = config if config.recipe is None else resolve_recipe(model, config.recipe)
    if config.fp8_cache:
        raise ValueError("The scales of an FP8 cache come from data: quantise without `kv_cache_scheme`.")
    return config, module_formats(model, config)


def _quantize(model: PreTrainedModel, config: NVFP4Config) -> NVFP4Config:
    """Quantise in place; returns the configuration with its recipe, if it has one, spelt out."""
    config, formats = _plan(model, config)
    # A bad weight in the last layer must not leave the others quantised.
    for name in formats:
        for projection, weight in _weights(model.get_submodule(name)):
            if weight.is_meta:
                raise ValueError(
                    f"{_published(model, name)}{projection} is not in memory and cannot be quantised: a `device_map` that leaves "
                    "weights on disk or on the meta device takes a checkpoint that is quantised already."
                )
            weight_amax(weight, f"{_published(model, name)}{projection}")
    shared = _shared_amax(model, formats)
    for name, weight_format in tqdm(formats.items(), desc="Quantising", disable=not logging.is_progress_bar_enabled()):
        module, published = model.get_submodule(name), _published(model, name)
        with torch.device("meta"):
            packed = _empty(module, weight_format)
        for projection, weight in _weights(module):
            if weight.dim() == 2:
                tensors = quantize_weight(weight, weight_format, f"{published}.weight", shared.get(name))
            else:
                each = [
                    quantize_weight(w, weight_format, f"{published}.{e}{projection}") for e, w in enumerate(weight)
                ]
                tensors = {key: torch.stack([t[key] for t in each]) for key in each[0]}
            for key, tensor in tensors.items():
                key = expert_tensor(projection.removeprefix("."), key) if projection else key
                setattr(packed, key, nn.Parameter(tensor, requires_grad=False))
        if isinstance(module, nn.Linear):
            packed.bias = module.bias
        packed.train(module.training)
        model.set_submodule(name, packed)
    return config


def resolve_recipe(model: PreTrainedModel, recipe: str) -> NVFP4Config:
    """The configuration, in ModelOpt's terms, that a recipe means for `model`."""
    modules = {name: published_modules(model, name, module) for name, module in quantizable(model)}
    if recipe == "release":
        layers = {}
        for name, published in modules.items():
            end = ".".join(name.split(".")[-2:])
            algo = "NVFP4" if end == "mixer.experts" else _RELEASE.get(end)
            if algo is not None and not name.startswith("mtp."):
                layers.update(dict.fromkeys(published, algo))
        return NVFP4Config(quant_algo=MIXED, quantized_layers={m: layer_entry(algo) for m, algo in layers.items()})
    # The lists that ModelOpt writes: what has a weight matrix and is left alone.
    kept = (nn.Embedding, nn.Conv1d, NemotronHTopkRouter)
    ignore = [
        _published(model, n) for n, m in model.named_modules() if isinstance(m, kept) and not n.startswith("mtp.")
    ]
    ignore = ["lm_head", *ignore] + (["mtp*"] if any(n.startswith("mtp.") for n in modules) else [])
    return NVFP4Config(quant_algo=recipe.upper(), ignore=ignore)


def _shared_amax(model: PreTrainedModel, formats: dict[str, WeightFormat]) -> dict[str, Tensor]:
    """By name of module, the amax that q, k and v of one attention share, where they are in NVFP4."""
    shared = {}
    for name, module in model.named_modules():
        if isinstance(module, NemotronHAttention):
            names = [
                n for n in (f"{name}.{letter}_proj" for letter in "qkv") if n in formats and formats[n].name == "NVFP4"
            ]
            weights = {n: model.get_submodule(n).weight for n in names}
            if weights:
                amax = torch.stack([weight_amax(w, n) for n, w in weights.items()]).max()
                shared.update(dict.fromkeys(names, amax))
    return shared


def _empty(module: nn.Module, weight_format: WeightFormat) -> QuantizedLinear | QuantizedExperts:
    """A quantised module of the shape of `module`, to be filled; call it under the meta device."""
    if isinstance(module, nn.Linear):
        has_bias = module.bias is not None
        return QuantizedLinear(module.in_features, module.out_features, has_bias, weight_format, module.weight.dtype)
    return QuantizedExperts(*module.up_proj.shape, weight_format)


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    if isinstance(module, nn.Linear):
        return [("", module.weight.detach())]
    return [(f".{projection}", getattr(module, projection).detach()) for projection in PROJECTIONS]


def _row_lengths(module: nn.Module) -> list[int]:
    return [weight.shape[-1] for _, weight in _weights(module)]


def add_cache_scale(model: PreTrainedModel, name: str, scale: str) -> nn.Module:
    """Give the module called `name`, a key or value projection, room for the scale of an FP8 cache; returns the module.

    In the place of a projection with an adapter that is what the adapter stands upon.
    """
    linear = model.get_submodule(name)
    while hasattr(linear, "base_layer"):
        name, linear = f"{name}.base_layer", linear.base_layer
    if not isinstance(linear, QuantizedLinear | CacheScaledLinear):
        with torch.device("meta"):
            scaled = CacheScaledLinear(linear.in_features, linear.out_features, linear.bias is not None)
        scaled.weight, scaled.bias = linear.weight, linear.bias
        scaled.train(linear.training)
        model.set_submodule(name, scaled)
        linear = scaled
    linear.add_cache_scale(scale)
    return linear


def _add_cache_scales(model: PreTrainedModel, headers: dict[str, str]) -> None:
    """In every attention layer of the backbone, and in MTP where the checkpoint has them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, NemotronHAttention):
            for projection, scale in (("k_proj", "k_scale"), ("v_proj", "v_scale")):
                path = f"{name}.{projection}"
                if not name.startswith("mtp.") or f"{path}.{scale}" in headers:
                    add_cache_scale(model, path, scale)


def _freeze(model: PreTrainedModel) -> None:
    # transformers makes every floating tensor it loads one that wants a gradient.
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.requires_grad_(name == "bias")


def _published(model: PreTrainedModel, name: str) -> str:
    return published_name(name, model.base_model is model)


def _left_out(model: PreTrainedModel, name: str) -> bool:
    """Whether this model loads without what is called `name`, as a backbone does without heads."""
    # A model with a head has the backbone's patterns too: transformers gathers them.
    if getattr(model, name.partition(".")[0], None) is not None:
        return False
    return any(re.search(pattern, f"{name}.") for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _is_device(device: Any) -> bool:
    try:
        torch.device(device)
    except RuntimeError:
        return False  # "auto" and the other strategies
    return True
