"""Checks on weights as they come from disk: what is damaged, missing or misshapen is named as the files name it.

`check_headers` reads the headers of safetensors files only, before a tensor is loaded; `refuse_non_finite` looks at the
loaded values. Names in messages are the published ones, such as `backbone.layers.1.mixer.experts.3.up_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAMES_IN_A_MESSAGE = 12
_FULL_PRECISION = ("F64", "F32", "F16", "BF16")  # as safetensors spells them

# End of a published name -> the configuration fields that decide its shape. The first match counts.
_SIZES = (
    (("embeddings.weight", "lm_head.weight"), "vocab_size, hidden_size"),
    (("shared_experts.up_proj.weight", "shared_experts.down_proj.weight"),
     "moe_shared_expert_intermediate_size, hidden_size"),
    (("latent_proj.weight",), "moe_latent_size, hidden_size"),
    (("gate.weight",), "n_routed_experts, hidden_size"),
    (("gate.e_score_correction_bias",), "n_routed_experts"),
    (("in_proj.weight", "in_proj.bias"), "hidden_size, mamba_num_heads, mamba_head_dim, n_groups, ssm_state_size"),
    (("out_proj.weight",), "hidden_size, mamba_num_heads, mamba_head_dim"),
    (("conv1d.weight", "conv1d.bias"), "mamba_num_heads, mamba_head_dim, n_groups, ssm_state_size, conv_kernel"),
    (("A_log", ".D", "dt_bias"), "mamba_num_heads"),
    (("mixer.norm.weight",), "mamba_num_heads, mamba_head_dim"),
    (("q_proj.weight", "o_proj.weight"), "num_attention_heads, head_dim, hidden_size"),
    (("k_proj.weight", "v_proj.weight"), "num_key_value_heads, head_dim, hidden_size"),
    (("mixer.up_proj.weight", "mixer.down_proj.weight"), "intermediate_size, hidden_size"),
    (("score.weight", "score.bias"), "num_labels"),
)  # fmt: skip
_EXPERT_SIZES = "n_routed_experts, moe_intermediate_size, moe_latent_size (hidden_size where that is None)"


def published_name(name: str, base_model: bool = False, expert: int | None = None) -> str:
    """The name of a parameter in published checkpoints.

    Args:
        name: its name in a model with heads, or, with `base_model`, in the backbone alone.
        expert: which of the stacked experts, for `...experts.up_proj` and `...experts.down_proj`.
    """
    if base_model:
        name = f"backbone.{name}"
    elif name.startswith("model."):
        name = "backbone." + name.removeprefix("model.")
    if expert is not None:
        stack, _, projection = name.rpartition(".")
        name = f"{stack}.{expert}.{projection}.weight"
    return name


def is_scale(tensor: str) -> bool:
    """Whether a tensor of a checkpoint, by its name, is a scale of some quantisation."""
    return re.search(r"\.\w*scale(_2|_inv)?$", tensor) is not None


def is_quantised(tensor: str, dtype: str) -> bool:
    """Whether a tensor of a checkpoint, by its name and its dtype as safetensors spells it, is no plain value."""
    return is_scale(tensor) or dtype not in _FULL_PRECISION


def check_headers(model: PreTrainedModel, files: Sequence[str], load_config: LoadStateDictConfig) -> None:
    """Compare names and shapes in the headers of `files` with `model`, before a tensor is loaded.

    Tensors that are missing or surplus as a whole are left to transformers' report; here is what it cannot name: one
    expert out of a stack, and the configuration field behind a wrong shape. Of weights that other quantisation methods than
    ours pack, only the files are checked.

    Args:
        model: on any device; only shapes are read.
        files: all files of the checkpoint.
        load_config: how transformers is going to load them.

    Raises:
        ValueError: a file that is not a whole safetensors file, experts that are missing or surplus, shapes that do not
            fit; quantised tensors where no configuration says how to read them. With `ignore_mismatched_sizes` missing experts
            are logged instead, and shapes are looked at in quantised tensors only, which nothing could start afresh.
        FileNotFoundError: a shard that the index names and that is not there.
    """
    headers = read_headers(files)
    quantizer = load_config.hf_quantizer
    if quantizer is None or not quantizer.pre_quantized:
        unexplained = [name for name, (_, dtype) in headers.items() if is_quantised(name, dtype)]
        if unexplained:
            raise ValueError(
                f"The checkpoint holds quantised tensors, but neither config.json nor hf_quant_config.json says of which kind: "
                f"{listed(unexplained)}. Fetch hf_quant_config.json, or the `quantization_config` of config.json, as well."
            )
    if load_config.is_quantized and not getattr(quantizer, "headers_as_published", False):
        return
    ignore = load_config.ignore_mismatched_sizes
    conversions = load_config.weight_mapping or []
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    own = model.state_dict(keep_vars=True)
    # What DeepSpeed's third stage has partitioned is empty here, and knows its shape.
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in own.items()}
    base = model.base_model is model
    stacks: dict[str, dict[int, str]] = {}
    wrong, afresh = [], ", or pass ignore_mismatched_sizes=True to start these tensors afresh"
    for key, (shape, dtype) in headers.items():
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own:
            continue
        expected = shapes[name]
        if converter is not None:
            expert = apply_renamings(key, renamings).rpartition(".experts.")[2].partition(".")[0]
            if not expert.isdecimal():
                continue
            stacks.setdefault(name, {})[int(expert)] = key
            expected = expected[1:]
        if shape != expected and (not ignore or is_quantised(key, dtype)):
            published = published_name(name, base)
            afresh = "" if is_quantised(key, dtype) else afresh
            wrong.append(f"{key} has shape {shape}, the configuration wants {expected} (see {_sizes(published)})")

    lost, surplus = [], []
    for name, found in stacks.items():
        count = shapes[name][0]
        lost += [published_name(name, base, expert) for expert in range(count) if expert not in found]
        surplus += [key for expert, key in sorted(found.items()) if expert >= count]
    if lost:
        message = (
            f"The checkpoint lacks {listed(lost)}, of whose layers it holds other experts. Is a file missing, or is "
            "`n_routed_experts` too high?"
        )
        if not ignore:
            raise ValueError(message)
        logger.warning(message)
    if surplus and not ignore:
        raise ValueError(
            f"The checkpoint holds more experts than `n_routed_experts` ({model.config.n_routed_experts}): "
            f"{listed(surplus)}."
        )
    if wrong:
        raise ValueError(
            f"The checkpoint does not fit its configuration: {listed(wrong, '; ')}. Correct the configuration{afresh}."
        )


def read_headers(files: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype, as safetensors spells it, by tensor name over safetensors files, from their headers alone.

    Raises:
        ValueError: a file that is not safetensors or not whole, named.
        FileNotFoundError: a file that is not there, named.
    """
    headers = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file: pickled weights can run code, and are not opened.")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(key)
                    headers[key] = (tuple(tensor.get_shape()), tensor.get_dtype())
        except SafetensorError as error:
            raise ValueError(_not_whole([file], error)) from error
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{file} is not there, though the checkpoint's index names it: fetch it."
            ) from error
    return headers


