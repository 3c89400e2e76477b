"""What a training run is made of: one YAML file, every key with its meaning, unknown keys refused.

`PretrainConfig`, `SftConfig` and `LoraRunConfig` belong to `nemotron-super pretrain`, `sft` and `lora`; `describe` prints their
keys, which is what `--help` shows.
"""

from __future__ import annotations

import difflib
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import yaml


class ConfigError(ValueError):
    """A run's configuration that cannot be used. The message names the key and what to change."""


def key(help: str, default: Any = MISSING) -> Any:
    """A documented key; without a default it is required."""
    return field(default=default, metadata={"help": help}, kw_only=True)


@dataclass
class RunConfig:
    """The keys that every kind of run has."""

    model: str = key("folder of a checkpoint, or `preset:NAME` for a new model with the pretraining initialisation")
    output: str = key(
        "folder for checkpoints, the trained model, logs, pictures and the report; a run continues there"
    )
    data: str = key("what to train on: a JSONL file, a text file, a folder of those, or a folder saved by `datasets`")
    heldout: str | None = key("as `data`: what to evaluate on before and after", None)
    tokenizer: str | None = key("folder of the tokenizer; by default `model`", None)

    length: int = key("most tokens per row", 1024)
    too_long: Literal["error", "split", "truncate", "drop"] = key("what to do with longer documents", "error")
    on_bad: Literal["error", "drop"] = key("what to do with documents that have nothing to predict", "error")
    pool: int = key("documents that wait to be packed; more fill rows better", 1024)

    steps: int | None = key("optimizer steps; by default as many as `epochs` take", None)
    epochs: float = key("passes over the data, where `steps` is not given", 1.0)
    rows_per_step: int = key("rows per optimizer step, over all devices and accumulated", 8)
    rows_per_device: int = key("rows per device and forward", 1)

    learning_rate: float = key("at its plateau", 1e-5)
    warmup_steps: int = key("steps of linear warm-up", 10)
    decay_share: float = key("share of the steps, at the end, that decay by 1 - sqrt of their progress", 0.2)
    minimum_rate_share: float = key("the learning rate at the end, as a share of `learning_rate`", 0.01)
    weight_decay: float = key("of matrices; norms, biases and state-space parameters have none", 0.1)
    beta2: float = key("AdamW's second beta (its first is 0.9)", 0.95)
    clip: float = key("largest norm of the gradient", 1.0)
    mtp_scale: float | None = key("weight of the MTP loss, shared by the depths; by default the model's", None)
    mtp_depths: int | None = key("MTP depths to train; by default the model's", None)
    router_bias_rate: float = key("step of the routers' correction bias after every optimizer step; 0 leaves it", 1e-3)
    balance_coefficient: float = key("of the sequence-level load-balancing loss; 0 for none", 1e-4)

    dtype: Literal["float32", "bfloat16"] = key(
        "of the weights; with bfloat16, A_log, D, dt_bias and routers still have float32 master weights", "float32"
    )
    activation_checkpointing: bool = key("compute activations again in the backward instead of keeping them", False)
    seed: int = key("of initialisation and of the order of the rows", 0)
    log_every: int = key("steps between logs", 10)
    save_every: int | None = key("steps between checkpoints; by default none", None)
    keep_checkpoints: int | None = key("how many checkpoints to keep; by default all", 2)
    peak_tflops: float | None = key("of one device in the dtype of training; with it utilisation is logged", None)
    distributed: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "fields of transformers' DistributedConfig, which shards the model as it is loaded: `ep_size` splits the "
            "experts, `fsdp_size` the rest; without checkpoints on the way"
        },
        kw_only=True,
    )
    trainer: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further fields of transformers' TrainingArguments, such as `bf16`, `fsdp` or `deepspeed`"},
        kw_only=True,
    )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a YAML file.

        Raises:
            ConfigError: a file that is no mapping, or has unknown, missing or wrong keys: all of them named.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected keys with values, found {type(content).__name__}.")
        return cls.of(content, str(path))

    @classmethod
    def of(cls, content: dict[str, Any], where: str = "configuration") -> Self:
        """From a mapping. `where` opens the error messages. Raises as `load` does."""
        known = {one.name: one for one in fields(cls)}
        faults = []
        for name in content.keys() - known.keys():
            close = difflib.get_close_matches(str(name), known, n=1)
            faults.append(f"unknown key {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        for name, one in known.items():
            if name not in content and one.default is MISSING and one.default_factory is MISSING:
                faults.append(f"key {name!r} is missing ({one.metadata['help']})")
        types = typing.get_type_hints(cls)
        values = {}
        for name in content.keys() & known.keys():
            try:
                values[name] = _as_type(content[name], types[name])
            except TypeError as error:
                faults.append(f"key {name!r} is {content[name]!r}, expected {error}")
        if faults:
            raise ConfigError(f"{where}: " + "; ".join(sorted(faults)) + ".")
        config = cls(**values)
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Refuse values that no run can have."""
        for name in ("length", "rows_per_step", "rows_per_device", "pool", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{where}: key {name!r} is {getattr(self, name)}, expected at least 1.")
        for name in ("decay_share", "minimum_rate_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{where}: key {name!r} is {getattr(self, name)}, expected a share from 0 to 1.")


@dataclass
class PretrainConfig(RunConfig):
    """Continue pretraining, or begin it, on plain text."""

    column: str = key("the column of the data that holds the text", "text")
    too_long: Literal["error", "split", "truncate", "drop"] = key("what to do with longer documents", "split")
    on_bad: Literal["error", "drop"] = key("what to do with documents that have nothing to predict", "drop")
    stream: bool = key("read and tokenize while training, in the order of the data; needs `steps`", False)

    def check(self, where: str) -> None:
        super().check(where)
        if self.stream and self.steps is None:
            raise ConfigError(f"{where}: with `stream` the number of rows is not known: give `steps`.")


@dataclass
class SftConfig(RunConfig):
    """Supervised fine-tuning on conversations, with a loss on the assistant's tokens."""

    column: str = key("the column of the data that holds the messages", "messages")
    tools_column: str = key("the column that holds the tools, where there is one", "tools")
    reasoning: Literal["keep", "history", "strip"] = key(
        "reasoning traces: all kept, those before the last user turn dropped, or all dropped", "keep"
    )
    loss_over: Literal["tokens", "conversations"] = key(
        "mean over tokens (first stage), or over conversations of each one's mean (second stage)", "tokens"
    )


@dataclass
class LoraRunConfig(SftConfig):
    """Supervised fine-tuning of adapters on every linear map and the routed experts."""

    rank: int = key("of the adapters", 16)
    alpha: float = key("adapters are scaled by alpha / rank", 32.0)
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "parts of names that get no adapter, such as `lm_head` or `mtp`"},
        kw_only=True,
    )
    merge: bool = key("also save the model with the adapters merged into its weights", True)
    router_bias_rate: float = key("must be 0: an adapter does not store the routers' correction bias", 0.0)

    def check(self, where: str) -> None:
        super().check(where)
        if self.router_bias_rate:
            raise ConfigError(f"{where}: `router_bias_rate` must be 0: an adapter does not store the correction bias.")


