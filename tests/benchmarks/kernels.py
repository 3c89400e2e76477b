"""Every op at the shapes of Nemotron 3 Super: time, bytes or FLOPs, and the share of what the GPU can do.

    python tests/benchmarks/kernels.py [--only rms_norm,fp8_linear] [--save]

The limit of an op is the larger of its bytes over the bandwidth of a large copy and its FLOPs over the rate of a large
product, both measured first, in the same run. Inputs rotate, so that none is found in the cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.registry import use_kernels

RESULTS = Path(__file__).parent / "results" / "kernels.json"
HEADS, HEAD_DIM, STATE, GROUPS, CHANNELS, HIDDEN, LATENT, INNER = 128, 64, 128, 8, 10240, 4096, 1024, 2688
EXPERTS, TOP_K, VOCAB = 512, 22, 131072
BF16, F32 = 2, 4


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def milliseconds(work: Callable[[], object], graph: bool = False) -> float:
    if graph:
        return triton.testing.do_bench_cudagraph(work, rep=30, return_mode="median")
    return triton.testing.do_bench(work, warmup=10, rep=60, return_mode="median")


def limits() -> tuple[float, float]:
    """Measured bytes/s of a copy and FLOP/s of a bfloat16 product."""
    source = rand(1 << 30)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * BF16 / milliseconds(lambda: target.copy_(source)) * 1e3
    a, b = rand(8192, 8192), rand(8192, 8192)
    return bandwidth, 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3


def rotating(build: Callable[[], tuple], call: Callable, copies: int) -> Callable[[], object]:
    sets, turn = [build() for _ in range(copies)], [0]

    def work():
        turn[0] = (turn[0] + 1) % copies
        return call(*sets[turn[0]])

    return work


def with_backward(call: Callable) -> Callable:
    """The same call, forward and backward, with gradients for every floating input."""

    def work(*args):
        leaves = [a.requires_grad_() for a in args if torch.is_tensor(a) and a.is_floating_point()]
        out = call(*args)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, out)

    return work


def scan_inputs(length: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    dt = torch.nn.functional.softplus(rand(batch, length, HEADS, dtype=torch.float32) - 4)
    A, D = -16 * torch.rand(HEADS, device="cuda"), torch.ones(HEADS, device="cuda")
    B, C = (rand(batch, length, GROUPS, STATE) for _ in range(2))
    return rand(batch, length, HEADS, HEAD_DIM), dt, A, B, C, D


def routed(tokens: int) -> tuple:
    return torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices, torch.rand(tokens, TOP_K, device="cuda")


def packed(name: str, *shape: int) -> tuple[torch.Tensor, ...]:
    """Random codes of weights (..., out, in) and their scales; what they stand for does not matter to the time."""
    *batch, rows, width = shape
    scale = torch.full(batch, 1e-3, device="cuda")
    codes = torch.randint(
        0, 120, (*batch, rows, width // (2 if name == "nvfp4" else 1)), device="cuda", dtype=torch.uint8
    )
    if name == "fp8":
        return codes.view(torch.float8_e4m3fn), scale
    blocks = torch.full((*batch, rows, width // 16), 1.0, device="cuda").to(torch.float8_e4m3fn)
    return codes, blocks, scale


def packed_cases() -> list[tuple]:
    """Weights in FP8 and NVFP4, as `cases`: the projections of the release's mix and its routed experts."""
    r, found = registry, []
    sizes = {
        "in_proj": (18560, HIDDEN),
        "out_proj": (HIDDEN, 8192),
        "up_proj": (5376, HIDDEN),
        "down_proj": (HIDDEN, 5376),
    }
    for name, bits in (("fp8", 8), ("nvfp4", 4.5)):
        linear, experts = getattr(r, f"{name}_linear"), getattr(r, f"{name}_experts")
        for what, (rows, width) in sizes.items():
            for n in (1, 2, 4, 8, 32, 64, 8192):
                build = lambda n=n, name=name, rows=rows, width=width: (rand(n, width), *packed(name, rows, width))  # noqa: E731
                moved, flops = rows * width * bits / 8 + n * (rows + width) * BF16, 2 * n * rows * width
                found.append((f"{name}_linear", f"{n} {what}", build, linear, moved, flops, 8, n <= 64))
        up, down = packed(name, EXPERTS, INNER, LATENT), packed(name, EXPERTS, LATENT, INNER)
        for n in (1, 2, 4, 8, 16, 32, 64, 2048, 8192):
            build = lambda n=n, up=up, down=down: (rand(n, LATENT), *routed(n), up, down)  # noqa: E731
            touched = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** n)
            moved, flops = touched * 2 * INNER * LATENT * bits / 8, 4 * n * TOP_K * INNER * LATENT
            found.append((f"{name}_experts", f"{n}", build, experts, moved, flops, 6, n <= 64))
    return found


