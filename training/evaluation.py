"""Held-out quality of a model on packed windows: loss in bits per byte, MTP accuracy by depth, expert balance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..modeling.token_layout import TokenLayout
from .load_balancing import RouterLoads, sorted_share


@dataclass
class HeldOut:
    """What `evaluate_windows` measures.

    Attributes:
        tokens: predicted tokens.
        loss: next-token cross entropy, nats per predicted token.
        accuracy: share of next tokens that are the most likely one.
        mtp_loss, mtp_accuracy: the same for each MTP depth; depth k predicts k + 1 tokens ahead (0 where
            no document is long enough for it).
        maximum_violation, dead_experts: per router; see `RouterLoads`.
        expert_share: per router, the share of tokens of each expert, largest first.
    """

    tokens: int
    loss: float
    accuracy: float
    mtp_loss: list[float] = field(default_factory=list)
    mtp_accuracy: list[float] = field(default_factory=list)
    maximum_violation: dict[str, float] = field(default_factory=dict)
    dead_experts: dict[str, int] = field(default_factory=dict)
    expert_share: dict[str, list[float]] = field(default_factory=dict)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Next-token loss as bits per byte of text, given the text's bytes per token."""
        return self.loss / math.log(2) / bytes_per_token


@torch.no_grad()  # what inference mode leaves behind in a sharded model cannot be trained on
def evaluate_windows(
    model: nn.Module,
    windows: Dataset | Sequence[dict],
    batch_size: int = 8,
    progress: bool = True,
    collate_fn: Callable | None = None,
) -> HeldOut:
    """Run `model` over every window and average over predicted tokens.

    Args:
        model: a `NemotronHForCausalLM`; evaluated in its own dtype, on its own device.
        windows: held-out windows or packed rows, with `seq_idx`; targets never cross a document or a window.
        batch_size: windows per forward.
        collate_fn: makes a batch of rows of different lengths, padded on the right.
    """
    was_training = model.training
    model.eval()
    loads = RouterLoads(model)
    depths = model.config.mtp_num_depths if model.mtp is not None else 0
    nats, right, count = [0.0] * (depths + 1), [0] * (depths + 1), [0] * (depths + 1)
    loader: DataLoader = DataLoader(windows, batch_size=batch_size, collate_fn=collate_fn)
    for batch in tqdm(loader, desc="held-out", disable=not progress):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        layout = TokenLayout(attention_mask=None, padding=None, seq_idx=batch["seq_idx"], documents=None)
        out = model(**batch, use_cache=False, output_mtp_logits=depths > 0)
        for step, logits in enumerate((out.logits, *(out.mtp_logits or ()))):
            targets = layout.ahead(labels, step + 1, fill=-100).reshape(-1)
            logits = logits.reshape(targets.shape[0], -1).float()
            nats[step] += float(nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            right[step] += int((logits.argmax(-1) == targets).sum())
            count[step] += int((targets != -100).sum())
    loads.close()
    model.train(was_training)
    shares = {name: sorted_share(count) for name, count in loads.counts.items()}
    return HeldOut(
        tokens=count[0],
        loss=nats[0] / count[0],
        accuracy=right[0] / count[0],
        mtp_loss=[n / max(1, c) for n, c in zip(nats[1:], count[1:], strict=True)],
        mtp_accuracy=[r / max(1, c) for r, c in zip(right[1:], count[1:], strict=True)],
        maximum_violation=loads.maximum_violation(),
        dead_experts=loads.dead_experts(),
        expert_share=shares,
    )