def _as_type(value: Any, wanted: Any) -> Any:
    """`value` as the annotated type, or a `TypeError` that says which that is."""
    options = typing.get_args(wanted)
    if typing.get_origin(wanted) is Literal:
        if value in options and isinstance(value, str):
            return value
        raise TypeError("one of " + ", ".join(map(repr, options)))
    if type(None) in options:
        return None if value is None else _as_type(value, next(o for o in options if o is not type(None)))
    plain = typing.get_origin(wanted) or wanted
    if plain is float and isinstance(value, str):
        # YAML reads 1e-5, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            raise TypeError("a number") from None
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        names = {
            int: "a whole number",
            float: "a number",
            str: "text",
            bool: "true or false",
            list: "a list",
            dict: "keys",
        }
        raise TypeError(names[plain])
    return value


def describe(config: type[RunConfig]) -> str:
    """Every key of a kind of run with its default and meaning, one a line."""
    lines = []
    for one in fields(config):
        if one.default_factory is not MISSING:
            default = repr(one.default_factory())
        else:
            default = "required" if one.default is MISSING else repr(one.default)
        choices = typing.get_args(typing.get_type_hints(config)[one.name])
        listed = f"; one of {', '.join(choices)}" if choices and all(isinstance(c, str) for c in choices) else ""
        lines.append(f"  {one.name} ({default}): {one.metadata['help']}{listed}")
    return "\n".join(lines)
