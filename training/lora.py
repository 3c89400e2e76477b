"""LoRA on every linear map and on the routed experts, through PEFT, with nothing left out unsaid.

Experts are stacked parameters, so PEFT takes them as `target_parameters`, packed ones too (`packed_adapters.py`). PEFT refuses `out_proj` of Mamba models by name,
because other implementations read its weight inside a fused kernel and would step around the adapter; here `out_proj` is
always called as a module, so for this package's classes, and for them alone, that refusal is lifted (`allow_out_proj`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft.tuners.tuners_utils as tuners_utils
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..conversion.quantization_config import NVFP4Config
from ..conversion.quantizer import quantize_model, refuse_unquantizable
from ..modeling.latent_moe import NemotronHExperts, NemotronHTopkRouter
from ..modeling.linear import NemotronHLinear
from ..modeling.modeling_nemotron_h import NemotronHPreTrainedModel
from ..modeling.quantized_layers import CacheScaledLinear, QuantizedExperts, QuantizedLinear
from .packed_adapters import adapt_packed_experts

_EXPERT_TENSORS = ("up_proj", "down_proj")
_LINEAR = (nn.Linear, NemotronHLinear, QuantizedLinear, CacheScaledLinear)
# Matrices that are no linear maps, or that training leaves to other means: a router is steered by its correction bias.
_NOT_ADAPTED = (nn.Embedding, nn.Conv1d, NemotronHTopkRouter)


@contextmanager
def allow_out_proj() -> Iterator[None]:
    """While open, PEFT adapts `out_proj` of this package's models, in adding and in loading adapters alike."""
    name = "_check_lora_target_modules_mamba"
    refuse = getattr(tuners_utils, name, None)
    if refuse is None:  # a version of PEFT that refuses nothing
        yield
        return

    def check(peft_config, model, target_name):
        if not (target_name == "out_proj" and isinstance(model, NemotronHPreTrainedModel)):
            refuse(peft_config, model, target_name)

    setattr(tuners_utils, name, check)
    try:
        yield
    finally:
        setattr(tuners_utils, name, refuse)


def _names(part: str, name: str) -> bool:
    """Whether `part`, such as "lm_head", "mtp" or "experts.up_proj", stands in the dotted name."""
    return f".{part}." in f".{name}."


def lora_targets(model: nn.Module, exclude: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Full names of the modules and of the expert parameters that adapters go to.

    Args:
        exclude: dotted names or parts of them to leave out: "lm_head", "mtp", "layers.3", "experts".

    Raises:
        ValueError: a matrix that no adapter is known for, or an exclusion that excludes nothing.
    """
    modules, parameters, unused = [], [], set(exclude)

    def wanted(name: str) -> bool:
        matching = {part for part in exclude if _names(part, name)}
        unused.difference_update(matching)
        return not matching

    for name, module in model.named_modules():
        if isinstance(module, NemotronHExperts | QuantizedExperts):
            parameters += [full for tensor in _EXPERT_TENSORS if wanted(full := f"{name}.{tensor}")]
        elif type(module) in _LINEAR:
            modules += [name] if wanted(name) else []
        elif not isinstance(module, _NOT_ADAPTED):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for tensor, value in own:
                if value.dim() >= 2 and wanted(f"{name}.{tensor}"):
                    raise ValueError(
                        f"{name}.{tensor}: no adapter is known for a {type(module).__name__}; it would be left out. "
                        f"Say so with exclude=[{name.rpartition('.')[2]!r}]."
                    )
    if unused:
        raise ValueError(f"`exclude` names what the model does not have: {', '.join(sorted(unused))}.")
    if "lm_head" in modules and getattr(model.config, "tie_word_embeddings", False):
        raise ValueError(
            "`lm_head` shares its weight with the embeddings, which have no adapter: exclude=['lm_head']."
        )
    return modules, parameters


def lora_config(
    model: nn.Module, r: int = 16, alpha: float = 32, exclude: Sequence[str] = (), **options
) -> LoraConfig:
    """PEFT's configuration for adapters on every linear map and on the routed experts of `model`, packed or not.

    It goes to `get_peft_model` as it is; a file of it does not hold what packed experts need, so load with `load_lora`.

    Args:
        model: a `NemotronHForCausalLM`, unwrapped.
        r, alpha: rank and scale; an adapter adds alpha / r * B A.
        exclude: see `lora_targets`.
        options: further fields of `LoraConfig`. `lora_dropout` must stay 0: adapters on parameters have no input to drop.

    Raises:
        ValueError: see `lora_targets`.
    """
    modules, parameters = lora_targets(model, exclude)
    options.setdefault("task_type", "CAUSAL_LM")
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, target_parameters=parameters, **options)
    return adapt_packed_experts(config)


def add_lora(model: nn.Module, r: int = 16, alpha: float = 32, exclude: Sequence[str] = (), **options) -> PeftModel:
    """`model` with new adapters, which are all that trains. Arguments as in `lora_config`.

    Raises:
        ValueError: see `lora_targets`; or a target that PEFT passed over, named.
    """
    config = lora_config(model, r, alpha, exclude, **options)
    targets = {*config.target_modules, *config.target_parameters}
    with allow_out_proj():
        adapted = get_peft_model(model, config)
    missed = sorted(targets - adapted_names(adapted))
    if missed:
        raise ValueError(f"PEFT put no adapter on: {', '.join(missed)}.")
    return adapted


def load_lora(model: nn.Module, folder: Path | str, trainable: bool = False) -> PeftModel:
    """`model` with the adapters that `save_pretrained` wrote to `folder`; `trainable` to go on training them.

    The model may be quantised otherwise than the one that the adapters were trained over.
    """
    config = adapt_packed_experts(PeftConfig.from_pretrained(str(folder)))
    config.inference_mode = not trainable
    with allow_out_proj():
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)


def adapted_names(model: PeftModel) -> set[str]:
    """What has an adapter: modules by name, parameters by name, as the model without PEFT calls them."""
    found = set()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, tuners_utils.BaseTunerLayer):
            plain = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            found.add(plain if parameter is None else f"{plain}.{parameter}")
    return found


def export_merged(
    model: PeftModel, folder: Path | str, quantization_config: NVFP4Config | None = None
) -> NemotronHPreTrainedModel:
    """Add the adapters into the weights, save the model in the published layout, and return it.

    A quantised model is dequantised first: what is merged fits no packed weight.

    Args:
        quantization_config: how to quantise what is merged before it is saved; by default it is saved in full precision.

    Raises:
        ValueError: what `quantize_model` refuses, before anything is merged; a merged weight that is not finite, from PEFT.
    """
    base = model.get_base_model()
    if quantization_config is not None:  # what cannot be quantised is to be found before the adapters are gone
        refuse_unquantizable(type(base), base.config, quantization_config)
    if getattr(base, "hf_quantizer", None) is not None:
        base.dequantize()
    merged = model.merge_and_unload(safe_merge=True)
    if quantization_config is not None:
        merged = quantize_model(merged, quantization_config)
    merged.save_pretrained(folder)
    return merged
