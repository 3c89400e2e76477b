"""LoRA over packed weights against LoRA over BF16, on `nemotron-h-tiny`: loss, memory, steps per second.

    python tests/benchmarks/lora_quantized.py --steps 60 --save
    python tests/benchmarks/lora_quantized.py --device cuda --steps 60 --rows 16 --save

Adapters on every linear map of the backbone and on its routed experts learn lines of arithmetic, which the model has not seen; the
same lines in the same order over each base, each in a process of its own. MTP has neither adapters nor a part in the loss.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import nemotron_super
import torch
import transformers
from against_transformers import hardware, results_file
from nemotron_super import NemotronHForCausalLM, NVFP4Config, quantize_model
from nemotron_super.training.lora import add_lora
from torch import Tensor
from transformers import AutoTokenizer

TINY = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"
BASES = ("BF16", "release", "nvfp4")


def batches(tokenizer, count: int, rows: int, length: int, seed: int) -> list[Tensor]:
    """`count` batches (rows, length) of token ids."""
    draw = random.Random(seed)

    def line() -> str:
        a, b = draw.randrange(100), draw.randrange(100)
        sign, value = draw.choice((("+", a + b), ("-", a - b), ("max", max(a, b)), ("min", min(a, b))))
        return f"{a} {sign} {b} => {value}; "

    ids: list[int] = []
    while len(ids) < count * rows * length:
        ids += tokenizer("".join(line() for _ in range(200))).input_ids
    return list(torch.tensor(ids[: count * rows * length]).view(count, rows, length))


def train(base: str, options: argparse.Namespace) -> dict:
    """One run; losses of training, held-out loss before and after, peak memory and speed."""
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    data = [
        ids.to(options.device)
        for ids in batches(tokenizer, options.steps + 4, options.rows, options.length, options.seed)
    ]
    trained, heldout = data[: options.steps], data[options.steps :]
    model = NemotronHForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).to(options.device)
    if base != "BF16":
        model = quantize_model(model, NVFP4Config(recipe=base))
    weights = sum(t.nbytes for t in (*model.model.parameters(), *model.model.buffers()))
    model = add_lora(model, r=options.rank, alpha=2 * options.rank, exclude=["mtp", "lm_head"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def heldout_loss() -> float:
        model.eval()
        return sum(model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in heldout) / len(heldout)

    before = heldout_loss()
    optimizer = torch.optim.AdamW(parameters, lr=options.lr)
    losses: list[float] = []
    model.train()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    cpu = time.process_time()
    for step, ids in enumerate(trained):
        loss = model(input_ids=ids, labels=ids, mtp_num_depths=0, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"{base} step {step + 1}: {losses[-1]:.4f}", file=sys.stderr, flush=True)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "base": base,
        "backbone_megabytes": round(weights / 1e6, 1),
        "adapter_parameters": sum(p.numel() for p in parameters),
        "heldout_loss_before": before,
        "heldout_loss_after": heldout_loss(),
        "losses": [round(loss, 4) for loss in losses],
        "steps_per_second": options.steps / seconds,
        "steps_per_cpu_second": options.steps / cpu_seconds,
        "peak_megabytes": round(peak / 1e6, 1),
    }


def main() -> None:
    """Run every base in a process of its own, print a table, and with `--save` write it to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bases", nargs="+", default=["BF16", "nvfp4"], choices=BASES)
    parser.add_argument("--one", choices=BASES, help="run this base here and print JSON")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(train(options.one, options)))
        return
    rows = []
    for base in options.bases:
        run = subprocess.run([sys.executable, *sys.argv, "--one", base], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    print(
        "| base | backbone, MB | held-out loss before | after | last 10 training losses | peak, MB | steps/s | per CPU s |"
    )
    for row in rows:
        last = sum(row["losses"][-10:]) / len(row["losses"][-10:])
        print(
            f"| {row['base']} | {row['backbone_megabytes']} | {row['heldout_loss_before']:.3f} | {row['heldout_loss_after']:.3f} "
            f"| {last:.3f} | {row['peak_megabytes']} | {row['steps_per_second']:.3f} | {row['steps_per_cpu_second']:.3f} |"
        )
    if options.save:
        run = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(options.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "options": {k: v for k, v in vars(options).items() if k not in ("one", "save", "bases")},
            "rows": rows,
        }
        results_file("lora_quantized", options.device).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
