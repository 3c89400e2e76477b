"""Checks on weights as they come from disk: a damaged file and values that are not finite are named, not loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def refuse_non_finite(model: nn.Module) -> None:
    """Raise if a weight holds NaN or infinity.

    Raises:
        ValueError: naming every such tensor, and for stacked experts the expert.
    """
    found = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() == 1:
            continue
        if bool(torch.isfinite(tensor).all()):
            continue
        if ".experts." in name and tensor.dim() == 3:
            bad = [e for e in range(tensor.shape[0]) if not bool(torch.isfinite(tensor[e]).all())]
            name = f"{name} (experts {', '.join(map(str, bad))})"
        found.append(name)
    if found:
        raise ValueError(
            "The checkpoint holds NaN or infinity in: "
            + "; ".join(found)
            + ". It is damaged: fetch or export it again."
        )


def name_truncated_file(path, error: SafetensorError) -> str:
    """A message that says which safetensors file of a checkpoint folder cannot be read."""
    damaged = []
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            damaged.append(f"{file.name} ({file.stat().st_size} bytes)")
    where = ", ".join(damaged) or "a file"
    return f"{where} in {path} is not a whole safetensors file ({error}): fetch it again."
