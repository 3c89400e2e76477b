"""transformers' `Trainer` with what this model's training needs beside it.

- The mean is over tokens, or over conversations of each one's mean, whatever the accumulation, packing and number of ranks.
- Routers are balanced: correction bias after every step, the sequence-level loss, statistics per layer in the logs.
- The parts of the loss, tokens per second and model FLOP/s utilisation are in the logs.
- A loss that is not finite stops the run and leaves the batch behind; checkpoints are whole or not there.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .flops import attended_pairs, multiplications
from .fsdp import prepare_fsdp
from .load_balancing import RouterBiasCallback

# Small, and moved by steps that vanish in bfloat16; their layers compute with them in float32 in any case.
FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias", "gate.weight")
_STATE = "trainer_state.json"


class TrainingStoppedError(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


def keep_small_parameters_in_float32(model: nn.Module) -> list[str]:
    """Make `FLOAT32_PARAMETERS` of a bfloat16 model their own float32 master weights; return their names.

    Do it before the optimizer is made. `model.to(torch.bfloat16)` undoes it before the model is published.
    """
    names = []
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(f".{small}" for small in FLOAT32_PARAMETERS)):
            parameter.data = parameter.data.float()
            names.append(name)
    return names


def conversation_weights(labels: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """What each label counts in a sum of conversations' means: 1 over the number of targets in its conversation.

    Args:
        labels: (batch, seq) int64, -100 where there is nothing to predict. The first of a row is never a target, nor should
            the first of a document be.
        seq_idx: (batch, seq) ids of the conversations packed into a row, rising; None if each row is one.

    Returns:
        (batch, seq) float32. The weights of a conversation's targets add up to 1.
    """
    target = labels != -100
    target[:, 0] = False
    ids = torch.zeros_like(labels) if seq_idx is None else (seq_idx - seq_idx[:, :1]).long()
    counts = torch.zeros(labels.shape[0], int(ids.max()) + 1, device=labels.device)
    counts.scatter_add_(1, ids, target.float())
    return target / counts.gather(1, ids).clamp(min=1)


def last_complete_checkpoint(folder: Path | str) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end, or None.

    The trainer's state is written last: a run that was killed, or whose disk was full, leaves a checkpoint without it.
    """
    for step in sorted(_steps(folder), reverse=True):
        path = Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            if json.loads((path / _STATE).read_text(encoding="utf-8"))["global_step"] == step:
                return path
        except (OSError, ValueError, KeyError):
            continue
    return None