def refuse_non_finite(model: PreTrainedModel) -> None:
    """Raise if a weight holds NaN or infinity.

    Raises:
        ValueError: naming every such tensor, and of stacked experts each one.
    """
    base = model.base_model is model
    found = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() == 1:
            continue
        if _is_finite(tensor):
            continue
        if ".experts." in name and tensor.dim() == 3:
            found += [published_name(name, base, e) for e in range(tensor.shape[0]) if not _is_finite(tensor[e])]
        else:
            found.append(published_name(name, base))
    if found:
        raise ValueError(
            f"The checkpoint holds NaN or infinity in {listed(found)}. It is damaged: fetch or export it again."
        )


def name_truncated_file(path, error: SafetensorError) -> str:
    """A message that says which safetensors file of a checkpoint folder cannot be read."""
    damaged = []
    for file in sorted(Path(path).glob("*.safetensors")) if path is not None and Path(path).is_dir() else []:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            damaged.append(file)
    return _not_whole(damaged or [path], error)


def refuse_pickled(path, use_safetensors: bool | None) -> None:
    """Refuse weights that are Python pickles: opening one can run whatever code it holds.

    Args:
        path: a folder, or anything else, about which nothing is then said.
        use_safetensors: as given to `from_pretrained`.

    Raises:
        ValueError: `use_safetensors=False`, or a folder with pickled weights and no safetensors file.
    """
    if use_safetensors is False:
        raise ValueError(
            "`use_safetensors=False` asks for pickled weights, which can run code when they are opened: only safetensors "
            "files are read. Leave it out."
        )
    folder = Path(path) if isinstance(path, str | Path) else None
    if folder is None or not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled and not (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds pickled weights only ({listed(pickled)}), which can run code when they are opened. Convert "
            "them to safetensors where you trust them: safetensors.torch.save_file(torch.load(file, weights_only=True), "
            '"model.safetensors").'
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    # Least and largest are NaN where any value is; unlike a sum in float32 they need no second tensor.
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def _sizes(published: str) -> str:
    if ".experts." in published:
        return _EXPERT_SIZES
    return next((fields for ends, fields in _SIZES if published.endswith(ends)), "hidden_size")


def _not_whole(files: Sequence, error: SafetensorError) -> str:
    sizes = ", ".join(f"{f} ({Path(f).stat().st_size} bytes)" if Path(str(f)).is_file() else str(f) for f in files)
    return f"{sizes} is not a whole safetensors file ({error}): fetch it again."


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first dozen of `names`, and how many more there are."""
    more = len(names) - _NAMES_IN_A_MESSAGE
    return separator.join(names[:_NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")
