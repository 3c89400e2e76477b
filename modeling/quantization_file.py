"""`hf_quant_config.json`: what ModelOpt says of a quantised checkpoint where config.json does not say it."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

FILE = "hf_quant_config.json"
_WHERE_FROM = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_NOT_FIELDS = ("dtype", "torch_dtype", "quantization_config", "attn_implementation", "experts_implementation")


def find_quantization(
    config_class: type[PreTrainedConfig], path: str | os.PathLike | None, arguments: dict[str, Any]
) -> None:
    """Give a checkpoint's configuration the content of the file, if there is one and config.json is silent.

    Args:
        path: as given to `from_pretrained`.
        arguments: its keyword arguments; `config` is put there.

    Raises:
        ValueError: a file that is not JSON, or does not describe a quantisation.
    """
    given = arguments.get("config")
    if hasattr(getattr(given, "quantization_config", None), "to_dict"):
        # The configuration of a model in memory. transformers looks for a dictionary, as in a file.
        arguments["config"] = given = copy.deepcopy(given)
        given.quantization_config = given.quantization_config.to_dict()
    if path is None:
        return
    where = {name: arguments[name] for name in _WHERE_FROM if name in arguments}
    file = cached_file(
        path, FILE, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **where
    )
    if file is None:
        return
    config = arguments.get("config")
    if not isinstance(config, PreTrainedConfig):
        config = config_class.from_pretrained(config or path, **where)
        # Fields of the configuration among the keyword arguments are for it, as `from_pretrained` would have it.
        for name in [n for n in arguments if hasattr(config, n) and n not in _NOT_FIELDS]:
            setattr(config, name, arguments.pop(name))
        arguments["config"] = config
    if getattr(config, "quantization_config", None) is None:
        try:
            described = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): fetch it again.") from error
        if not isinstance(described, dict) or not isinstance(described.get("quantization"), dict):
            raise ValueError(
                f"{file} has no `quantization` that says how the checkpoint is quantised: fetch it again."
            )
        arguments["config"] = config = copy.deepcopy(config)  # the caller's stays as it was
        config.quantization_config = {"quant_method": "modelopt", **described}


def drop_quantization(folder: str | os.PathLike) -> None:
    """Remove the file from a folder into which a checkpoint in full precision is written."""
    (Path(folder) / FILE).unlink(missing_ok=True)
