"""A training run as pictures: losses, MTP accuracy and expert load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def draw_curves(log: Mapping, evaluation: Mapping, folder: Path | str) -> None:
    """Write `loss.png`, `mtp_accuracy.png` and `expert_load.png` to `folder`.

    Args:
        log: `train`, the Trainer's log history, and `heldout`, one row per evaluation with `step`, `bits_per_byte`,
            `accuracy`, `mtp_accuracy` and `maximum_violation`.
        evaluation: the final evaluation, with `expert_share` per router.
    """
    folder = Path(folder)
    training = [row for row in log["train"] if "loss" in row]
    heldout = log["heldout"]
    steps = [row["step"] for row in heldout]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([row["step"] for row in training], [row["loss"] for row in training], lw=0.8)
    left.set(title="training loss (next token + MTP)", xlabel="step", ylabel="nats per token")
    right.plot(steps, [row["bits_per_byte"] for row in heldout], marker=".")
    right.set(title="held-out loss", xlabel="step", ylabel="bits per byte")
    _save(figure, folder / "loss.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(steps, [row["accuracy"] for row in heldout], marker=".", label="next token")
    for depth in range(len(heldout[0]["mtp_accuracy"])):
        left.plot(steps, [row["mtp_accuracy"][depth] for row in heldout], marker=".", label=f"MTP depth {depth + 1}")
    left.set(title="held-out accuracy", xlabel="step", ylabel="share of tokens")
    left.legend()
    right.plot(steps, [row["maximum_violation"] for row in heldout], marker=".")
    right.set(title="busiest expert, all routers", xlabel="step", ylabel="load over average, minus 1", ylim=(0, None))
    _save(figure, folder / "mtp_accuracy.png")

    _draw_expert_load(evaluation["expert_share"], folder / "expert_load.png")


def draw_run(log: Sequence[Mapping], expert_share: Mapping[str, Sequence[float]] | None, folder: Path | str) -> None:
    """Write `loss.png` and, given loads, `expert_load.png` to `folder`.

    Args:
        log: the trainer's log history, of a `NemotronTrainer`.
        expert_share: per router, the share of tokens of each expert, largest first.
    """
    folder = Path(folder)
    training = [row for row in log if "loss" in row]
    steps = [row["step"] for row in training]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, label in (("loss", "both"), ("lm_loss", "next token"), ("mtp_loss", "MTP")):
        if training and name in training[0]:
            left.plot(steps, [row[name] for row in training], lw=0.8, label=label)
    left.set(title="training loss", xlabel="step", ylabel="nats per token")
    left.legend()
    ending = "/maximum_violation"
    for name in (name for name in (training[0] if training else ()) if name.endswith(ending)):
        label = name.removeprefix("balance/").removesuffix(ending)
        right.plot(steps, [row[name] for row in training], lw=0.8, label=label)
    right.set(
        title="busiest expert of each router", xlabel="step", ylabel="load over average, minus 1", ylim=(0, None)
    )
    if right.lines and len(right.lines) <= 10:
        right.legend(fontsize="small")
    _save(figure, folder / "loss.png")
    if expert_share:
        _draw_expert_load(expert_share, folder / "expert_load.png")


def _draw_expert_load(expert_share: Mapping[str, Sequence[float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    for name, share in expert_share.items():
        axes.plot([len(share) * part for part in share], marker=".", lw=0.8, label=name.removesuffix(".mixer.gate"))
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(title="load of each expert, busiest first", xlabel="expert", ylabel="load over average")
    axes.set_ylim(0, None)
    axes.legend(fontsize="small")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=100)
    plt.close(figure)
