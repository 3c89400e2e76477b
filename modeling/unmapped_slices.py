"""Checkpoint files read piece by piece on their way to a GPU, so that no more than a few tensors are in CPU memory at once.

transformers maps the files into memory. For a model that stays on the CPU that is right, for there the mapped tensors are the
model's; on the way to a GPU every page that was read would stay part of the process until the last tensor is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from transformers.modeling_utils import LoadStateDictConfig


def unmapped_slices(files: Sequence[str], load_config: LoadStateDictConfig) -> dict[str, Any] | None:
    """Slices by tensor name, each read from its file when it is asked for its values and not before.

    Args:
        files: safetensors files.
        load_config: how transformers is going to load them.

    Returns:
        None where some of the tensors are to stay on the CPU or on disk, or where nobody said where they are to go:
        transformers then opens the files itself.
    """
    places = (load_config.device_map or {}).values()
    if not places or load_config.disable_mmap or not all(map(_has_own_memory, places)):
        return None
    slices = {}
    for file in files:
        opened = safe_open(file, framework="pt", backend="pread")
        slices.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118
    return slices


def _has_own_memory(place: Any) -> bool:
    return place != "disk" and torch.device(place).type in ("cuda", "xpu", "meta")
