"""Whether the bundled kernels train as the torch reference does: `nemotron-h-tiny` from scratch, three runs at once on one device.

    python -m nemotron_super.training.recipes.nemotron_h_tiny --output out --prepare-only
    python tests/benchmarks/same_loss.py --data out/data [--steps 2000] [--save]

Two runs have the same weights and batches to begin with, one with the kernels, every op forced to them, and one with the reference.
A third, with the kernels again, begins with others: how far it ends from the first is the spread that the difference between kernels
and reference has to stay within. Objective, precision and routers' balance are the recipe's; documents are packed, MTP trains along.
Without a GPU there are no kernels, and the first two runs are the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from against_transformers import hardware, results_file
from nemotron_super import NemotronHForCausalLM, preset
from nemotron_super.training.evaluation import evaluate_windows
from nemotron_super.training.load_balancing import RouterLoads, update_correction_bias
from nemotron_super.training.packing import PackedWindows, ShiftingEpochs
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed

PEAK_LEARNING_RATE = 1e-3
# Name, what serves on a GPU, seed of weights and of the order of batches.
RUNS = (("kernels", "triton", 0), ("reference", "torch", 0), ("kernels, other seed", "triton", 1))


def train(sizes: argparse.Namespace, seed: int, name: str, place: int) -> dict:
    """Train; the held-out loss, in nats per token, after every one of `sizes.evaluations` equal parts of the steps."""
    rows, length, steps, evaluations = sizes.rows, sizes.length, sizes.steps, sizes.evaluations
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(2)
    torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(seed)
    model = NemotronHForCausalLM(preset("tiny")).to(device).train()
    stream, heldout = (np.load(sizes.data / f"{part}.npy", mmap_mode="r") for part in ("train", "heldout"))
    epochs = math.ceil(steps * rows / ((len(stream) - length) // length))
    batches = DataLoader(ShiftingEpochs(stream, length, epochs, seed=seed), rows)
    held_out = PackedWindows(heldout, length)
    held_out = Subset(held_out, range(min(sizes.windows, len(held_out))))

    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    decay = max(1, steps // 5)
    schedule = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=min(200, decay),
        num_training_steps=steps,
        scheduler_specific_kwargs={"num_decay_steps": decay, "decay_type": "1-sqrt"},
    )
    loads = RouterLoads(model, coefficient=1e-4, training_only=True)
    losses, begin = {}, time.perf_counter()
    progress = tqdm(zip(range(1, steps + 1), batches, strict=False), desc=name, total=steps, position=place)
    for step, batch in progress:
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        update_correction_bias(loads)
        loads.reset()
        if step * evaluations // steps > (step - 1) * evaluations // steps:
            loads.take_balance_loss()  # otherwise all of them would be kept
            with torch.autocast(device, torch.bfloat16):
                losses[step] = evaluate_windows(model, held_out, batch_size=32, progress=False).loss
            progress.set_postfix(held_out=f"{losses[step]:.4f}")
    return {"held-out loss": losses, "seconds": round(time.perf_counter() - begin)}


def compared(runs: dict[str, dict]) -> dict[str, list[float]]:
    """Differences from the run with kernels, at each evaluation: the reference's, and the other seed's."""
    first, reference, other = (list(run["held-out loss"].values()) for run in runs.values())
    return {
        "reference - kernels": [b - a for a, b in zip(first, reference, strict=True)],
        "other seed - kernels": [b - a for a, b in zip(first, other, strict=True)],
    }


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with train.npy and heldout.npy, as the tiny recipe prepares it",
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--windows", type=int, default=256, help="of held-out text, each as long as a row")
    parser.add_argument("--save", action="store_true", help="write the run to results/")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one is not None:
        name, _, seed = RUNS[options.one]
        found = train(options, seed, name, options.one)
        print("RESULT", json.dumps(found))
        return found

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = {}
    for number, (name, source, _) in enumerate(RUNS):
        environment = os.environ | {"NEMOTRON_SUPER_KERNELS": source if device == "cuda" else "auto"}
        sizes = ("data", "steps", "evaluations", "rows", "length", "windows")
        flags = [str(part) for key in sizes for part in (f"--{key}", vars(options)[key])]
        command = [sys.executable, __file__, *flags, "--one", str(number)]
        processes[name] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    printed = {name: process.communicate()[0] for name, process in processes.items()}
    failed = [name for name, process in processes.items() if process.returncode]
    if failed:
        raise SystemExit(f"{' and '.join(failed)} failed; what is printed above says why.")
    runs = {name: json.loads(text.rpartition("RESULT ")[2]) for name, text in printed.items()}
    apart = compared(runs)
    print("\n| step | " + " | ".join([*runs, *apart]) + " |\n|" + "---|" * (1 + len(runs) + len(apart)))
    for place, step in enumerate(runs["kernels"]["held-out loss"]):
        values = [f"{run['held-out loss'][step]:.4f}" for run in runs.values()]
        print(f"| {step} | " + " | ".join(values + [f"{row[place]:+.4f}" for row in apart.values()]) + " |")
    record = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "command": "python tests/benchmarks/same_loss.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "tokens a step": options.rows * options.length,
        "runs": runs,
        "differences of the held-out loss": {name: [round(v, 5) for v in row] for name, row in apart.items()},
    }
    if options.save:
        results_file("same_loss", device).write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
