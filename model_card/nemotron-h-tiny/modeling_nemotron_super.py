"""The model code of this checkpoint is the package nemotron-super; this file only names its classes."""

try:
    from nemotron_super import (  # noqa: F401
        NemotronHConfig,
        NemotronHForCausalLM,
        NemotronHForSequenceClassification,
        NemotronHForTokenClassification,
        NemotronHModel,
    )
except ImportError as error:
    raise ImportError(f"This checkpoint needs nemotron-super ({error}): pip install nemotron-super") from error
