"""Trains `model_card/nemotron-h-tiny` from scratch: `python -m nemotron_super.training.recipes.nemotron_h_tiny`.

One command from source text to checkpoint: gather and verify the corpus (`training/corpus.py`), train the tokenizer on
it, encode it, train with `NemotronTrainer` and the release's objective (next token, MTP at two depths, router bias by
the sign rule, sequence-level balance loss), evaluate on held-out documents, save. On a GPU it takes minutes; on a CPU,
days: use `--steps` to try it.

Writes to `--output`: the checkpoint in the published layout with its tokenizer, `training_log.json` (the curves),
`evaluation.json` and the curves as pictures. `--data` keeps what was encoded: prepare it where the Debian packages are,
train where the GPU is.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from ...configuration.presets import preset
from ...modeling.modeling_nemotron_h import NemotronHForCausalLM
from ..corpus import load_corpus
from ..curves import draw_curves
from ..evaluation import evaluate_windows
from ..packing import PackedWindows, ShiftingEpochs
from ..tokenizer import save_tokenizer, train_tokenizer, write_encoded_corpus
from ..trainer import NemotronTrainer

CHAT_TEMPLATE = Path(__file__).parents[2] / "model_card" / "chat_template.jinja"

LENGTH = 1024
WINDOWS_PER_STEP = 64
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 200


class HeldOutCurve(TrainerCallback):
    """Evaluates every `every` steps on the first windows of the held-out text and keeps the curve."""

    def __init__(self, windows: PackedWindows, bytes_per_token: float, every: int):
        self.windows, self.bytes_per_token, self.every = windows, bytes_per_token, every
        self.curve: list[dict] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                result = evaluate_windows(model, self.windows, batch_size=32, progress=False)
            row = {
                "step": state.global_step,
                "bits_per_byte": result.bits_per_byte(self.bytes_per_token),
                "mtp_accuracy": result.mtp_accuracy,
                "accuracy": result.accuracy,
                "maximum_violation": max(result.maximum_violation.values()),
            }
            self.curve.append(row)
            print(json.dumps(row), flush=True)


def prepare(data: Path) -> None:
    """Gather and verify the corpus, train the tokenizer and encode the corpus with it, all into `data`."""
    corpus = load_corpus()
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    tokenizer = train_tokenizer((document.text for document in corpus.train), chat_template=template)
    save_tokenizer(tokenizer, data)
    write_encoded_corpus(tokenizer, corpus, data)


def train(data: Path, output: Path, steps: int, windows_per_step: int, seed: int) -> None:
    """Train on `data/train.npy`, evaluate on `data/heldout.npy` (uint16 token streams), write to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    set_seed(seed)
    stream, heldout = (np.load(data / name, mmap_mode="r") for name in ("train.npy", "heldout.npy"))
    counts = json.loads((data / "counts.json").read_text(encoding="utf-8"))["heldout"]
    # Every token is predicted but the one that begins a document.
    bytes_per_token = counts["bytes"] / (counts["tokens"] - counts["documents"])

    model = NemotronHForCausalLM(preset("tiny"))
    gpu = torch.cuda.is_available()
    epochs = math.ceil(steps * windows_per_step * LENGTH / (len(stream) - 2 * LENGTH))
    curve = HeldOutCurve(PackedWindows(heldout, LENGTH), bytes_per_token, every=max(1, steps // 20))
    decay = max(1, steps // 5)
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        per_device_train_batch_size=windows_per_step,
        max_steps=steps,
        learning_rate=PEAK_LEARNING_RATE,
        adam_beta2=0.95,
        weight_decay=0.1,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=min(WARMUP_STEPS, decay),
        lr_scheduler_kwargs={"num_decay_steps": decay, "decay_type": "1-sqrt"},
        bf16=gpu,
        tf32=gpu or None,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 200),
        save_strategy="no",
        report_to=[],
        dataloader_num_workers=4 if gpu else 0,
        remove_unused_columns=False,
        seed=seed,
    )
    trainer = NemotronTrainer(
        model=model,
        args=arguments,
        train_dataset=ShiftingEpochs(stream, LENGTH, epochs, seed=seed),
        callbacks=[curve],
    )
    result = trainer.train()

    model.to(torch.bfloat16)
    model.config.use_cache = True  # training turned it off
    model.generation_config.eos_token_id = [2, 11]  # the end of a text, and of a turn in a chat
    model.save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(data / name, output)
    saved = NemotronHForCausalLM.from_pretrained(output, dtype=torch.float32).to(trainer.args.device)
    final = evaluate_windows(saved, PackedWindows(heldout, LENGTH), batch_size=16)
    log = {"train": trainer.state.log_history, "heldout": curve.curve}
    summary = asdict(final) | {
        "bits_per_byte": final.bits_per_byte(bytes_per_token),
        "steps": steps,
        "tokens_seen": steps * windows_per_step * LENGTH,
        "epochs": steps * windows_per_step * LENGTH / len(stream),
        "seconds": result.metrics["train_runtime"],
        "hardware": torch.cuda.get_device_name() if gpu else "CPU",
        "torch": torch.__version__,
    }
    for name, content in (("training_log.json", log), ("evaluation.json", summary)):
        (output / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw_curves(log, summary, output)
    print(json.dumps({k: v for k, v in summary.items() if k != "expert_share"}, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the checkpoint, the logs and the curves"
    )
    parser.add_argument(
        "--data", type=Path, help="folder for the encoded corpus (default: data/ in the output folder)"
    )
    parser.add_argument("--prepare-only", action="store_true", help="stop when the corpus is encoded")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--windows-per-step", type=int, default=WINDOWS_PER_STEP)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    data = options.data or options.output / "data"
    if not (data / "counts.json").exists():  # written last
        prepare(data)
    if not options.prepare_only:
        train(data, options.output, options.steps, options.windows_per_step, options.seed)


if __name__ == "__main__":
    main()
