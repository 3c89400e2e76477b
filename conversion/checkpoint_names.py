"""Published tensor names <-> module names.

Published checkpoints call the backbone `backbone.` and hold one tensor per expert; the modules call it `model.` (the
prefix transformers' tools expect) and stack the experts. MTP, head and all other names are the same on both sides.
"""

from __future__ import annotations

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming


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
