"""What a published checkpoint of a configuration holds: every tensor's name, shape and dtype."""

from __future__ import annotations

import torch
from transformers.core_model_loading import revert_weight_conversion

from ..configuration.configuration_nemotron_h import NemotronHConfig
from ..modeling.modeling_nemotron_h import NemotronHForCausalLM


def published_inventory(
    config: NemotronHConfig, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that `save_pretrained` writes for `config`, without allocating any.

    Args:
        dtype: of the model's weights; the router bias is float32 in any of them.

    Example:

    ```python
    >>> from nemotron_super import preset
    >>> from nemotron_super.conversion.inventory import published_inventory
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
