"""Keep a prefilled prompt in a file: a `HybridCache` to safetensors and back, in another process or on another device.

A snapshot fits the model that made it and no other: it carries a fingerprint of configuration, dtype and weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .cache import HybridCache, Mamba2CacheLayer

_FORMAT = "nemotron_super.hybrid_cache.1"
# Fields that say how a model was saved or is run, not what it computes.
_IRRELEVANT = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "auto_map",
    "use_cache",
    "_name_or_path",
)
_SAMPLED = 16


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the configuration, the dtype, and a few values of every parameter (not of all of them: 240 GB)."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in _IRRELEVANT}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    digest.update(str(model.dtype).encode())
    for name, parameter in model.base_model.named_parameters():
        values = parameter.detach().flatten()
        step = max(1, values.numel() // _SAMPLED)
        digest.update(name.encode())
        digest.update(values[::step][:_SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_snapshot(cache: HybridCache, path: Path | str, model: PreTrainedModel) -> None:
    """Write a cache to a safetensors file. Tokens of a recorded past are part of it and can no longer be taken back.

    Args:
        cache: filled by `model`.
        path: the file; written beside it first and then moved, so that it is never half there.
    """
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, Mamba2CacheLayer):
            if layer.pending is not None:
                raise ValueError(
                    f"`cache` layer {index} still holds {layer.pending.shape[1]} tokens that could be taken back: read at "
                    "least one more token without recording, or save before `activate_past_recording`."
                )
            found = {"conv_state": layer.conv_states[0], "ssm_state": layer.recurrent_states[0]}
        else:
            found = {name: getattr(layer, name, None) for name in ("keys", "values")}
            # A cache of fixed size has room that nothing fills yet.
            found = {n: None if t is None else t[..., : cache.get_seq_length(), :] for n, t in found.items()}
        for name, tensor in found.items():
            if tensor is not None and tensor.numel():
                tensors[f"layers.{index}.{name}"] = tensor.detach().contiguous()
    if not tensors:
        raise ValueError("`cache` is empty: there is nothing to save.")
    metadata = {"format": _FORMAT, "fingerprint": fingerprint(model), "tokens": str(cache.get_seq_length())}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)


def load_snapshot(path: Path | str, model: PreTrainedModel) -> HybridCache:
    """Read a cache that `save_snapshot` wrote, onto `model`'s device.

    To continue it more than once, give each continuation a `copy.deepcopy`; for a batch,
    `cache.batch_repeat_interleave(rows)`.

    Raises:
        ValueError: the file is no snapshot, or was made by a model of another configuration, dtype or weights.
    """
    with safe_open(path, "pt", device=str(model.device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is no snapshot of a hybrid cache (format {metadata.get('format')!r}).")
        if metadata["fingerprint"] != fingerprint(model):
            raise ValueError(
                f"{path} was made by another model: configuration, dtype ({model.dtype} here) or weights differ. Prefill "
                "the prompt again with this one."
            )
        cache = HybridCache(model.config)
        for index in range(len(cache.layers)):
            names = [name for name in file.keys() if name.startswith(f"layers.{index}.")]  # noqa: SIM118
            found = {name.rpartition(".")[2]: file.get_tensor(name) for name in names}
            if "conv_state" in found:
                cache.update_conv_state(found["conv_state"], index)
                cache.update_recurrent_state(found["ssm_state"], index)
            elif "keys" in found:
                cache.update(found["keys"], found["values"], index)
        cache.note_tokens(int(metadata["tokens"]), packed=False)
    return cache
