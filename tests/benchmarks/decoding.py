"""Decoding from caches of fixed size: time a step beside that of its kernels, drafts, memory by context, rollback.

    python tests/benchmarks/decoding.py --save                        an eighth of Super at its true widths on a GPU
    python tests/benchmarks/decoding.py --shape cpu --save            72 M parameters on a CPU
    python tests/benchmarks/decoding.py --shape tiny --only long      100,000 tokens of one text

Every figure of a step is a slope between two runs, so that the prompt, and what happens once a call, drops out. Weights are
random: few drafts are kept, and a round of drafting is timed, not a token.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from against_transformers import RESULTS, SHAPES, hardware, results_file
from nemotron_super import HybridCache, NemotronHConfig, NemotronHForCausalLM
from nemotron_super.modeling.cache import Mamba2CacheLayer
from nemotron_super.modeling.captured_decoding import CapturedReader, DecodeStep, forget_idle_caches
from nemotron_super.modeling.static_cache import StaticHybridCache, round_up
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers.generation.streamers import BaseStreamer

TINY = {
    "hybrid_override_pattern": "MM*M", "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
    "conv_kernel": 4, "chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_latent_size": 8,
    "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8, "intermediate_size": 8, "pad_token_id": 0,
    "eos_token_id": None,
}  # fmt: skip
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
# (prompt of a step, tokens of the short and the long run, batches, contexts, tokens read at once, tokens of one long text)
WORK: dict[str, tuple[int, int, int, list[int], list[int], int, int]] = {
    "cuda": (512, 8, 72, [1, 8], [2**n for n in range(13, 21)], 8192, 100_000),
    "cpu": (64, 4, 28, [1], [2**n for n in range(10, 14)], 1024, 2_000),
    "tiny": (8, 2, 12, [1, 2], [32, 64, 128], 16, 100_000),
}


def wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(model, work: Callable[[], object], repeats: int = 3) -> float:
    """The median time of a call that has been made once before."""
    times = []
    for _ in range(repeats + 1):
        wait(model)
        start = time.perf_counter()
        work()
        wait(model)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def kernel_seconds(model, work: Callable[[], object]) -> float:
    """How long any kernel ran during a call; on a CPU, the sum over all operators.

    A kernel begins while the one before it ends, so that a sum over kernels would count the same time twice.
    """
    on_gpu = model.device.type == "cuda"
    wait(model)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        wait(model)
    if not on_gpu:
        return sum(row.self_cpu_time_total for row in profiler.key_averages()) / 1e6
    busy, until = 0.0, 0.0
    ranges = (event.time_range for event in profiler.events() if event.device_type == DeviceType.CUDA)
    for begin, end in sorted((r.start, r.end) for r in ranges):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6


def bytes_of(cache) -> int:
    """Bytes of every tensor that a cache holds."""
    found: set[tuple[int, int]] = set()
    for layer in cache.layers:
        held = [getattr(layer, name, None) for name in ("keys", "values", "pending", "drafts")]
        for states in ("conv_states", "recurrent_states"):
            held += list(getattr(layer, states, {}).values())
        for tensor in held:
            if torch.is_tensor(tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                found.add((storage.data_ptr(), storage.nbytes()))
    return sum(size for _, size in found)


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak(start: bool = False) -> int:
    """The most that this process has held, bytes; `start` counts from what it holds now."""
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )


class Statistics(BaseStreamer):
    """Receives the statistics of the drafts; leaves the cache to later calls, which a returned one would not be."""

    def put(self, value) -> None:
        pass

    def end(self) -> None:
        pass


# What a fresh process does first: tokens of a short prompt, of a long one that is read at once, and of a training step.
FIRST = {"cuda": (512, 8192, 4096), "cpu": (64, 1024, 256), "tiny": (8, 64, 32)}


def first_calls(shape: str) -> dict[str, dict[str, float]]:
    """Seconds of a first call and a second, each kind of work in a process of its own whose cache of compiled kernels is empty."""
    found = {}
    for work in ("decode", "prefill", "train"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--shape", shape, "--first-call", work]
            environment = {**os.environ, "TRITON_CACHE_DIR": folder}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            name, times = json.loads(done.stdout.splitlines()[-1])
            compiled = len(list(Path(folder).rglob("*.cubin")))
        found[name] = {**times, "compiled kernels": compiled}
    return found


def first_call(work: str, shape: str, device: str) -> tuple[str, dict[str, float]]:
    """In this process, in which nothing has been called: what is done, and the seconds of the first time and of the second."""
    prompt, long, training = FIRST[shape]
    # Beside its gradients Super's slice does not fit: the step is that of the benchmark of training.
    pattern = {"hybrid_override_pattern": "MEM*E"} if work == "train" else MTP
    model = make_model(shape, device, **pattern)
    tokens = {"decode": prompt, "prefill": long, "train": training}[work]
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), device=device)

    def call() -> None:
        if work == "train":
            model.train()(ids, labels=ids).loss.backward()
        else:
            with torch.no_grad():
                new = 2 if work == "decode" else 1
                model.generate(ids, max_new_tokens=new, do_sample=False, cache_implementation="static")
        wait(model)

    times = {}
    for name in ("first, s", "second, s"):
        start = time.perf_counter()
        call()
        times[name] = time.perf_counter() - start
    names = {"decode": f"{prompt} tokens and 2 new ones", "prefill": f"{long} tokens and 1 new one"}
    return names.get(work, f"training step of {training} tokens, MEM*E"), times


def make_model(shape: str, device: str, **fields) -> NemotronHForCausalLM:
    """Random weights."""
    with torch.device(device):
        config = NemotronHConfig(**{**(TINY if shape == "tiny" else SHAPES[shape]), **fields})
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return NemotronHForCausalLM._from_config(config, dtype=dtype).eval()


def steps(model, shape: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a plain step, growing cache and recorded, and of a round of drafts; and for how long kernels ran."""
    prompt, short, long, batches, *_ = WORK[shape]
    found: dict[str, dict[str, float]] = {}
    for batch in batches:
        ids = torch.randint(3, model.config.vocab_size, (batch, prompt), device=model.device)
        for drafts in (0, 1, 3):
            for cache in ("static",) if drafts else (None, "static"):
                counted: list[int] = []

                def run(tokens: int, batch=batch, ids=ids, drafts=drafts, cache=cache, counted=counted) -> None:
                    extra: dict = {}
                    if drafts:
                        extra = {"use_mtp": True, "num_assistant_tokens": drafts, "streamer": Statistics()}
                    model.generate(
                        ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, cache_implementation=cache, **extra
                    )  # fmt: skip
                    rounds = extra["streamer"].mtp_statistics.steps // batch if drafts else tokens - 1
                    counted.append(rounds)

                times, kernels, rounds = [], [], []
                for tokens in (short, long):
                    times.append(seconds(model, lambda run=run, tokens=tokens: run(tokens)))
                    kernels.append(kernel_seconds(model, lambda run=run, tokens=tokens: run(tokens)))
                    rounds.append(counted[-1])
                each = rounds[1] - rounds[0]
                step, busy = (1e3 * (pair[1] - pair[0]) / each for pair in (times, kernels))
                name = (
                    f"batch {batch}, " + (f"{drafts} drafts" if drafts else "plain") + (", growing" * (cache is None))
                )
                found[name] = {"ms": step, "kernels, ms": busy, "overhead": step / busy - 1}
    return found