def _steps(folder: Path | str) -> list[int]:
    names = (path.name.rpartition("-") for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return [int(step) for _, _, step in names if step.isdigit()]


class NemotronTrainer(Trainer):
    """A `Trainer` for `NemotronHForCausalLM`, alone or under PEFT.

    Args:
        loss_over: "tokens" takes the mean over all targets of a step (the first stage of supervised fine-tuning, and
            pretraining); "conversations" the mean over conversations of each one's mean (the second stage).
        router_bias_rate: step of the routers' correction bias; 0 leaves it alone. An adapter does not store the bias, so
            under PEFT it must be 0.
        balance_coefficient: of the sequence-level load-balancing loss; its gradient is added, its value logged apart.
        peak_tflops: of one device in the dtype of training; with it, `mfu` is logged.
        Others: as `Trainer`'s.

    Raises:
        ValueError: arguments that cannot work together.
        TrainingStoppedError: while training, a loss that is not finite or a step without any target.
    """

    def __init__(
        self,
        *args,
        loss_over: Literal["tokens", "conversations"] = "tokens",
        router_bias_rate: float = 1e-3,
        balance_coefficient: float = 1e-4,
        peak_tflops: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if loss_over not in ("tokens", "conversations"):
            raise ValueError(f"`loss_over` is {loss_over!r}: choose 'tokens' or 'conversations'.")
        if router_bias_rate and hasattr(self.model, "peft_config"):
            raise ValueError(
                "`router_bias_rate` must be 0 under PEFT: the bias belongs to the base model, and an adapter does not "
                "store it."
            )
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(
                "Context parallelism is not supported: Mamba-2 states and MTP targets would have to cross from one rank's "
                "part of the sequence to the next. Use data, expert or FSDP sharding, and gradient checkpointing."
            )
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "`fsdp` is not supported on the CPU: accelerate would leave every process with the whole model, unsaid."
            )
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, self.model)
        self.loss_over, self.peak_tflops = loss_over, peak_tflops
        self.balance = RouterBiasCallback(router_bias_rate, balance_coefficient)
        self.add_callback(self.balance)
        self._work = multiplications(self.model.config)
        self._micro_batch = 0
        self._start_interval()

    def _start_interval(self) -> None:
        """Begin what is averaged until the next log: sums of the loss' parts, tokens, attended pairs."""
        self._parts = torch.zeros(2)
        self._counts = torch.zeros(2, dtype=torch.float64)
        self._since, self._steps = time.perf_counter(), 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay on matrices only: not on norms, biases, or the state-space parameters of each head."""
        # DeepSpeed's third stage leaves empty parameters that know their shapes.
        return [n for n, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) >= 2]

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As `Trainer`'s, with the conversations of all accumulated batches and ranks counted where they are the items."""
        if self._steps == 0:
            self._since = time.perf_counter()  # what came before, such as an evaluation or a save, is not training
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.loss_over == "conversations" and batches:
            if "position_ids" in batches[0] or "cu_seq_lens_q" in batches[0]:
                raise ValueError("`loss_over='conversations'` needs packed rows to have `seq_idx`.")
            items = torch.zeros((), device=device)
            for batch in batches:
                batch["loss_weights"] = conversation_weights(batch["labels"], batch.get("seq_idx"))
                items = items + batch["loss_weights"].sum().to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                items = self.accelerator.gather(items).sum() / self.get_tp_size()
        if items is not None and batches and not float(items):
            raise TrainingStoppedError(
                f"Step {self.state.global_step + 1}: no label of the whole batch is to be predicted (all are -100)."
            )
        self._steps, self._micro_batch = self._steps + 1, 0
        for batch in batches:
            tokens, mask = batch["input_ids"], batch.get("attention_mask")
            pairs = attended_pairs(batch.get("seq_idx"), *tokens.shape) if self.peak_tflops else 0
            count = tokens.numel() if mask is None else int(mask.sum())
            self._counts += torch.tensor([count, pairs], dtype=torch.float64)
        return batches, items

    def _run_epoch(self, *args, **kwargs) -> None:
        """As `Trainer`'s, which would take one more step after resuming from the checkpoint of the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """As `Trainer`'s; keeps the parts of the loss for the logs, and refuses to go on from one that is not finite."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.model.training:
            self._micro_batch += 1
            if not loss.isfinite():
                self._stop(float(loss), inputs)
            share = 1.0 if num_items_in_batch is not None else 1 / self.current_gradient_accumulation_steps
            if outputs.mtp_loss is not None:
                self._parts = self._parts.to(loss.device) + share * torch.stack(
                    [outputs.lm_loss.detach().float(), outputs.mtp_loss.detach().float()]
                )
        return (loss, outputs) if return_outputs else loss

    def _stop(self, loss: float, inputs: dict) -> None:
        step = self.state.global_step + 1
        file = Path(self.args.output_dir) / f"bad_batch_step_{step}_rank_{self.args.process_index}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in inputs.items() if isinstance(v, Tensor)}, file)
        good = last_complete_checkpoint(self.args.output_dir)
        raise TrainingStoppedError(
            f"Step {step}, micro-batch {self._micro_batch} of rank {self.args.process_index}: the loss is {loss}. No weight "
            f"was changed by it; the batch is in {file}; "
            + (f"the last good checkpoint is {good}." if good else "there is no checkpoint yet.")
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with the loss' parts, speed and router statistics since the last log. Called on every rank."""
        if "loss" in logs:
            steps, world = max(1, self._steps), self.args.world_size
            balance = torch.tensor([self.balance.loads.take_balance_loss() / world])
            sums = torch.cat([part.float().to(self.args.device) for part in (self._parts, self._counts, balance)])
            sums = self.accelerator.reduce(sums, "sum").cpu()
            # Sums over ranks where every rank divided by all ranks' items; otherwise each rank has its own mean.
            shared = self.args.average_tokens_across_devices and self.model_accepts_loss_kwargs
            if self.model.config.num_nextn_predict_layers:  # without MTP there is one part, the loss
                logs["lm_loss"], logs["mtp_loss"] = (
                    float(part) / steps / (1 if shared else world) for part in sums[:2]
                )
            seconds = time.perf_counter() - self._since
            tokens, pairs = (float(count) / self.get_tp_size() for count in sums[2:4])
            logs["tokens_per_second"] = tokens / seconds
            if self.peak_tflops:
                # Two operations a multiplication; the backward costs twice the forward.
                operations = 6 * (self._work[0] * tokens + self._work[1] * pairs)
                logs["mfu"] = operations / seconds / (world * self.peak_tflops * 1e12)
            if self.balance.coefficient:
                logs["balance_loss"] = float(sums[4])
            logs |= self.balance.take_logs()
            self._start_interval()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s: the whole model in the published layout, also where checkpoints on the way keep shards only."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or _internal_call or plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
            super().save_model(output_dir, _internal_call)
            return
        whole = self.accelerator.get_state_dict(self.model)  # on the first rank; the others get nothing
        if self.args.should_save:
            self._save(output_dir, state_dict=whole)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # safetensors has an error of its own for a full disk
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            good = last_complete_checkpoint(self.args.output_dir)
            raise TrainingStoppedError(
                f"Step {self.state.global_step}: the checkpoint could not be written ({error}). "
                + (f"{good} is untouched: resume from it." if good else "There is no earlier one.")
            ) from error
