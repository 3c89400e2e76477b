"""What quantisation costs `nemotron-h-tiny` on held-out text: perplexity in BF16, FP8, the release's mix and all NVFP4.

    python tests/benchmarks/quantized_perplexity.py DATA --windows 32 --save

DATA is the folder that `python -m nemotron_super.training.recipes.nemotron_h_tiny --prepare-only` fills. Computed in float32 on
stored weights of each format. "Simulated" rounds activations as well, with input scales from `--calibration` windows of the
training text, or, uncalibrated, with scales of 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from pathlib import Path

import nemotron_super
import numpy as np
import torch
import transformers
from nemotron_super import NemotronHForCausalLM, NVFP4Config, calibrate, quantize_model, simulate_activations
from nemotron_super.training.evaluation import evaluate_windows
from nemotron_super.training.packing import PackedWindows
from torch.utils.data import Subset

TINY = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"
RESULTS = Path(__file__).parent / "results" / "quantized_perplexity.json"
LENGTH = 1024


def spread(stream: np.ndarray, count: int) -> Subset:
    """`count` windows, evenly spread over a token stream."""
    windows = PackedWindows(stream, LENGTH)
    return Subset(windows, np.linspace(0, len(windows) - 1, count).round().astype(int).tolist())


def main() -> None:
    """Measure, print a table, and with `--save` write it to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    heldout = spread(np.load(options.data / "heldout.npy", mmap_mode="r"), options.windows)
    sample = spread(np.load(options.data / "train.npy", mmap_mode="r"), options.calibration)
    rows: list[dict] = []

    def measure(model: NemotronHForCausalLM, weights: str, activations: str) -> None:
        result = evaluate_windows(model, heldout, batch_size=4)
        row = {"weights": weights, "activations": activations, "perplexity": math.exp(result.loss)}
        row |= {"loss": result.loss, "accuracy": result.accuracy, "mtp_accuracy": result.mtp_accuracy}
        row["tokens"] = result.tokens
        rows.append(row)
        print(json.dumps(row), flush=True)

    def load() -> NemotronHForCausalLM:
        return NemotronHForCausalLM.from_pretrained(TINY, dtype=torch.float32).to(options.device)

    measure(load(), "BF16", "full")
    for recipe in ("fp8", "release", "nvfp4"):
        model = quantize_model(load(), NVFP4Config(recipe=recipe))
        measure(model, recipe, "full")
        simulate_activations(model)
        measure(model, recipe, "simulated, uncalibrated")
        simulate_activations(model, False)
        calibrate(model, (window["input_ids"][None] for window in sample))
        simulate_activations(model)
        measure(model, recipe, "simulated, calibrated")

    print(f"| {'weights':8} | {'activations':24} | perplexity | accuracy |")
    for row in rows:
        print(f"| {row['weights']:8} | {row['activations']:24} | {row['perplexity']:10.3f} | {row['accuracy']:8.4f} |")
    if options.save:
        run = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name()
            if options.device.startswith("cuda")
            else f"CPU ({platform.machine()})",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "windows": options.windows,
            "calibration_windows": options.calibration,
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