def context(model, shape: str) -> dict[int, dict[str, float]]:
    """By tokens of context: bytes of the cache, peak beyond the weights, seconds of prefill, milliseconds of a step."""
    *_, lengths, piece, _ = WORK[shape]
    found = {}
    for length in lengths:
        forget_idle_caches(model)
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else peak(start=True)
        ids = torch.randint(3, model.config.vocab_size, (1, length), device=model.device)
        cache = StaticHybridCache(model.config, round_up(length + 32))
        wait(model)
        start = time.perf_counter()
        for part in ids.split(piece, dim=1):
            logits = model(part, cache=cache, logits_to_keep=1).logits
        wait(model)
        prefill = time.perf_counter() - start
        most = (torch.cuda.max_memory_allocated() if on_gpu else peak()) - before
        step = DecodeStep(model, cache, 1, None)
        token = logits[:, -1].argmax(-1)
        for _ in range(4):
            step(token)
        each = seconds(model, lambda step=step, token=token: [step(token) for _ in range(4)]) / 4
        found[length] = {
            "cache, MB": bytes_of(cache) / 1e6, "beyond the weights, MB": most / 1e6, "prefill, s": prefill, "step, ms": 1e3 * each,
        }  # fmt: skip
        del cache, step
    return found


def rollback(model, shape: str) -> dict[str, dict[str, float]]:
    """Reading 1 + k tokens of which some are taken back: by replaying their inputs, or from one state for each.

    "stored" reads without recording and copies all states once for each token: the least that storing them costs.
    """
    prompt = WORK[shape][0]
    found: dict[str, dict[str, float]] = {}
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=model.device)
    for drafts in (1, 3, 7):
        tokens = ids[:, : drafts + 1]

        def start(record: bool) -> HybridCache:
            cache = HybridCache(model.config)
            model(ids, cache=cache, logits_to_keep=1)
            if record:
                cache.activate_past_recording()
            return cache

        plain, replayed = start(False), start(True)
        states = [s for layer in plain.layers if isinstance(layer, Mamba2CacheLayer)
                  for s in (layer.conv_states[0], layer.recurrent_states[0])]  # fmt: skip

        def take_back(cache=replayed, tokens=tokens, drafts=drafts) -> None:
            model(tokens, cache=cache)
            cache.crop(-((drafts + 1) // 2))

        reader = CapturedReader(model, StaticHybridCache(model.config, 4096), None)
        reader.begin(reader.read_prompt(ids, None, None)[:, -1].argmax(-1))

        def fixed(reader=reader, tokens=tokens, drafts=drafts) -> None:
            reader.read(tokens)
            reader.settle([drafts // 2], tokens[:, -1], [0])

        read = seconds(model, lambda cache=plain, tokens=tokens: model(tokens, cache=cache), 9)
        copies = seconds(model, lambda s=states, n=drafts + 1: [[t.clone() for t in s] for _ in range(n)], 9)
        replay = seconds(model, take_back, 9)
        each = seconds(model, fixed, 9)
        pending = [layer.pending for layer in replayed.layers if isinstance(layer, Mamba2CacheLayer)]
        token = sum(inputs[:, :1].nbytes for inputs in pending if inputs is not None)
        found[f"{drafts} drafts"] = {
            "read only, ms": 1e3 * read, "replayed, ms": 1e3 * replay, "replayed in fixed steps, ms": 1e3 * each,
            "stored, ms": 1e3 * (read + copies), "replay keeps, MB": token * (drafts + 1) / 1e6,
            "states stored, MB": sum(s.nbytes for s in states) * (drafts + 1) / 1e6,
        }  # fmt: skip
    return found


class Growth(BaseStreamer):
    """Notes, while a text is written, how large the cache and the process are."""

    def __init__(self, cache: HybridCache, every: int):
        self.cache, self.every, self.written, self.start = cache, every, 0, time.perf_counter()
        self.rows: list[dict[str, float]] = []

    def put(self, value) -> None:
        self.written += 1
        if self.written % self.every == 0:
            self.rows.append(
                {
                    "tokens": self.written,
                    "cache, MB": bytes_of(self.cache) / 1e6,
                    "process, MB": resident() / 1e6,
                    "s": time.perf_counter() - self.start,
                }
            )

    def end(self) -> None:
        pass


def one_long_text(model, shape: str) -> dict[str, dict[str, float]]:
    """One text of many tokens from a fixed-size cache: memory at each tenth of it."""
    prompt, *_, tokens = WORK[shape]
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=model.device)
    cache = StaticHybridCache(model.config, prompt + tokens)
    growth = Growth(cache, tokens // 10)
    model.generate(
        ids, cache=cache, max_new_tokens=tokens, do_sample=True, eos_token_id=None, streamer=growth, temperature=1.5
    )  # fmt: skip
    return {f"{row['tokens']:,} tokens": row for row in growth.rows}


# And "first", for which nothing may have run before.
PARTS = {"steps": steps, "context": context, "rollback": rollback, "long": one_long_text}


def show(name: str, rows: dict) -> None:
    print(f"\n{name}")
    if rows and not isinstance(next(iter(rows.values())), dict):
        rows = {key: {"": value} for key, value in rows.items()}
    columns = list(next(iter(rows.values())))
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for key, row in rows.items():
        print(f"| {key} | " + " | ".join(f"{row[column]:,.3f}" for column in columns) + " |")


def plot(rows: dict[int, dict[str, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(6, 4))
    for column in ("cache, MB", "beyond the weights, MB"):
        axes.plot(list(rows), [row[column] for row in rows.values()], marker="o", label=column)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="MB")
    axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    plt.savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=WORK, default="cuda" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--only", choices=("first", *PARTS), nargs="+", default=None, help="these parts")
    parser.add_argument("--tokens", type=int, default=None, help="length of the one long text")
    parser.add_argument("--first-call", choices=("decode", "prefill", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write results/decoding_SHAPE.json and its plot")
    options = parser.parse_args()
    if options.tokens:
        WORK[options.shape] = (*WORK[options.shape][:-1], options.tokens)
    shape, device = options.shape, "cuda" if options.shape == "cuda" else "cpu"
    parts = options.only or [part for part in ("first", *PARTS) if part != "long" or shape == "cpu"]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if options.first_call:
        print(json.dumps(first_call(options.first_call, shape, device)))
        return
    found: dict[str, dict] = {}
    if "first" in parts:  # before this process takes memory of the GPU
        found["first"] = first_calls(shape)
        show("first", found["first"])
    model = make_model(shape, device if set(parts) - {"first"} else "meta", **MTP)
    with torch.no_grad():
        for part in parts:
            if part != "first":
                found[part] = PARTS[part](model, shape)
                show(part, found[part])
    if options.save:
        rounded = json.loads(json.dumps(found), parse_float=lambda x: round(float(x), 4))
        record = {
            "dates": dict.fromkeys(found, datetime.date.today().isoformat()),
            "hardware": hardware(device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": f"python tests/benchmarks/decoding.py --shape {shape} --save",
            "parameters": sum(p.numel() for p in model.parameters()),
            **rounded,
        }
        file = results_file("decoding", "cuda") if shape == "cuda" else RESULTS / f"decoding_{shape}.json"
        if options.only and file.exists():
            before = json.loads(file.read_text())
            record = {**before, **rounded, "dates": {**before["dates"], **record["dates"]}}
        file.write_text(json.dumps(record, indent=1) + "\n")
        if "context" in found:
            plot(found["context"], file.with_name(file.stem.replace("decoding", "decoding_memory") + ".png"))


if __name__ == "__main__":
    main()
