"""Which modules are quantised and how: ModelOpt's two JSON dialects, and recipes for quantising a checkpoint here.

ModelOpt describes a checkpoint twice: as `quantization_config` in config.json, and in `hf_quant_config.json`. Both are read, and
both are written. Modules are called by their published names, such as `backbone.layers.1.mixer.experts.0.up_proj`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..modeling.quantized_layers import FORMATS

RECIPES = ("release", "nvfp4", "fp8")
MIXED = "MIXED_PRECISION"
# Readers recognise the format by the producer's name; the version is that of the layout written here.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}


class NVFP4Config(QuantizationConfigMixin):
    """The quantisation of a checkpoint in ModelOpt's formats, NVFP4 and FP8.

    Give a `recipe` to quantise a full-precision checkpoint as it is loaded, without data:

    - `"release"`: as NVIDIA released Super: routed experts in NVFP4; Mamba projections and shared experts in FP8;
      attention, latent projections, router, embeddings, heads and MTP as they were. (The release exempts single
      projections, found by search; the recipe does not.)
    - `"nvfp4"`, `"fp8"`: every linear map of the backbone, but not the router.

    The other arguments are the keys of ModelOpt's JSON, of either dialect; give them instead to quantise by a list of your own.

    Args:
        quant_algo: "NVFP4", "FP8" or "MIXED_PRECISION".
        ignore: modules that stay as they are; `*` stands for anything, and a module's name also for what is below it.
        quantized_layers: module -> {"quant_algo": ..., "group_size": ...}, for MIXED_PRECISION.
        kv_cache_scheme: None, or 8-bit floats: the checkpoint then holds a `k_scale` and `v_scale` per attention layer.
        quantization: the dictionary of that name in hf_quant_config.json, in place of the four above.

    Raises:
        ValueError: an unknown recipe, format or key, a group size other than 16, or one of the other arguments beside a recipe.

    Example:

    ```python
    >>> from nemotron_super import NemotronHForCausalLM, NVFP4Config
    >>> config = NVFP4Config(recipe="release")
    >>> model = NemotronHForCausalLM.from_pretrained("model_card/nemotron-h-tiny", quantization_config=config)
    ```
    """

    def __init__(
        self,
        recipe: str | None = None,
        *,
        quant_algo: str | None = None,
        ignore: Sequence[str] | None = None,
        quantized_layers: Mapping[str, Mapping[str, Any]] | None = None,
        kv_cache_scheme: Mapping[str, Any] | None = None,
        config_groups: Mapping[str, Mapping[str, Any]] | None = None,
        quantization: Mapping[str, Any] | None = None,
        producer: Mapping[str, Any] | None = None,
        quant_method: str = "modelopt",
    ):
        if quant_method != "modelopt":
            raise ValueError(f"`quant_method` is {quant_method!r}: this configuration is for 'modelopt'.")
        if (recipe is not None) + (quant_algo is not None) + (quantization is not None) != 1:
            raise ValueError("Give one of `recipe`, `quant_algo` and `quantization` (of hf_quant_config.json).")
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"Unknown recipe {recipe!r}: known are {', '.join(RECIPES)}.")
        beside = {
            "ignore": ignore,
            "quantized_layers": quantized_layers,
            "kv_cache_scheme": kv_cache_scheme,
            "config_groups": config_groups,
        }
        given = [name for name, value in beside.items() if value is not None]
        if given and (recipe is not None or quantization is not None):
            whose = f"`recipe` {recipe!r}" if recipe is not None else "`quantization`"
            raise ValueError(
                f"{whose} says which modules are quantised: leave out {', '.join(given)}, or give `quant_algo`."
            )
        self.quant_method = quant_method
        self.recipe = recipe
        self.producer = dict(producer or _PRODUCER)
        if quantization is not None:
            _check_dictionary(quantization, "`quantization` of hf_quant_config.json")
            _check_algo(quantization.get("quant_algo"))
            known = {"quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules", "quantized_layers"}
            _refuse_surplus(quantization, known, "hf_quant_config.json")
            quant_algo, ignore = quantization.get("quant_algo"), quantization.get("exclude_modules")
            quantized_layers = quantization.get("quantized_layers")
            _check_group_size(quantization.get("group_size"), quant_algo, "hf_quant_config.json")
            kv_algo = quantization.get("kv_cache_quant_algo")
            if kv_algo not in (None, "FP8"):
                raise ValueError(f"`kv_cache_quant_algo` is {kv_algo!r}: known are null and 'FP8'.")
            self.fp8_cache = kv_algo == "FP8"
        else:
            if recipe is None:
                _check_algo(quant_algo)
            _check_cache_scheme(kv_cache_scheme)
            self.fp8_cache = kv_cache_scheme is not None
        for name, value in (("config_groups", config_groups), ("quantized_layers", quantized_layers)):
            _check_dictionary({} if value is None else value, f"`{name}`")
        for name, group in (config_groups or {}).items():
            _check_dictionary(group, f"{name} of `config_groups`")
            _check_group(group, needs_targets=quant_algo == MIXED)
        if isinstance(ignore, str):
            raise ValueError(f"The modules that stay as they are must be a list, not the string {ignore!r}.")
        if quant_algo == MIXED and config_groups:
            # In the order of the groups: whoever writes JSON with sorted keys loses that of `quantized_layers`.
            grouped = _layers_of_groups(config_groups)
            layers = grouped if quantized_layers is None else quantized_layers
            quantized_layers = {m: layers[m] for m in (*grouped, *layers) if m in layers}
        self.quant_algo = quant_algo
        self.ignore = list(ignore or ())
        self.quantized_layers = None if quantized_layers is None else copy.deepcopy(dict(quantized_layers))
        if recipe is None:
            self._check_layers()

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """From `quantization_config` of config.json, or from hf_quant_config.json with a `quant_method` beside.

        Raises:
            ValueError: keys that are not known, and what the constructor refuses.
        """
        _refuse_surplus(config_dict, set(inspect.signature(cls).parameters), "`quantization_config`")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def _check_layers(self) -> None:
        if self.quant_algo != MIXED and self.quantized_layers:
            raise ValueError(f"`quantized_layers` belongs to {MIXED}; `quant_algo` is {self.quant_algo!r}.")
        if self.quant_algo == MIXED and not self.quantized_layers:
            raise ValueError(f"{MIXED} needs `quantized_layers`, the format of each module.")
        for module, entry in (self.quantized_layers or {}).items():
            _check_dictionary(entry, module)
            if entry.get("quant_algo") not in FORMATS:
                raise ValueError(
                    f"{module} has the unknown `quant_algo` {entry.get('quant_algo')!r}: known are {', '.join(FORMATS)}."
                )
            _check_group_size(entry.get("group_size"), entry["quant_algo"], module)

    def format_of(self, module: str) -> str | None:
        """Name of the format in which a linear map is stored, by its published name; None for full precision."""
        if self.quant_algo == MIXED:
            entry = (self.quantized_layers or {}).get(module)
            return None if entry is None else entry["quant_algo"]
        parts = module.split(".")
        above = (".".join(parts[: i + 1]) for i in range(len(parts)))
        excluded = any(fnmatchcase(name, pattern) for name in above for pattern in self.ignore)
        return None if excluded else self.quant_algo

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` as ModelOpt writes it into config.json."""
        if self.quant_algo is None:
            return {"quant_method": self.quant_method, "recipe": self.recipe}
        targets: dict[str, list[str]] = {}
        if self.quant_algo == MIXED:
            for module, entry in (self.quantized_layers or {}).items():
                targets.setdefault(entry["quant_algo"], []).append(module)
        else:
            targets[self.quant_algo] = ["Linear"]
        described = {
            "config_groups": {
                f"group_{i}": {"input_activations": _bits(algo), "weights": _bits(algo), "targets": modules}
                for i, (algo, modules) in enumerate(targets.items())
            },
            "ignore": list(self.ignore),
            "quant_algo": self.quant_algo,
            "producer": dict(self.producer),
            "quant_method": self.quant_method,
        }
        if self.quant_algo == MIXED:
            described["quantized_layers"] = copy.deepcopy(self.quantized_layers)
        if self.fp8_cache:
            described["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        return described

    def to_hf_quant_config(self) -> dict[str, Any]:
        """The content of hf_quant_config.json."""
        described: dict[str, Any] = {
            "quant_algo": self.quant_algo,
            "kv_cache_quant_algo": "FP8" if self.fp8_cache else None,
        }
        if self.quant_algo == MIXED:
            described["quantized_layers"] = copy.deepcopy(self.quantized_layers)
            if self.ignore:
                described["exclude_modules"] = list(self.ignore)
        else:
            group_size = FORMATS[self.quant_algo or ""].group_size
            described |= {} if group_size is None else {"group_size": group_size}
            described["exclude_modules"] = list(self.ignore)
        return {"producer": dict(self.producer), "quantization": described}


def layer_entry(algo: str) -> dict[str, Any]:
    """A module's entry in `quantized_layers`."""
    group_size = FORMATS[algo].group_size
    return {"quant_algo": algo} if group_size is None else {"quant_algo": algo, "group_size": group_size}


def _check_algo(algo: str | None) -> None:
    # Before all else: other formats have keys of their own, which would be refused in their place.
    if algo not in (*FORMATS, MIXED):
        raise ValueError(f"Unknown `quant_algo` {algo!r}: known are {', '.join((*FORMATS, MIXED))}.")


def _bits(algo: str) -> dict[str, Any]:
    described = {"dynamic": False, "num_bits": FORMATS[algo].bits, "type": "float"}
    group_size = FORMATS[algo].group_size
    return described if group_size is None else {**described, "group_size": group_size}


def _algo_of_bits(described: Mapping[str, Any]) -> str | None:
    return next((n for n, f in FORMATS.items() if f.bits == described.get("num_bits")), None)


def _check_dictionary(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}, not a dictionary.")


def _check_group(group: Mapping[str, Any], needs_targets: bool) -> None:
    if needs_targets and not group.get("targets"):
        raise ValueError(f"A group of `config_groups` names no `targets`, which {MIXED} needs.")
    weights = group.get("weights") or {}
    algo = _algo_of_bits(weights)
    if algo is None or weights.get("type") != "float":
        raise ValueError(
            f"A group of `config_groups` has weights of {dict(weights)}: known are 4-bit and 8-bit floats."
        )
    _check_group_size(weights.get("group_size"), algo, "`config_groups`")


def _layers_of_groups(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {module: layer_entry(_algo_of_bits(g["weights"]) or "") for g in groups.values() for module in g["targets"]}


def _check_group_size(group_size: int | None, algo: str | None, where: str) -> None:
    wanted = FORMATS[algo].group_size if algo in FORMATS else None
    if group_size is not None and wanted is not None and group_size != wanted:
        raise ValueError(f"{where} has `group_size` {group_size}: {algo} has blocks of {wanted}.")


def _check_cache_scheme(scheme: Mapping[str, Any] | None) -> None:
    if scheme is None:
        return
    _check_dictionary(scheme, "`kv_cache_scheme`")
    if (scheme.get("num_bits"), scheme.get("type"), scheme.get("dynamic")) != (8, "float", False):
        raise ValueError(f"`kv_cache_scheme` is {dict(scheme)}: known are null and 8-bit floats with stored scales.")


def _refuse_surplus(given: Mapping[str, Any], known: set[str], where: str) -> None:
    surplus = [key for key in given if key not in known]
    if surplus:
        raise ValueError(f"{where} has keys that are not known here: {', '.join(surplus)}.")
