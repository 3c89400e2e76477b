"""Published tensor names <-> module names.

Published checkpoints call the backbone `backbone.` and hold one tensor per expert; the modules call it `model.` (the
prefix transformers' tools expect) and stack the experts. MTP, head and all other names are the same on both sides.
"""

from __future__ import annotations

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

from ..configuration.configuration_nemotron_h import NemotronHConfig
from ..modeling.modeling_nemotron_h import NemotronHForCausalLM


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


def register() -> None:
    """Make transformers use `published_layout` for `nemotron_h`, in loading and in saving."""
    register_checkpoint_conversion_mapping("nemotron_h", published_layout(), overwrite=True)


def published_inventory(
    config: NemotronHConfig, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that `save_pretrained` writes for `config`, without allocating any.

    Args:
        dtype: of the model's weights; the router bias is float32 in any of them.

    Example:

    ```python
    >>> from nemotron_super import preset
    >>> from nemotron_super.conversion.checkpoint_names import published_inventory
    >>> len(published_inventory(preset("super")))
    42683
    ```
    """
    with torch.device("meta"):
        model = NemotronHForCausalLM(config).to(dtype)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in revert_weight_conversion(model, state).items()
    }
