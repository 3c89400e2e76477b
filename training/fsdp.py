"""What accelerate's FSDP2 has to be told of this model, and what it leaves out.

The unit of sharding is a block, of the backbone as of the MTP head. Weights are kept and updated in float32; with `bf16` they are
gathered and computed with in bfloat16, gradients are summed over ranks in float32, and the loss stays float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from ..configuration.configuration_nemotron_h import NemotronHConfig
from ..modeling.modeling_nemotron_h import NemotronHForCausalLM


def load_on_first_rank(folder: Path | str, arguments: TrainingArguments, dtype: torch.dtype) -> NemotronHForCausalLM:
    """The checkpoint in `folder`; where `fsdp_config` has `cpu_ram_efficient_loading`, on the first rank alone.

    The other ranks get a model whose memory nobody has touched, to be filled when the trainer shards it. transformers (5.24)
    would read every weight on every rank: eight times 494 GB on a host of eight GPUs, for Super in float32.
    """
    shares = arguments.fsdp and arguments.fsdp_plugin_args["cpu_ram_efficient_loading"]
    if not shares or arguments.process_index == 0:
        return NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.device("meta"):
        model = NemotronHForCausalLM(NemotronHConfig.from_pretrained(folder)).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def prepare_fsdp(accelerator: Accelerator, model: nn.Module) -> None:
    """Fit accelerate's FSDP2 to `model`. Call it before `accelerator.prepare`, on every rank.

    Args:
        accelerator: one whose state has an `fsdp_plugin`.
        model: a `NemotronHForCausalLM`, alone or under PEFT.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        # accelerate looks for every class named, and a model without MTP has no blocks of it.
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = [name for name in model._no_split_modules if name in present]
    if plugin.mixed_precision_policy is not None:
        # accelerate would sum gradients, and return the loss, in bfloat16.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )
    if plugin.cpu_ram_efficient_loading:
        _hand_out_buffers(accelerator, model)


def _hand_out_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Let `accelerator.prepare` give every rank the buffers of rank 0, the only one that has loaded anything.

    accelerate hands out parameters alone, and stops at a buffer that is saved with them: the routers' correction bias.
    """
    prepare = accelerator.prepare

    def prepare_with_buffers(*args, **kwargs):
        saved = [
            (module, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        for module, name in saved:
            module._non_persistent_buffers_set.add(name)
        try:
            prepared = prepare(*args, **kwargs)
        finally:
            for module, name in saved:
                module._non_persistent_buffers_set.discard(name)
        if model in args:
            for module, name in saved:
                dist.broadcast(module._buffers[name], src=0)
        return prepared

    accelerator.prepare = prepare_with_buffers
