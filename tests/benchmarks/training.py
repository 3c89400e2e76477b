"""A training step of a slice of Super (MEM*E, true widths) on one GPU: speed and memory, beside transformers' own in the same run.

    python tests/benchmarks/training.py [--save]

Forward and backward without an optimizer, as its state is the same for both. Counted are six FLOPs for every active parameter and
token, MTP's once for each of its two depths and the head once more for each; the products of attention and of the scan are left
out. Transformers has neither MTP nor packed documents on this architecture, so only the first row is like for like.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from against_transformers import SHAPES, hardware, results_file

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
DEPTHS = 2


def active(model: torch.nn.Module, config) -> float:
    """Parameters that one token meets, the head counted for each loss."""
    found = 0.0
    has_mtp = any(name.startswith("mtp.") for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if "embeddings" in name or "embed_tokens" in name:
            continue
        share = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1.0
        found += parameter.numel() * share * (DEPTHS if name.startswith("mtp.") else 1)
        if "lm_head" in name and has_mtp:
            found += DEPTHS * parameter.numel()
    return found


def median_seconds(work: Callable[[], None], device: str) -> float:
    """Of five calls, after two that are not counted."""
    times = []
    for _ in range(7):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[2]


def packed_positions(rows: int, length: int, documents: int) -> torch.Tensor:
    """Positions (rows, length) that begin again at each of so many documents of unequal length."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(rows):
        ends = torch.randperm(length - 1, generator=generator)[: documents - 1].sort().values + 1
        sizes = torch.diff(ends, prepend=torch.tensor([0]), append=torch.tensor([length]))
        found.append(torch.cat([torch.arange(int(n)) for n in sizes]))
    return torch.stack(found)


def measure(ours: bool, way: str, length: int, device: str, shape: str) -> dict[str, float | str]:
    """One step's time, rate and peak; a failure as text."""
    if ours:
        import nemotron_super  # noqa: F401
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    mtp = MTP if "MTP" in way else {}
    config = AutoConfig.for_model("nemotron_h", **SHAPES[shape] | {"hybrid_override_pattern": "MEM*E"} | mtp)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    if "checkpointing" in way:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(3, config.vocab_size, (1, length), device=device)
    extra = {"position_ids": packed_positions(1, length, 8).to(device)} if "packed" in way else {}

    def step() -> None:
        model(ids, labels=ids, use_cache=False, **extra).loss.backward()
        model.zero_grad()

    try:
        seconds = median_seconds(step, device)
        found = {"ms": seconds * 1e3, "TFLOP/s": 6 * active(model, config) * length / seconds / 1e12}
        if device == "cuda":
            weights = sum(p.nbytes for p in model.parameters())
            found["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
            found["beyond weights and gradients, GB"] = found["peak, GB"] - 2 * weights / 1e9
        return {name: round(value, 2) for name, value in found.items()}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}


def head_memory(length: int, device: str, shape: str) -> dict[str, dict[str, float]]:
    """Time and peak of the loss over the vocabulary and its gradients: fused, and through full logits."""
    from nemotron_super.kernels_hub.registry import linear_cross_entropy, use_kernels

    vocab, hidden = SHAPES[shape]["vocab_size"], SHAPES[shape]["hidden_size"]
    x = torch.randn(length, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    head = (torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16) / 64).requires_grad_()
    target = torch.randint(vocab, (length,), device=device)

    def full() -> None:
        loss = torch.nn.functional.cross_entropy((x @ head.T).float(), target, reduction="sum")
        torch.autograd.grad(loss, (x, head))

    def fused() -> None:
        loss, _ = linear_cross_entropy(x, head, target)
        torch.autograd.grad(loss, (x, head))

    def run(work: Callable[[], None]) -> dict[str, float]:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        seconds = median_seconds(work, device)
        peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
        return {"ms": round(seconds * 1e3, 2), "peak, GB": round(peak / 1e9, 2)}

    found = {"full logits": run(full)}
    for source in ("torch", "triton"):
        with use_kernels(linear_cross_entropy=source):
            try:
                found[f"fused, {source}"] = run(fused)
            except RuntimeError as error:
                found[f"fused, {source}"] = {"failed": str(error)[:120]}
    return found


WAYS = ["plain", "packed, MTP", "packed, MTP, checkpointing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--save", action="store_true", help="write the run to results/")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, shape = options.device, options.device
    if options.one:
        whose, way, length = options.one
        found = (
            head_memory(int(length), device, shape)
            if way == "head"
            else measure(whose == "ours", way, int(length), device, shape)
        )
        print("RESULT", json.dumps(found))
        return

    def run(whose: str, way: str, length: int) -> dict:
        command = [sys.executable, __file__, "--device", device, "--one", whose, way, str(length)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        return json.loads(lines[0].removeprefix("RESULT ")) if lines else {"failed": done.stderr[-300:]}

    runs: dict[str, dict] = {}
    for length in options.lengths:
        runs[f"transformers, plain, {length}"] = run("theirs", "plain", length)
        for way in WAYS:
            runs[f"ours, {way}, {length}"] = run("ours", way, length)
        print(*(f"{name:<42}{runs[name]}" for name in runs if name.endswith(str(length))), sep="\n", flush=True)
    heads = run("ours", "head", options.lengths[0])
    print(*(f"loss of {options.lengths[0]} tokens, {name:<22}{row}" for name, row in heads.items()), sep="\n")
    if options.save:
        record = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(device),
            "torch": torch.__version__,
            "command": "python tests/benchmarks/training.py " + " ".join(sys.argv[1:]),
            "runs": runs,
            "loss": heads,
        }
        results_file("training", device).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
