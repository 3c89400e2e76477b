"""Keep a prefilled prompt in a file: a `HybridCache` to safetensors and back, in another process or on another device.

A snapshot fits the model that made it and no other: it carries a fingerprint of configuration, dtype and weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.cache_utils import DummyLayer

from .cache import HybridCache, Mamba2CacheLayer, check_cache, refuse_ragged
from .fp8_cache import Fp8CacheLayer, Fp8Format
from .static_cache import StaticFp8Layer

_FORMAT = "nemotron_super.hybrid_cache.2"
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
_MASK = "attention_mask"


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the configuration, the dtype, and a few values of every tensor of the weights (all are up to 240 GB)."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in _IRRELEVANT}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    digest.update(str(model.dtype).encode())
    base = model.base_model
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        values = tensor.detach().flatten()
        step = max(1, values.numel() // _SAMPLED)
        digest.update(name.encode())
        digest.update(values[::step][:_SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_snapshot(
    cache: HybridCache, path: Path | str, model: PreTrainedModel, attention_mask: torch.Tensor | None = None
) -> None:
    """Write a cache to a safetensors file, with every state in the dtype that it has.

    Args:
        cache: filled by `model`.
        path: the file; written beside it first and then moved, so that it is never half there.
        attention_mask: (batch, tokens) with 0 for padding, of all that the cache holds. Whoever goes on with the cache needs
            it: `snapshot_mask` reads it back. None where there was no padding.

    Raises:
        ValueError: another kind of cache; it holds padding but no mask is given, or one of another shape; it is empty, still
            holds tokens of a recorded past, or rows that drafts left at different lengths.
    """
    if not isinstance(cache, HybridCache):
        raise ValueError(f"`cache` is a {type(cache).__name__}: a snapshot is made of a `HybridCache(model.config)`.")
    refuse_ragged(cache)
    tensors: dict[str, torch.Tensor] = {}
    if attention_mask is None and cache.holds_padding:
        raise ValueError(
            "`cache` holds padding, which nothing in it marks: give the `attention_mask` of all that it holds, (batch, tokens)."
        )
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, Mamba2CacheLayer) and layer.pending is not None:
            raise ValueError(
                f"`cache` layer {index} still holds {layer.pending.shape[1]} tokens that could be taken back: read at "
                "least one more token without recording, or save before `activate_past_recording`."
            )
        for name, tensor in _states(layer).items():
            if tensor is not None and name in ("keys", "values"):
                # A cache of fixed size has room that nothing fills yet.
                tensor = tensor[..., : cache.get_seq_length(), :]
            if tensor is not None and tensor.numel():
                tensors[f"layers.{index}.{name}"] = tensor.detach().contiguous()
    if not tensors:
        raise ValueError("`cache` is empty: there is nothing to save.")
    if attention_mask is not None:
        held = (next(t.shape[0] for t in tensors.values() if t.dim()), cache.get_seq_length())
        if attention_mask.shape != held:
            raise ValueError(f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `cache` holds {held}.")
        tensors[_MASK] = attention_mask.detach().to(torch.long).contiguous()
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint(model),
        "tokens": str(cache.get_seq_length()),
        "kv_dtype": str(cache.kv_dtype),
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)


def load_snapshot(path: Path | str, model: PreTrainedModel, kv_dtype: torch.dtype | None = None) -> HybridCache:
    """Read a cache that `save_snapshot` wrote, onto `model`'s device.

    To continue it more than once, give each continuation a `copy.deepcopy`; for a batch,
    `cache.batch_repeat_interleave(rows)`. Behind a padded prompt, give the continuation `snapshot_mask(path)` with a 1 for each
    of its tokens.

    Args:
        kv_dtype: as in `HybridCache`, and as the snapshot was made with.

    Raises:
        ValueError: the file is no snapshot, is damaged, or was made by a model of another configuration, dtype (of the
            SSM state too) or weights, or with another `kv_dtype`.
    """
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            _check_metadata(metadata, path, model, kv_dtype)
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != _MASK}  # noqa: SIM118
            padded = _MASK in file.keys() and not bool(file.get_tensor(_MASK).all())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}. Make the snapshot again.") from error
    cache = HybridCache(model.config, kv_dtype=kv_dtype)
    expected = {f"layers.{index}.{name}" for index, layer in enumerate(cache.layers) for name in _states(layer)}
    if expected != tensors.keys():
        odd = ", ".join(sorted(expected ^ tensors.keys()))
        raise ValueError(f"{path} is damaged: tensors are missing or surplus ({odd}). Make the snapshot again.")
    for index, layer in enumerate(cache.layers):
        found = {name: tensors[f"layers.{index}.{name}"] for name in _states(layer)}
        if isinstance(layer, Mamba2CacheLayer):
            cache.update_conv_state(found["conv_state"], index)
            cache.update_recurrent_state(found["ssm_state"], index)
        elif isinstance(layer, Fp8CacheLayer):
            layer.format = Fp8Format(found["k_scale"], found["v_scale"])
            layer.store(found["keys"], found["values"])
        elif found:
            cache.update(found["keys"], found["values"], index)
    cache.note_tokens(int(metadata["tokens"]), padded=padded)
    check_cache(cache, model.config, batch=next(t.shape[0] for t in tensors.values() if t.dim()))
    return cache


def snapshot_mask(path: Path | str) -> torch.Tensor | None:
    """The `attention_mask` that a snapshot was saved with, (batch, tokens) int64; None where there was none."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(_MASK) if _MASK in file.keys() else None  # noqa: SIM118


def _check_metadata(metadata: dict[str, str], path, model: PreTrainedModel, kv_dtype: torch.dtype | None) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is no snapshot of a hybrid cache (format {metadata.get('format')!r}).")
    if metadata["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"{path} was made by another model: configuration, dtype ({model.dtype} here) or weights differ. Prefill "
            "the prompt again with this one."
        )
    if metadata["kv_dtype"] != str(kv_dtype):
        raise ValueError(
            f"{path} was made with kv_dtype={metadata['kv_dtype']}, not with kv_dtype={kv_dtype}: load it with that, or prefill "
            "the prompt again."
        )


def _states(layer) -> dict[str, torch.Tensor | None]:
    """What a snapshot holds of a layer, by name; None where there is nothing yet."""
    if isinstance(layer, Mamba2CacheLayer):
        return {"conv_state": layer.conv_states[0], "ssm_state": layer.recurrent_states[0]}
    if isinstance(layer, DummyLayer):
        return {}
    states = {name: getattr(layer, name, None) for name in ("keys", "values")}
    if isinstance(layer, Fp8CacheLayer | StaticFp8Layer):
        scales = (None, None) if layer.format is None else (layer.format.k_scale, layer.format.v_scale)
        states |= dict(zip(("k_scale", "v_scale"), scales, strict=True))
    return states
