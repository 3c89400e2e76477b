"""Triton kernels of Nemotron-H, forward and backward: nothing to compile when they are installed.

Every function takes and returns plain tensors; those that need it have a gradient. All are registered with
`torch.library`, so that `torch.compile` and CUDA graphs go through them. None waits for the device.
"""

from . import layers
from .add_rms_norm import add_rms_norm
from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .decode_attention import decode_attention
from .fill_slots import fill_slots
from .keep_drafts import keep_drafts
from .likeliest import likeliest
from .linear_cross_entropy import linear_cross_entropy
from .moe_experts import moe_experts
from .quantized_experts import fp8_experts, nvfp4_experts
from .quantized_linear import fp8_linear, nvfp4_linear
from .relu_squared import relu_squared
from .replay import causal_conv1d_replay, selective_state_replay
from .rms_norm import gated_rms_norm, rms_norm
from .selective_state_update import selective_state_update
from .small_batch_linear import joint_linear, small_batch_linear
from .ssd_chunk_scan import ssd_chunk_scan
from .step_and_decay import step_and_decay
from .topk_routing import route_few_tokens, router_logits, topk_routing

__all__ = [
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_replay",
    "causal_conv1d_update",
    "decode_attention",
    "fill_slots",
    "fp8_experts",
    "fp8_linear",
    "gated_rms_norm",
    "joint_linear",
    "keep_drafts",
    "layers",
    "likeliest",
    "linear_cross_entropy",
    "moe_experts",
    "nvfp4_experts",
    "nvfp4_linear",
    "relu_squared",
    "rms_norm",
    "route_few_tokens",
    "router_logits",
    "selective_state_replay",
    "selective_state_update",
    "small_batch_linear",
    "ssd_chunk_scan",
    "step_and_decay",
    "topk_routing",
]