def cases() -> list[tuple]:
    """(op, what, build, call, bytes, FLOPs, copies, in a graph, forward and backward)."""
    r = registry
    found: list[tuple] = []
    build: Callable[[], tuple]
    for n in (2048, 8192, 32768):
        moved = n * (2 * HEADS * HEAD_DIM + 2 * GROUPS * STATE) * BF16 + n * HEADS * F32
        # The least a chunk of 64 takes: scores, their product with x, reading and writing the state.
        flops = 2 * n * HEADS * (64 * STATE + 64 * HEAD_DIM + 2 * HEAD_DIM * STATE)
        found.append(("ssd_chunk_scan", f"{n}", lambda n=n: scan_inputs(n), r.ssd_chunk_scan, moved, flops, 2, False))
        moved = 2 * n * CHANNELS * BF16
        build = lambda n=n: (rand(1, n, CHANNELS), rand(CHANNELS, 4), rand(CHANNELS))  # noqa: E731
        found.append(("causal_conv1d", f"{n}", build, r.causal_conv1d, moved, 0, 3, False))
        build = lambda n=n: (rand(n, 8192), rand(n, 8192), rand(8192), 1e-5, 1024)  # noqa: E731
        found.append(("gated_rms_norm", f"{n}", build, r.gated_rms_norm, 3 * n * 8192 * BF16, 0, 3, False))
        build = lambda n=n: (rand(n, HIDDEN), rand(HIDDEN), 1e-5)  # noqa: E731
        found.append(("rms_norm", f"{n}", build, r.rms_norm, 2 * n * HIDDEN * BF16, 0, 3, False))
        build = lambda n=n: (rand(n, HIDDEN), rand(EXPERTS, HIDDEN))  # noqa: E731
        moved, flops = n * HIDDEN * BF16 + n * EXPERTS * F32, 2 * n * HIDDEN * EXPERTS
        found.append(("router_logits", f"{n}", build, r.router_logits, moved, flops, 3, False))
        build = lambda n=n: (rand(n, EXPERTS, dtype=torch.float32), torch.zeros(EXPERTS, device="cuda"), TOP_K)  # noqa: E731
        found.append(("topk_routing", f"{n}", build, r.topk_routing, n * (EXPERTS * F32 + TOP_K * 12), 0, 3, False))
    up, down = rand(EXPERTS, INNER, LATENT), rand(EXPERTS, LATENT, INNER)
    for n in (1, 2, 4, 8, 16, 64, 2048, 8192):
        build = lambda n=n: (rand(n, LATENT), *routed(n), up, down)  # noqa: E731
        touched = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** n)
        moved, flops = touched * 2 * INNER * LATENT * BF16, 4 * n * TOP_K * INNER * LATENT
        found.append(("moe_experts", f"{n}", build, r.moe_experts, moved, flops, 6, n <= 16))
    for b in (1, 8, 64):
        build = lambda b=b: (  # noqa: E731
            rand(b, HEADS, HEAD_DIM, STATE, dtype=torch.float32),
            *(t[:, 0] if t.dim() > 2 else t for t in scan_inputs(1, b)),
        )
        moved = 2 * b * HEADS * HEAD_DIM * STATE * F32
        found.append(("selective_state_update", f"batch {b}", build, r.selective_state_update, moved, 0, 24, True))
        build = lambda b=b: (rand(b, CHANNELS, 4), rand(b, CHANNELS), rand(CHANNELS, 4), rand(CHANNELS))  # noqa: E731
        moved = (10 * b + 5) * CHANNELS * BF16
        found.append(("causal_conv1d_update", f"batch {b}", build, r.causal_conv1d_update, moved, 0, 24, True))
        build = lambda b=b: (rand(b, HIDDEN), rand(b, HIDDEN), rand(HIDDEN), 1e-5)  # noqa: E731
        found.append(("add_rms_norm", f"batch {b}", build, r.add_rms_norm, (4 * b + 1) * HIDDEN * BF16, 0, 24, True))
        build = lambda b=b: (rand(b, HIDDEN), rand(HIDDEN), 1e-5)  # noqa: E731
        found.append(("rms_norm", f"batch {b}", build, r.rms_norm, (2 * b + 1) * HIDDEN * BF16, 0, 24, True))
    for n in (2, 4, 8):  # tokens of one sequence, read again behind a settled state
        build = lambda n=n: (rand(1, HEADS, HEAD_DIM, STATE, dtype=torch.float32), *scan_inputs(n))  # noqa: E731
        moved = HEADS * HEAD_DIM * STATE * F32 + n * (2 * HEADS * HEAD_DIM + 2 * GROUPS * STATE) * BF16
        found.append(("selective_state_replay", f"{n}", build, r.selective_state_replay, moved, 0, 24, True))
        build = lambda n=n: (rand(1, CHANNELS, 4), rand(1, n, CHANNELS), rand(CHANNELS, 4), rand(CHANNELS))  # noqa: E731
        moved = (9 + 2 * n) * CHANNELS * BF16
        found.append(("causal_conv1d_replay", f"{n}", build, r.causal_conv1d_replay, moved, 0, 24, True))
    for b, slots, dtype in (
        (1, 8192, "bf16"),
        (8, 8192, "bf16"),
        (1, 131072, "bf16"),
        (1, 8192, "fp8"),
        (1, 131072, "fp8"),
    ):
        narrow = torch.float8_e4m3fn if dtype == "fp8" else torch.bfloat16
        build = lambda b=b, slots=slots, narrow=narrow: (  # noqa: E731
            rand(b, 32, 1, 128),
            *(rand(b, 2, slots, 128).to(narrow) for _ in range(2)),
            torch.full((b, 1), slots - 1, device="cuda"),
            torch.ones(b, slots, dtype=torch.bool, device="cuda"),
            128**-0.5,
            *(torch.ones((), device="cuda") for _ in range(2 * (narrow != torch.bfloat16))),
        )
        moved, flops = 2 * b * 2 * slots * 128 * narrow.itemsize, 4 * b * 32 * slots * 128
        found.append(("decode_attention", f"{b} x {slots} {dtype}", build, r.decode_attention, moved, flops, 12, True))
    for n in (1, 4, 8):  # tokens of one sequence, and with them the drafts of a round
        build = lambda n=n: (rand(1, n, VOCAB), torch.zeros(1, n, dtype=torch.int64, device="cuda"))  # noqa: E731
        found.append(("likeliest", f"{n}", build, r.likeliest, n * VOCAB * BF16, 0, 24, True))
        shapes = (1, n), (1, n), 16, 1, 1, 1, (1, 8), 1
        build = lambda shapes=shapes: [torch.zeros(s, dtype=torch.int64, device="cuda") for s in shapes]  # noqa: E731
        found.append(("keep_drafts", f"{n}", build, r.keep_drafts, 0, 0, 24, True))
    for n in (1, 4, 16, 64):
        for which, out, width in (
            ("in", 2 * HEADS * HEAD_DIM + 2 * GROUPS * STATE + HEADS, HIDDEN),
            ("out", HIDDEN, 8192),
        ):
            build = lambda n=n, out=out, width=width: (rand(n, width), rand(out, width))  # noqa: E731
            moved, flops = (out * width + n * (out + width)) * BF16, 2 * n * out * width
            found.append(
                ("small_batch_linear", f"{n}, {which}_proj", build, r.small_batch_linear, moved, flops, 6, True)
            )
    n = 4096
    build = lambda: (rand(n, HIDDEN), rand(VOCAB, HIDDEN), torch.randint(VOCAB, (n,), device="cuda"))  # noqa: E731
    # The logits and the two products of the gradients; bytes are small beside them.
    found.append(
        (
            "linear_cross_entropy",
            f"{n} fwd+bwd",
            build,
            with_backward(r.linear_cross_entropy),
            3 * VOCAB * HIDDEN * BF16,
            6 * n * VOCAB * HIDDEN,
            1,
            False,
        )
    )
    build = lambda: (rand(n, 2 * INNER),)  # noqa: E731
    found.append(
        ("relu_squared", f"{n} fwd+bwd", build, with_backward(r.relu_squared), 10 * n * INNER * BF16, 0, 6, False)
    )
    moved = n * (4 * HEADS * HEAD_DIM + 6 * GROUPS * STATE) * BF16
    flops = 3 * 2 * n * HEADS * (64 * STATE + 64 * HEAD_DIM + 2 * HEAD_DIM * STATE)
    found.append(
        (
            "ssd_chunk_scan",
            f"{n} fwd+bwd",
            lambda: scan_inputs(n),
            with_backward(r.ssd_chunk_scan),
            moved,
            flops,
            1,
            False,
        )
    )
    build = lambda: (rand(1, n, CHANNELS), rand(CHANNELS, 4), rand(CHANNELS))  # noqa: E731
    found.append(
        ("causal_conv1d", f"{n} fwd+bwd", build, with_backward(r.causal_conv1d), 5 * n * CHANNELS * BF16, 0, 3, False)
    )
    build = lambda: (rand(n, 8192), rand(n, 8192), rand(8192), 1e-5, 1024)  # noqa: E731
    found.append(
        ("gated_rms_norm", f"{n} fwd+bwd", build, with_backward(r.gated_rms_norm), 8 * n * 8192 * BF16, 0, 3, False)
    )
    build = lambda: (rand(n, LATENT), *routed(n), up, down)  # noqa: E731
    moved, flops = 4 * EXPERTS * INNER * LATENT * BF16, 12 * n * TOP_K * INNER * LATENT
    found.append(("moe_experts", f"{n} fwd+bwd", build, with_backward(r.moe_experts), moved, flops, 1, False))
    return found + packed_cases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=None, help="names of ops, with commas between them")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, rate = limits()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    print(f"{'op':<24}{'tokens':<16}{'ms':>9}{'torch ms':>10}{'GB':>8}{'TFLOP':>8}{'share of limit':>16}")
    rows = []
    for name, what, build, call, moved, flops, copies, graph in cases():
        if options.only and name not in options.only.split(","):
            continue
        backward = "bwd" in what
        work = rotating(build, call, copies)
        times = {}
        with torch.set_grad_enabled(backward):
            for source in ("auto", "torch"):
                with use_kernels(source):
                    try:
                        # References of experts and of NVFP4 need the host in between: no graph can hold that.
                        waits = source == "torch" and ("experts" in name or name.startswith("nvfp4"))
                        times[source] = milliseconds(work, graph and not waits)
                    except Exception as error:
                        times[source] = float("nan")
                        print(f"{name} {what} {source}: {type(error).__name__}: {str(error)[:150]}")
        limit = max(moved / bandwidth, flops / rate) * 1e3
        row = {
            "op": name, "tokens": what, "ms": times["auto"], "torch_ms": times["torch"], "GB": moved / 1e9,
            "TFLOP": flops / 1e12, "share_of_limit": limit / times["auto"],
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:<24}{what:<16}{row['ms']:9.4f}{row['torch_ms']:10.4f}{row['GB']:8.3f}{row['TFLOP']:8.3f}"
            f"{row['share_of_limit']:15.0%}",
            flush=True,
        )
        del work
    if options.save:
        record = {
            "date": datetime.date.today().isoformat(),
            "hardware": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "command": "python tests/benchmarks/kernels.py --save",
            "copy_TB_s": bandwidth / 1e12,
            "product_TFLOP_s": rate / 1e12,
            "rows": [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
