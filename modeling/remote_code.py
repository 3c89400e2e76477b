"""Checkpoints that open where nobody imported this package: `trust_remote_code=True` finds our classes through a stub.

transformers runs a Python file of the checkpoint if, and only if, it is asked to. The file written here holds no model:
it names the classes of the installed package. Without the question, transformers opens the checkpoint with whatever is
registered for `nemotron_h`: ours where the package is imported, its own elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

_STUB = "modeling_nemotron_super"
STUB_FILE = f"{_STUB}.py"

_CLASSES = {
    "AutoConfig": "NemotronHConfig",
    "AutoModel": "NemotronHModel",
    "AutoModelForCausalLM": "NemotronHForCausalLM",
    "AutoModelForSequenceClassification": "NemotronHForSequenceClassification",
    "AutoModelForTokenClassification": "NemotronHForTokenClassification",
}
AUTO_MAP = {auto: f"{_STUB}.{name}" for auto, name in _CLASSES.items()}

# transformers looks through the file for packages that are not installed, and would ask for `nemotron_super`; what
# stands inside `try` it leaves alone.
_STUB_TEXT = f'''"""The model code of this checkpoint is the package nemotron-super; this file only names its classes."""

try:
    from nemotron_super import (  # noqa: F401
        {("," + chr(10) + " " * 8).join(_CLASSES.values())},
    )
except ImportError as error:
    raise ImportError(f"This checkpoint needs nemotron-super ({{error}}): pip install nemotron-super") from error
'''


def write_stub(folder: str | os.PathLike) -> None:
    """Write the stub to which `AUTO_MAP` points into a checkpoint folder, which is made where it is not there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / STUB_FILE).write_text(_STUB_TEXT, encoding="utf-8")
