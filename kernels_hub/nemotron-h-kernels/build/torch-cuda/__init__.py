"""Triton kernels of Nemotron-H, forward and backward: nothing to compile when they are installed.

Every function takes and returns plain tensors; those that need it have a gradient. All are registered with
`torch.library`, so that `torch.compile` and CUDA graphs go through them. None waits for the device.
"""

from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .moe_experts import moe_experts
from .quantized_experts import fp8_experts, nvfp4_experts
from .quantized_linear import fp8_linear, nvfp4_linear
from .rms_norm import gated_rms_norm, rms_norm
from .selective_state_update import selective_state_update
from .ssd_chunk_scan import ssd_chunk_scan
from .topk_routing import router_logits, topk_routing

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "fp8_experts",
    "fp8_linear",
    "gated_rms_norm",
    "moe_experts",
    "nvfp4_experts",
    "nvfp4_linear",
    "rms_norm",
    "router_logits",
    "selective_state_update",
    "ssd_chunk_scan",
    "topk_routing",
]
