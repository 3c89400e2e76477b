"""Nemotron 3 Super for transformers.

Importing this package makes transformers' Auto classes, pipelines and trainers use it for `model_type: nemotron_h`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration.configuration_nemotron_h import NemotronHConfig
from .configuration.presets import PRESETS, preset
from .conversion import quantizer
from .conversion.calibration import calibrate
from .conversion.quantization_config import NVFP4Config
from .conversion.quantizer import quantize_model
from .modeling.cache import HybridCache
from .modeling.modeling_nemotron_h import (
    NemotronHCausalLMOutput,
    NemotronHForCausalLM,
    NemotronHForSequenceClassification,
    NemotronHForTokenClassification,
    NemotronHModel,
    NemotronHPreTrainedModel,
)
from .modeling.quantized_layers import offload_experts, quantize_activations, simulate_activations
from .modeling.snapshot import load_snapshot, save_snapshot

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "HybridCache",
    "NVFP4Config",
    "NemotronHCausalLMOutput",
    "NemotronHConfig",
    "NemotronHForCausalLM",
    "NemotronHForSequenceClassification",
    "NemotronHForTokenClassification",
    "NemotronHModel",
    "NemotronHPreTrainedModel",
    "calibrate",
    "load_snapshot",
    "offload_experts",
    "preset",
    "quantize_activations",
    "quantize_model",
    "save_snapshot",
    "simulate_activations",
]

AutoConfig.register("nemotron_h", NemotronHConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, NemotronHModel),
    (AutoModelForCausalLM, NemotronHForCausalLM),
    (AutoModelForSequenceClassification, NemotronHForSequenceClassification),
    (AutoModelForTokenClassification, NemotronHForTokenClassification),
):
    _auto.register(NemotronHConfig, _model, exist_ok=True)
quantizer.register()
