"""The same work on transformers' own Nemotron-H and on ours, each in a process of its own, in one run.

    python tests/benchmarks/against_transformers.py cpu                 two threads, a Super of 72 M parameters
    python tests/benchmarks/against_transformers.py cuda                one GPU, an eighth of Super at its true widths

Prints a table and, with `--save`, adds the run to `results/`, with date, hardware and versions.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict] = {
    "cpu": {
        "hybrid_override_pattern": "MEMEMEM*EMEMEME", "vocab_size": 8192, "hidden_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128,
        "n_groups": 8, "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "moe_latent_size": 128, "moe_intermediate_size": 336, "moe_shared_expert_intermediate_size": 672,
        "intermediate_size": 336, "routed_scaling_factor": 2.5, "pad_token_id": 0, "eos_token_id": None,
    },
    "cuda": {
        "hybrid_override_pattern": "MEMEMEM*EME", "vocab_size": 131072, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128,
        "n_groups": 8, "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": 512, "num_experts_per_tok": 22,
        "moe_latent_size": 1024, "moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376,
        "intermediate_size": 2688, "routed_scaling_factor": 5.0, "pad_token_id": 0, "eos_token_id": None,
    },
}  # fmt: skip
# (prompt lengths, decode batches, decode tokens, training length and pattern)
WORK: dict[str, tuple[list[int], list[int], int, int, str]] = {
    "cpu": ([2048], [1], 48, 1024, "MEMEMEM*EMEMEME"),
    "cuda": ([2048, 8192], [1, 8], 64, 4096, "MEM*E"),
}


def measure(device: str, dtype: str, ours: bool) -> dict[str, float | str]:
    """Run all the work once in this process; speeds in tokens/s, memory in MB, failures as text."""
    import torch

    if ours:
        import nemotron_super  # noqa: F401
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(2 if device == "cpu" else torch.get_num_threads())
    prompts, batches, tokens, train_length, train_pattern = WORK[device]
    vocab: int = SHAPES[device]["vocab_size"]
    found: dict[str, float | str] = {}

    def build(pattern: str):
        torch.manual_seed(0)
        config = AutoConfig.for_model("nemotron_h", **SHAPES[device] | {"hybrid_override_pattern": pattern})
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()

    def seconds(work: Callable[[], object], repeats: int = 3) -> float:
        times = []
        for _ in range(repeats + 1):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[repeats // 2]

    def note(name: str, work: Callable[[], float]) -> None:
        try:
            found[name] = round(work(), 2)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

    def ids(batch: int, length: int) -> torch.Tensor:
        return torch.randint(3, vocab, (batch, length), device=device)

    def prefill(length: int) -> float:
        prompt = ids(1, length)
        return length / seconds(lambda: model(prompt, use_cache=True, logits_to_keep=1))

    def generate(batch: int, cache: str | None) -> float:
        prompt = ids(batch, 64)
        options = {"do_sample": False, "pad_token_id": 0, "cache_implementation": cache}

        def run(n: int) -> None:
            model.generate(prompt, max_new_tokens=n, min_new_tokens=n, **options)

        if cache:
            run(8 + tokens)  # compiles
        return batch * tokens / (seconds(lambda: run(8 + tokens)) - seconds(lambda: run(8)))

    model = build(SHAPES[device]["hybrid_override_pattern"])
    with torch.inference_mode():
        for length in prompts:
            note(f"prefill {length}, tokens/s", lambda length=length: prefill(length))
        for batch in batches:
            note(f"decode batch {batch}, tokens/s", lambda batch=batch: generate(batch, None))
            if device == "cuda":
                note(f"decode batch {batch} static, tokens/s", lambda batch=batch: generate(batch, "static"))
    if device == "cuda":
        del model
        gc.collect()
        torch.cuda.empty_cache()
        note("inference peak, MB", lambda: torch.cuda.max_memory_allocated() / 2**20)
        torch.cuda.reset_peak_memory_stats()
        model = build(train_pattern)
    model.train()
    batch = ids(1, train_length)

    def step() -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad()

    note(f"train {train_length}, tokens/s", lambda: train_length / seconds(step))
    if device == "cuda":
        note("training peak, MB", lambda: torch.cuda.max_memory_allocated() / 2**20)
    else:
        note("peak, MB", lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return found


def hardware(device: str) -> str:
    """What the run was made on."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, 2 threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=SHAPES)
    parser.add_argument(
        "--dtypes", nargs="+", default=None, help="default: float32 bfloat16 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--save", action="store_true", help="add the run to results/")
    parser.add_argument("--one", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtypes = options.dtypes or (["float32", "bfloat16"] if options.device == "cpu" else ["bfloat16"])
    if options.one:
        print("RESULT", json.dumps(measure(options.device, dtypes[0], options.one == "ours")))
        return

    runs: dict[str, dict] = {}
    for dtype in dtypes:
        for whose in ("theirs", "ours"):
            if (options.device, dtype, whose) == ("cpu", "bfloat16", "theirs"):
                continue  # minutes for every prompt
            command = [sys.executable, __file__, options.device, "--dtypes", dtype, "--one", whose]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{whose} {dtype} failed:\n{done.stderr[-3000:]}")
            runs[f"{whose} {dtype}"] = json.loads(lines[0].removeprefix("RESULT "))

    print(f"| | {' | '.join(runs)} |\n|---{'|---' * len(runs)}|")
    for row in dict.fromkeys(name for run in runs.values() for name in run):
        print(f"| {row} | " + " | ".join(str(run.get(row, "")) for run in runs.values()) + " |")
    if options.save:
        import torch
        import transformers

        record = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(options.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": f"python tests/benchmarks/against_transformers.py {options.device} --save",
            "runs": runs,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"against_transformers_{options.device}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
