"""One training run from its configuration: data, model, trainer, evaluation before and after, pictures, report.

The same function serves a laptop and, started by `accelerate launch` or `torchrun`, several devices. A run that finds a
checkpoint of its own in the output folder goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from ..configuration.presets import preset
from ..modeling.modeling_nemotron_h import NemotronHForCausalLM
from .best_fit import BestFitRows, PadRows
from .chat import chat_documents
from .curves import draw_run
from .documents import DocumentStream, text_documents
from .evaluation import HeldOut, evaluate_windows
from .fsdp import load_on_first_rank
from .lora import add_lora, allow_out_proj, export_merged
from .run_config import ConfigError, LoraRunConfig, PretrainConfig, RunConfig, SftConfig
from .trainer import (
    NemotronTrainer,
    TrainingStoppedError,
    keep_small_parameters_in_float32,
    last_complete_checkpoint,
)

# Of the release's pretraining (Megatron's `init_method_std`); output projections are scaled down by sqrt(layers).
PRETRAINING_INITIALIZER_RANGE = 0.014
# What a resumed run may have otherwise than the run it continues.
_MAY_CHANGE = ("output", "heldout", "log_every", "save_every", "keep_checkpoints", "peak_tflops")


def run(config: RunConfig) -> dict[str, Any]:
    """Train as `config` says; return the summary that the report is written from.

    Writes to `config.output`: the model in the published layout with its tokenizer (adapters under `adapter/`, and the merged
    model where asked for), `run.json`, `log.json`, `loss.png`, `expert_load.png` and `REPORT.md`.

    Raises:
        ConfigError: settings that do not fit each other, the devices, or the run that is to be continued.
        DataError: data that cannot be trained on.
        TrainingStoppedError: what ends a run early.
    """
    output = Path(config.output)
    arguments = _arguments(config)
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is not None:
        _check_same_run(config, arguments.world_size, output)
    if config.model.startswith("preset:") and config.tokenizer is None:
        raise ConfigError(f"`model` is {config.model}, which has no tokenizer: give `tokenizer`.")
    set_seed(config.seed)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(config.tokenizer or config.model)
    streams = isinstance(config, PretrainConfig) and config.stream
    documents = _documents(config, config.data, tokenizer)
    rows = BestFitRows(documents, config.length, config.too_long, config.on_bad, config.pool, repeat=streams)
    data: Any = rows if streams else list(rows)
    heldout = None
    if config.heldout is not None:
        heldout = list(BestFitRows(_documents(config, config.heldout, tokenizer), config.length, "truncate", "drop"))
    steps = config.steps or math.ceil(len(data) * config.epochs / config.rows_per_step)
    arguments.max_steps = steps
    arguments.lr_scheduler_kwargs = {
        "num_decay_steps": int(config.decay_share * steps),
        "decay_type": "1-sqrt",
        "min_lr_ratio": config.minimum_rate_share,
    }
    model = _model(config, arguments)
    collator = PadRows(tokenizer.pad_token_id or 0, config.length if streams else None)
    trainer = NemotronTrainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
        loss_over=config.loss_over if isinstance(config, SftConfig) else "tokens",
        router_bias_rate=config.router_bias_rate,
        balance_coefficient=config.balance_coefficient,
        peak_tflops=config.peak_tflops,
    )
    first = trainer.is_world_process_zero()
    if first:
        output.mkdir(parents=True, exist_ok=True)
        _write(output / "run.json", {"world_size": arguments.world_size, "config": asdict(config)})

    def evaluate() -> HeldOut | None:
        if heldout is None:
            return None
        return evaluate_windows(trainer.model, heldout, config.rows_per_device, progress=first, collate_fn=collator)

    before = None
    # Until `train` shards it, a model may not fit a device.
    if not (config.trainer.get("fsdp") or config.trainer.get("deepspeed")):
        if not config.distributed:
            trainer.model.to(arguments.device)
        before = evaluate()
    with allow_out_proj():
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    after = evaluate()
    summary = {
        "kind": type(config).__name__,
        "steps": steps,
        "rows": None if streams else len(data),
        "used": rows.used,
        "left_out": dict(rows.dropped),
        "parameters": sum(map(_size, trainer.model.parameters())),
        "trained": sum(_size(p) for p in trainer.model.parameters() if p.requires_grad),
        "seconds": result.metrics["train_runtime"],
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "before": None if before is None else asdict(before),
        "after": None if after is None else asdict(after),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "devices": arguments.world_size,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, accelerate)},
    }
    try:
        _save(config, trainer, tokenizer, output)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        good = last_complete_checkpoint(output)
        raise TrainingStoppedError(
            f"The trained model could not be written to {output} ({error}). "
            + (f"{good} holds it: make room and start again." if good else "There is no checkpoint: set `save_every`.")
        ) from error
    if first:
        log = trainer.state.log_history
        _write(output / "log.json", log)
        # Of the held-out data, or without them of the last steps.
        draw_run(log, after.expert_share if after else trainer.balance.expert_share, output)
        (output / "REPORT.md").write_text(report(config, summary, log), encoding="utf-8")
    return summary


def _documents(config: RunConfig, source: str, tokenizer: PreTrainedTokenizerFast) -> DocumentStream:
    if isinstance(config, SftConfig):
        return chat_documents(source, tokenizer, config.reasoning, config.column, config.tools_column)
    assert isinstance(config, PretrainConfig)
    return text_documents(source, tokenizer, config.column)


def _arguments(config: RunConfig) -> TrainingArguments:
    known = TrainingArguments.__dataclass_fields__
    unknown = sorted(config.trainer.keys() - known.keys())
    if unknown:
        raise ConfigError(f"`trainer` has keys that TrainingArguments does not know: {', '.join(unknown)}.")
    ours: dict[str, Any] = {
        "output_dir": config.output,
        "max_steps": 1,  # set once the rows are counted
        "per_device_train_batch_size": config.rows_per_device,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "adam_beta2": config.beta2,
        "max_grad_norm": config.clip,
        "activation_checkpointing": config.activation_checkpointing,
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,  # the trainer stops instead
        "save_strategy": "no" if config.save_every is None else "steps",
        "save_steps": config.save_every or 500,
        "save_total_limit": config.keep_checkpoints,
        "seed": config.seed,
        "report_to": [],
        "remove_unused_columns": False,
        # As many as there will be: DeepSpeed reads the arguments while they are made.
        "gradient_accumulation_steps": max(1, config.rows_per_step // (config.rows_per_device * _processes(config))),
    }
    twice = sorted(ours.keys() & config.trainer.keys() - {"report_to"})
    if twice:
        raise ConfigError(f"`trainer` sets what keys of their own say: {', '.join(twice)}.")
    sharded = [name for name in ("fsdp", "deepspeed") if config.trainer.get(name)]
    sharded += ["distributed"] if config.distributed else []
    if len(sharded) > 1:
        raise ConfigError(f"Several keys shard the model: {', '.join(sharded)}. Keep one.")
    named = sharded[0].replace("fsdp", "FSDP") if sharded else ""
    if sharded and config.dtype != "float32":
        raise ConfigError(
            f"`dtype` is {config.dtype} with {named}, which shards parameters of one dtype only: "
            "use float32 (these are then the master weights) and `trainer: {bf16: true}` to compute in bfloat16."
        )
    if sharded and isinstance(config, LoraRunConfig) and config.merge:
        raise ConfigError(
            f"`merge` needs whole weights, and {named} shards them: set it to false and merge afterwards."
        )
    if config.distributed:
        _check_distributed(config)
    arguments = TrainingArguments(**{**ours, **config.trainer})
    at_once = config.rows_per_device * _processes(config)
    if config.rows_per_step % at_once:
        raise ConfigError(
            f"`rows_per_step` is {config.rows_per_step}: it must be a multiple of the {at_once} rows that "
            f"{_processes(config)} process(es) take at once (`rows_per_device` {config.rows_per_device})."
        )
    return arguments


def _processes(config: RunConfig) -> int:
    """How many processes see rows of their own; those of a tensor-parallel group share theirs."""
    return int(os.environ.get("WORLD_SIZE", "1")) // int(config.distributed.get("tp_size") or 1)


def _check_distributed(config: RunConfig) -> None:
    """Refuse what a model that transformers shards as it loads it cannot do."""
    known = {one.name for one in fields(DistributedConfig)}
    unknown = sorted(config.distributed.keys() - known)
    if unknown:
        raise ConfigError(f"`distributed` has keys that DistributedConfig does not know: {', '.join(unknown)}.")
    if config.save_every is not None:
        raise ConfigError(
            "`save_every` with `distributed`: transformers cannot resume a model that it sharded while loading. Leave it out; "
            "the trained model is saved at the end."
        )
    if isinstance(config, LoraRunConfig):
        raise ConfigError(
            "`distributed` shards experts before adapters could be put on them: use `trainer: {fsdp: true}`."
        )
    if config.model.startswith("preset:"):
        raise ConfigError(f"`model` is {config.model}: `distributed` shards a model as it is loaded; save it first.")


def _size(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; DeepSpeed's third stage leaves an empty one that knows its size."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _model(config: RunConfig, arguments: TrainingArguments) -> nn.Module:
    dtype = getattr(torch, config.dtype)
    if config.model.startswith("preset:"):
        fresh = preset(config.model.removeprefix("preset:"), initializer_range=PRETRAINING_INITIALIZER_RANGE)
        model = NemotronHForCausalLM(fresh).to(dtype)
    elif config.distributed:
        sharding = DistributedConfig(**config.distributed)
        model = NemotronHForCausalLM.from_pretrained(config.model, dtype=dtype, distributed_config=sharding)
    else:
        model = load_on_first_rank(config.model, arguments, dtype)
    for name, value in (("mtp_loss_scaling_factor", config.mtp_scale), ("mtp_num_depths", config.mtp_depths)):
        if value is not None:
            setattr(model.config, name, value)
    if isinstance(config, LoraRunConfig):
        return add_lora(model, config.rank, config.alpha, config.exclude)
    keep_small_parameters_in_float32(model)
    return model


def _save(config: RunConfig, trainer: NemotronTrainer, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora = isinstance(config, LoraRunConfig)
    folder = output / "adapter" if lora else output
    if not lora:
        if not config.distributed and not trainer.is_deepspeed_enabled:
            model.to(getattr(torch, config.dtype))  # float32 master weights as the published layout has them
        model.config.use_cache = True  # training may have turned it off
    trainer.save_model(str(folder))  # with the tokenizer; gathers what is sharded
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json says it all
        if isinstance(config, LoraRunConfig) and config.merge:
            export_merged(model, output)
            tokenizer.save_pretrained(output)


def _check_same_run(config: RunConfig, world_size: int, output: Path) -> None:
    """Refuse to continue a run with other settings: its data would come in another order, or its loss be another."""
    if not (output / "run.json").exists():
        raise ConfigError(
            f"{output} holds checkpoints but no run.json, so not a run of this command: use another output."
        )
    before = json.loads((output / "run.json").read_text(encoding="utf-8"))
    now = {"world_size": world_size, **asdict(config)}
    then = {"world_size": before["world_size"], **before["config"]}
    changed = sorted(name for name in now if now[name] != then.get(name) and name not in _MAY_CHANGE)
    if changed:
        listed = "; ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in changed)
        raise ConfigError(f"{output} holds a run with other settings: {listed}. Use them, or another output.")


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def report(config: RunConfig, summary: dict[str, Any], log: list[dict]) -> str:
    """The run as Markdown: what was trained on what, losses before and after, speed, and every setting."""
    trained = [entry for entry in log if "loss" in entry]
    first, last = trained[0], trained[-1]
    share = summary["trained"] / summary["parameters"]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    speed = sorted(entry["tokens_per_second"] for entry in trained)[len(trained) // 2]
    lines = [
        f"# {summary['kind'].removesuffix('Config').removesuffix('Run')} run: {config.model} on {config.data}",
        "",
        f"{summary['steps']} steps of {config.rows_per_step} rows of at most {config.length} tokens, on "
        f"{summary['devices']} x {summary['hardware']}, {summary['seconds']:.0f} s, {speed:,.0f} tokens/s (median). {versions}."
        + (f" Resumed from {summary['resumed_from']}." if summary["resumed_from"] else ""),
        "",
        f"Trained: {summary['trained']:,} of {summary['parameters']:,} parameters ({share:.2%}). Rows are filled to "
        f"{summary['used']:.1%}. Left out: {summary['left_out'] or 'nothing'}.",
        "",
        "| training | first log | last log |",
        "|---|---|---|",
    ]
    for name in ("loss", "lm_loss", "mtp_loss", "balance_loss", "maximum_violation", "mfu"):
        if name in last:
            lines.append(f"| {name} | {first[name]:.5g} | {last[name]:.5g} |")
    held_out = {when: summary[when] for when in ("before", "after") if summary[when]}
    if held_out:
        lines += ["", f"| held out | {' | '.join(held_out)} |", "|---" * (1 + len(held_out)) + "|"]
        for name in ("loss", "accuracy", "mtp_loss", "mtp_accuracy"):
            cells = (" / ".join(f"{v:.4f}" for v in _list(found[name])) for found in held_out.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "![loss](loss.png)"]
    if "maximum_violation" in last:
        lines += ["", "![expert load](expert_load.png)"]
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {value!r} |" for name, value in asdict(config).items()]
    return "\n".join(lines) + "\n"


def _list(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]
