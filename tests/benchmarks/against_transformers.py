"""The same work on transformers' own Nemotron-H and on ours, each in a process of its own, in one run.

    python tests/benchmarks/against_transformers.py cpu                 two threads, a Super of 72 M parameters
    python tests/benchmarks/against_transformers.py cuda                one GPU, an eighth of Super at its true widths
    python tests/benchmarks/against_transformers.py cuda --packages DIR    transformers with what lies in DIR too

Times are medians. TFLOP/s count two operations for each weight that a token is multiplied by, and four more for gradients;
attention and recurrences not at all. Prints a table and, with `--save`, adds the run to `results/`, with date, hardware and versions.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
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
# (prompt lengths, decode batches, decode prompt and tokens, training length and pattern, how often each is timed)
WORK: dict[str, tuple[list[int], list[int], tuple[int, int], tuple[int, str], int]] = {
    "cpu": ([2048], [1], (64, 48), (1024, "MEMEMEM*EMEMEME"), 3),
    "cuda": ([2048, 8192], [1, 8], (512, 64), (4096, "MEM*E"), 5),
}


def weights_used(model) -> tuple[float, int]:
    """How many weights a token is multiplied by, each expert's by its share of the tokens; and how many of these are the head's."""
    config = model.config
    embeddings = model.get_input_embeddings().weight.numel()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (1 - config.num_experts_per_tok / config.n_routed_experts)
    return sum(p.numel() for p in model.parameters()) - embeddings - idle, model.get_output_embeddings().weight.numel()


def measure(device: str, dtype: str, ours: bool) -> dict[str, float | str]:
    """Run all the work once in this process; failures as text."""
    import torch

    if ours:
        import nemotron_super  # noqa: F401
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(2 if device == "cpu" else torch.get_num_threads())
    gpu = device == "cuda"
    prompts, batches, (prompt_length, new_tokens), (train_length, train_pattern), repeats = WORK[device]
    vocab: int = SHAPES[device]["vocab_size"]
    found: dict[str, float | str] = {}

    def build(pattern: str):
        torch.manual_seed(0)
        config = AutoConfig.for_model("nemotron_h", **SHAPES[device] | {"hybrid_override_pattern": pattern})
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()

    def wait() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(repeats):
            start = wait()
            work()
            times.append(wait() - start)
        return sorted(times)[repeats // 2]

    def note(name: str, work: Callable[[], float]) -> None:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            found[name] = round(work(), 2)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()

    def note_speed(name: str, tokens: int, flops_per_token: float, work: Callable[[], object]) -> None:
        if not gpu:
            note(f"{name}, tokens/s", lambda: tokens / seconds(work))
            return
        note(f"{name}, TFLOP/s", lambda: flops_per_token * tokens / seconds(work) / 1e12)
        found[f"{name}, peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)

    def ids(batch: int, length: int) -> torch.Tensor:
        return torch.randint(3, vocab, (batch, length), device=device)

    def note_steps(name: str, batch: int, cache: str | None) -> None:
        prompt = ids(batch, prompt_length)
        options = {"do_sample": False, "pad_token_id": 0, "cache_implementation": cache}

        def run(n: int) -> None:
            model.generate(prompt, max_new_tokens=n, min_new_tokens=n, **options)

        def step() -> float:
            if cache:
                run(8 + new_tokens)  # compiles
            return (seconds(lambda: run(8 + new_tokens)) - seconds(lambda: run(8))) / new_tokens

        note(f"{name}, ms a step" if gpu else f"{name}, tokens/s", lambda: step() * 1e3 if gpu else batch / step())

    model = build(SHAPES[device]["hybrid_override_pattern"])
    used, head = weights_used(model)
    if gpu:
        first, start = ids(1, prompt_length), wait()
        model.generate(first, max_new_tokens=2, do_sample=False, pad_token_id=0)
        found["first two tokens, nothing compiled, s"] = round(wait() - start, 2)
    with torch.inference_mode():
        for length in prompts:
            prompt = ids(1, length)
            note_speed(
                f"prefill {length}",
                length,
                2 * (used - head),
                lambda prompt=prompt: model(prompt, use_cache=True, logits_to_keep=1),
            )
        for batch in batches:
            note_steps(f"decode batch {batch}", batch, None)
            if gpu:
                note_steps(f"decode batch {batch}, fixed-size cache", batch, "static")
    if gpu:
        del model
        gc.collect()
        torch.cuda.empty_cache()
        model = build(train_pattern)
        used, _ = weights_used(model)
    model.train()
    batch = ids(1, train_length)

    def step() -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad()

    note_speed(f"train {train_length}", train_length, 6 * used, step)
    if not gpu:
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


def results_file(what: str, device: str) -> Path:
    """Where a run is kept: of a GPU, in a folder with the name of its kind, such as `h100`."""
    if device == "cpu":
        return RESULTS / f"{what}_cpu.json"
    folder = RESULTS / hardware(device).removeprefix("NVIDIA ").split()[0].lower()
    folder.mkdir(exist_ok=True)
    return folder / f"{what}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=SHAPES)
    parser.add_argument(
        "--dtypes", nargs="+", default=None, help="default: float32 bfloat16 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument(
        "--packages",
        help="folder with mamba_ssm and causal_conv1d, which are installed nowhere else: also run transformers with them",
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
        for whose in ("theirs", "theirs with packages", "ours"):
            if (options.device, dtype, whose) == ("cpu", "bfloat16", "theirs"):
                continue  # minutes for every prompt
            environment = dict(os.environ)
            if whose == "theirs with packages":
                if options.packages is None:
                    continue
                environment["PYTHONPATH"] = os.pathsep.join([options.packages, environment.get("PYTHONPATH", "")])
            command = [sys.executable, __file__, options.device, "--dtypes", dtype, "--one", whose.split()[0]]
            with tempfile.TemporaryDirectory() as compiled:
                environment["TRITON_CACHE_DIR"] = compiled
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
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

        packages = "--packages DIR " if options.packages else ""
        record = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(options.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": f"python tests/benchmarks/against_transformers.py {options.device} {packages}--save",
            "runs": runs,
        }
        results_file("against_transformers", options.device).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
