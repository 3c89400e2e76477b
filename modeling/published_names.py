"""Published tensor names <-> module names.

Published checkpoints call the backbone `backbone.` and hold one tensor per expert; the modules call it `model.` (the
prefix transformers' tools expect) and stack the experts. MTP, head and all other names are the same on both sides.

transformers converts by itself what `from_pretrained` reads and `save_pretrained` writes, once it knows the layout.
Its `Trainer` does not: to resume a run, and to put the best weights back at its end, it reads what `save_pretrained`
wrote and hands it to `load_state_dict` as it is.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS, register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from .quantized_layers import expert_tensor

_EXPERT = re.compile(r"(?P<stack>.*mixer\.experts\.)(?P<expert>\d+)\.(?P<projection>up_proj|down_proj)\.(?P<name>\w+)")


def published_layout() -> list[WeightRenaming | WeightConverter]:
    """The transforms from published names to module names; transformers reverses them when it saves."""
    return [
        WeightRenaming(r"^backbone\.", "model."),
        *(
            WeightConverter(
                source_patterns=f"mixer.experts.*.{name}.weight",
                target_patterns=f"mixer.experts.{name}",
                operations=[MergeModulelist(dim=0)],
            )
            for name in ("up_proj", "down_proj")
        ),
    ]


@cache
def register_layout() -> None:
    """Make transformers use `published_layout` for `nemotron_h`, in loading and in saving; once in a process.

    transformers looks layouts up with a model in hand, so the first model made is early enough: the table that they
    go into holds every architecture of transformers, and takes twice as long to build as this package to import.
    What the user registered before then stays.
    """
    if "nemotron_h" not in USER_REGISTERED_MAPPINGS:
        register_checkpoint_conversion_mapping("nemotron_h", published_layout(), overwrite=True)


def take_published_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]
) -> None:
    """Rename in place what a published checkpoint of `module` calls differently, and stack experts, packed ones with their scales.

    Args:
        module: a Nemotron-H model whose names begin with `prefix` in `state_dict`.
        missing_keys: gets the experts of which others came; their weights stay as they are.
        error_msgs: gets experts of a wrong shape, or packed ones in the place of others.
    """
    stacks: dict[str, Tensor] = {}
    ends: dict[str, str] = {}  # of the published names
    seen: dict[str, set[int]] = {}
    parameters = dict(module.named_parameters())
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.startswith("backbone."):
            name = ("model." if hasattr(module, "model") else "") + name.removeprefix("backbone.")
        found = _EXPERT.fullmatch(name)
        stack, expert, end = "", 0, ""
        if found:
            stack, expert = found["stack"] + expert_tensor(found["projection"], found["name"]), int(found["expert"])
            end = f"{found['projection']}.{found['name']}"
        own = parameters.get(stack)
        if own is None or expert >= own.shape[0]:
            if prefix + name != key:
                state_dict[prefix + name] = state_dict.pop(key)
            continue
        tensor = state_dict.pop(key)
        if tensor.shape != own.shape[1:]:
            error_msgs.append(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(own.shape[1:])}.")
            continue
        if tensor.dtype != own.dtype and not (tensor.dtype.itemsize > 1 and own.dtype.itemsize > 1):
            error_msgs.append(f"{key} is {tensor.dtype}, expected {own.dtype}: codes and values are not converted.")
            continue
        if stack not in stacks:
            stacks[stack] = torch.empty_like(own, device=tensor.device) if own.is_meta else own.detach().clone()
        stacks[stack][expert] = tensor
        seen.setdefault(stack, set()).add(expert)
        ends[stack] = end
    for stack, tensor in stacks.items():
        state_dict[prefix + stack] = tensor
        before = (prefix + stack).rpartition(".")[0]
        missing_keys += [f"{before}.{e}.{ends[stack]}" for e in range(tensor.shape[0]) if e not in seen[stack]]
