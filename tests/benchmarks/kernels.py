"""Every op at the shapes of a released model: time, bytes or FLOPs, and the share of what the GPU can do.

    python tests/benchmarks/kernels.py [--only rms_norm,fp8_linear] [--save]              Nemotron 3 Super
    python tests/benchmarks/kernels.py --model nano --without-reference [--save]          or ultra; the kernels alone

Installed packages that have a kernel for an op (mamba-ssm, causal-conv1d, Liger) are timed beside ours.

The limit of an op is the larger of its bytes over the bandwidth of a large copy and its FLOPs over the rate of a large
product, both measured first, in the same run. Inputs rotate, so that none is found in the cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable

import torch
import triton
from against_transformers import results_file
from nemotron_super import NemotronHConfig, preset
from nemotron_super.kernels_hub import conventions, registry
from nemotron_super.kernels_hub.registry import use_kernels

BF16, F32 = 2, 4


class Widths:
    """A model's, by the letters of its configuration."""

    def __init__(self, config: NemotronHConfig):
        self.heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.state, self.groups = config.ssm_state_size, config.n_groups
        self.hidden, self.vocab = config.hidden_size, config.vocab_size
        self.latent = config.moe_latent_size or config.hidden_size  # in which routed experts work
        self.inner, self.shared = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
        self.experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.queries, self.keys, self.head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.mamba = self.heads * self.head_dim
        self.channels = self.mamba + 2 * self.groups * self.state
        self.projected = self.mamba + self.channels + self.heads


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


def scan_inputs(w: Widths, length: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    dt = torch.nn.functional.softplus(rand(batch, length, w.heads, dtype=torch.float32) - 4)
    A, D = -16 * torch.rand(w.heads, device="cuda"), torch.ones(w.heads, device="cuda")
    B, C = (rand(batch, length, w.groups, w.state) for _ in range(2))
    return rand(batch, length, w.heads, w.head_dim), dt, A, B, C, D


def routed(w: Widths, tokens: int) -> tuple:
    return torch.rand(tokens, w.experts, device="cuda").topk(w.top_k).indices, torch.rand(
        tokens, w.top_k, device="cuda"
    )


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


def packed_cases(w: Widths) -> list[tuple]:
    """Weights in FP8 and NVFP4, as `cases`: the projections of the release's mix and its routed experts."""
    r, found = registry, []
    sizes = {
        "in_proj": (w.projected, w.hidden),
        "out_proj": (w.hidden, w.mamba),
        "up_proj": (w.shared, w.hidden),
        "down_proj": (w.hidden, w.shared),
    }
    for name, bits in (("fp8", 8), ("nvfp4", 4.5)):
        linear, experts = getattr(r, f"{name}_linear"), getattr(r, f"{name}_experts")
        for what, (rows, width) in sizes.items():
            for n in (1, 2, 4, 8, 32, 64, 8192):
                build = lambda n=n, name=name, rows=rows, width=width: (rand(n, width), *packed(name, rows, width))  # noqa: E731
                moved, flops = rows * width * bits / 8 + n * (rows + width) * BF16, 2 * n * rows * width
                found.append((f"{name}_linear", f"{n} {what}", build, linear, moved, flops, 8, n <= 64))
        up, down = packed(name, w.experts, w.inner, w.latent), packed(name, w.experts, w.latent, w.inner)
        for n in (1, 2, 4, 8, 16, 32, 64, 2048, 8192):
            build = lambda n=n, up=up, down=down: (rand(n, w.latent), *routed(w, n), up, down)  # noqa: E731
            touched = w.experts * (1 - (1 - w.top_k / w.experts) ** n)
            moved, flops = touched * 2 * w.inner * w.latent * bits / 8, 4 * n * w.top_k * w.inner * w.latent
            found.append((f"{name}_experts", f"{n}", build, experts, moved, flops, 6, n <= 64))
    return found


def cases(w: Widths) -> list[tuple]:
    """(op, what, build, call, bytes, FLOPs, copies, in a graph, forward and backward)."""
    r = registry
    found: list[tuple] = []
    build: Callable[[], tuple]
    for n in (128, 2048, 8192, 32768, 131072):
        moved = n * (2 * w.mamba + 2 * w.groups * w.state) * BF16 + n * w.heads * F32
        # The least a chunk of 64 takes: scores, their product with x, reading and writing the state.
        flops = 2 * n * w.heads * (64 * w.state + 64 * w.head_dim + 2 * w.head_dim * w.state)
        found.append(
            ("ssd_chunk_scan", f"{n}", lambda n=n: scan_inputs(w, n), r.ssd_chunk_scan, moved, flops, 2, False)
        )
        moved = 2 * n * w.channels * BF16
        build = lambda n=n: (rand(1, n, w.channels), rand(w.channels, 4), rand(w.channels))  # noqa: E731
        found.append(("causal_conv1d", f"{n}", build, r.causal_conv1d, moved, 0, 3, False))
        build = lambda n=n: (rand(n, w.mamba), rand(n, w.mamba), rand(w.mamba), 1e-5, w.mamba // w.groups)  # noqa: E731
        found.append(("gated_rms_norm", f"{n}", build, r.gated_rms_norm, 3 * n * w.mamba * BF16, 0, 3, False))
        build = lambda n=n: (rand(n, w.hidden), rand(w.hidden), 1e-5)  # noqa: E731
        found.append(("rms_norm", f"{n}", build, r.rms_norm, 2 * n * w.hidden * BF16, 0, 3, False))
        build = lambda n=n: (rand(n, w.hidden), rand(w.experts, w.hidden))  # noqa: E731
        moved, flops = n * w.hidden * BF16 + n * w.experts * F32, 2 * n * w.hidden * w.experts
        found.append(("router_logits", f"{n}", build, r.router_logits, moved, flops, 3, False))
        build = lambda n=n: (rand(n, w.experts, dtype=torch.float32), torch.zeros(w.experts, device="cuda"), w.top_k)  # noqa: E731
        found.append(
            ("topk_routing", f"{n}", build, r.topk_routing, n * (w.experts * F32 + w.top_k * 12), 0, 3, False)
        )
    bias = torch.zeros(w.experts, device="cuda")
    for n in (1, 8, 64):
        rows = (n, w.experts, w.latent)
        build = lambda rows=rows: (*(rand(r, w.hidden) for r in rows[:2]), bias, rand(rows[2], w.hidden), w.top_k)  # noqa: E731
        moved, flops = (w.experts + w.latent) * w.hidden * BF16, 2 * n * w.hidden * (w.experts + w.latent)
        found.append(("route_few_tokens", f"{n}", build, r.route_few_tokens, moved, flops, 12, True))
    up, down = rand(w.experts, w.inner, w.latent), rand(w.experts, w.latent, w.inner)
    for n in (1, 2, 4, 8, 16, 64, 2048, 8192):
        build = lambda n=n: (rand(n, w.latent), *routed(w, n), up, down)  # noqa: E731
        touched = w.experts * (1 - (1 - w.top_k / w.experts) ** n)
        moved, flops = touched * 2 * w.inner * w.latent * BF16, 4 * n * w.top_k * w.inner * w.latent
        found.append(("moe_experts", f"{n}", build, r.moe_experts, moved, flops, 6, n <= 16))
    for b in (1, 8, 64):
        build = lambda b=b: (  # noqa: E731
            rand(b, w.heads, w.head_dim, w.state, dtype=torch.float32),
            *(t[:, 0] if t.dim() > 2 else t for t in scan_inputs(w, 1, b)),
        )
        moved = 2 * b * w.mamba * w.state * F32
        found.append(("selective_state_update", f"batch {b}", build, r.selective_state_update, moved, 0, 24, True))
        build = lambda b=b: (rand(b, w.channels, 4), rand(b, w.channels), rand(w.channels, 4), rand(w.channels))  # noqa: E731
        moved = (10 * b + 5) * w.channels * BF16
        found.append(("causal_conv1d_update", f"batch {b}", build, r.causal_conv1d_update, moved, 0, 24, True))
        build = lambda b=b: (rand(b, w.hidden), rand(b, w.hidden), rand(w.hidden), 1e-5)  # noqa: E731
        found.append(("add_rms_norm", f"batch {b}", build, r.add_rms_norm, (4 * b + 1) * w.hidden * BF16, 0, 24, True))
        build = lambda b=b: (rand(b, w.hidden), rand(w.hidden), 1e-5)  # noqa: E731
        found.append(("rms_norm", f"batch {b}", build, r.rms_norm, (2 * b + 1) * w.hidden * BF16, 0, 24, True))
    for n in (2, 4, 8):  # tokens of one sequence, read again behind a settled state
        build = lambda n=n: (rand(1, w.heads, w.head_dim, w.state, dtype=torch.float32), *scan_inputs(w, n))  # noqa: E731
        moved = w.mamba * w.state * F32 + n * (2 * w.mamba + 2 * w.groups * w.state) * BF16
        found.append(("selective_state_replay", f"{n}", build, r.selective_state_replay, moved, 0, 24, True))
        build = lambda n=n: (rand(1, w.channels, 4), rand(1, n, w.channels), rand(w.channels, 4), rand(w.channels))  # noqa: E731
        moved = (9 + 2 * n) * w.channels * BF16
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
            rand(b, w.queries, 1, w.head),
            *(rand(b, w.keys, slots, w.head).to(narrow) for _ in range(2)),
            torch.full((b, 1), slots - 1, device="cuda"),
            torch.ones(b, slots, dtype=torch.bool, device="cuda"),
            w.head**-0.5,
            *(torch.ones((), device="cuda") for _ in range(2 * (narrow != torch.bfloat16))),
        )
        moved, flops = 2 * b * w.keys * slots * w.head * narrow.itemsize, 4 * b * w.queries * slots * w.head
        found.append(("decode_attention", f"{b} x {slots} {dtype}", build, r.decode_attention, moved, flops, 12, True))
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        build = lambda dtype=dtype: (  # noqa: E731
            *(rand(1, w.keys, 8192, w.head).to(dtype) for _ in range(2)),
            *(rand(1, w.keys, 1, w.head) for _ in range(2)),
            torch.full((1, 1), 77, device="cuda"),
            *(torch.ones((), device="cuda") for _ in range(2 * (dtype != torch.bfloat16))),
        )
        found.append(
            ("fill_slots", f"1 {str(dtype)[6:]}", build, r.fill_slots, 4 * w.keys * w.head * BF16, 0, 12, True)
        )
    for n in (1, 4, 8):  # tokens of one sequence, and with them the drafts of a round
        build = lambda n=n: (rand(1, n, w.vocab), torch.zeros(1, n, dtype=torch.int64, device="cuda"))  # noqa: E731
        found.append(("likeliest", f"{n}", build, r.likeliest, n * w.vocab * BF16, 0, 24, True))
        shapes = (1, n), (1, n), 16, 1, 1, 1, (1, 8), 1
        build = lambda shapes=shapes: [torch.zeros(s, dtype=torch.int64, device="cuda") for s in shapes]  # noqa: E731
        found.append(("keep_drafts", f"{n}", build, r.keep_drafts, 0, 0, 24, True))
    for n in (1, 4, 16, 64):
        for which, out, width in (
            ("in", w.projected, w.hidden),
            ("out", w.hidden, w.mamba),
        ):
            build = lambda n=n, out=out, width=width: (rand(n, width), rand(out, width))  # noqa: E731
            moved, flops = (out * width + n * (out + width)) * BF16, 2 * n * out * width
            found.append(
                ("small_batch_linear", f"{n}, {which}_proj", build, r.small_batch_linear, moved, flops, 6, True)
            )
    widths = [heads * w.head for heads in (w.queries, w.keys, w.keys)]
    for n in (1, 4, 16, 64):
        build = lambda n=n: (rand(n, w.hidden), [rand(out, w.hidden) for out in widths])  # noqa: E731
        moved, flops = (sum(widths) * w.hidden + n * (sum(widths) + w.hidden)) * BF16, 2 * n * sum(widths) * w.hidden
        found.append(("joint_linear", f"{n}, q, k and v", build, r.joint_linear, moved, flops, 12, True))
    n = 4096
    build = lambda: (rand(n, w.hidden), rand(w.vocab, w.hidden), torch.randint(w.vocab, (n,), device="cuda"))  # noqa: E731
    # The logits and the two products of the gradients; bytes are small beside them.
    found.append(
        (
            "linear_cross_entropy",
            f"{n} fwd+bwd",
            build,
            with_backward(r.linear_cross_entropy),
            3 * w.vocab * w.hidden * BF16,
            6 * n * w.vocab * w.hidden,
            1,
            False,
        )
    )
    build = lambda: (rand(n, w.shared),)  # noqa: E731
    found.append(
        ("relu_squared", f"{n} fwd+bwd", build, with_backward(r.relu_squared), 5 * n * w.shared * BF16, 0, 6, False)
    )
    moved = n * (4 * w.mamba + 6 * w.groups * w.state) * BF16
    flops = 3 * 2 * n * w.heads * (64 * w.state + 64 * w.head_dim + 2 * w.head_dim * w.state)
    found.append(
        (
            "ssd_chunk_scan",
            f"{n} fwd+bwd",
            lambda: scan_inputs(w, n),
            with_backward(r.ssd_chunk_scan),
            moved,
            flops,
            1,
            False,
        )
    )
    build = lambda: (rand(1, n, w.channels), rand(w.channels, 4), rand(w.channels))  # noqa: E731
    found.append(
        (
            "causal_conv1d",
            f"{n} fwd+bwd",
            build,
            with_backward(r.causal_conv1d),
            5 * n * w.channels * BF16,
            0,
            3,
            False,
        )
    )
    build = lambda: (rand(n, w.mamba), rand(n, w.mamba), rand(w.mamba), 1e-5, w.mamba // w.groups)  # noqa: E731
    found.append(
        ("gated_rms_norm", f"{n} fwd+bwd", build, with_backward(r.gated_rms_norm), 8 * n * w.mamba * BF16, 0, 3, False)
    )
    build = lambda: (rand(n, w.latent), *routed(w, n), up, down)  # noqa: E731
    moved, flops = 4 * w.experts * w.inner * w.latent * BF16, 12 * n * w.top_k * w.inner * w.latent
    found.append(("moe_experts", f"{n} fwd+bwd", build, with_backward(r.moe_experts), moved, flops, 1, False))
    return found + packed_cases(w)


def liger_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross entropy, summed as ours."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]


def sources(name: str, without_reference: bool) -> list[str]:
    """What an op is timed with: what serves it, the reference, and a package's kernel where there is one."""
    found = ["auto"] if without_reference else ["auto", "torch"]
    package = conventions.PACKAGES.get(name)
    wanted = "liger_kernel" if name == "linear_cross_entropy" else package and package.package
    return [*found, "package"] if conventions.INSTALLED.get(wanted) else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=None, help="names of ops, with commas between them")
    parser.add_argument("--model", default="super", help="whose widths: a preset")
    parser.add_argument("--without-reference", action="store_true", help="do not time the torch reference")
    parser.add_argument("--save", action="store_true", help="write the run to results/")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, rate = limits()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    print(
        f"{'op':<24}{'tokens':<16}{'ms':>9}{'torch ms':>10}{'package ms':>12}{'GB':>8}{'TFLOP':>8}{'share of limit':>16}"
    )
    rows = []
    for name, what, build, call, moved, flops, copies, graph in cases(Widths(preset(options.model))):
        if options.only and name not in options.only.split(","):
            continue
        backward = "bwd" in what
        times = dict.fromkeys(("torch", "package"), float("nan"))
        with torch.set_grad_enabled(backward):
            for source in sources(name, options.without_reference):
                loss = name == "linear_cross_entropy" and source == "package"
                work = rotating(build, with_backward(liger_cross_entropy) if loss else call, copies)
                forced = {name: source} if source == "package" and not loss else {}
                with use_kernels("torch" if source == "torch" else "auto", **forced):
                    try:
                        # References of experts and of NVFP4 need the host in between: no graph can hold that.
                        waits = source == "torch" and ("experts" in name or name.startswith("nvfp4"))
                        times[source] = milliseconds(work, graph and not waits)
                    except Exception as error:
                        times[source] = float("nan")
                        print(f"{name} {what} {source}: {type(error).__name__}: {str(error)[:150]}")
        limit = max(moved / bandwidth, flops / rate) * 1e3
        row = {
            "op": name, "tokens": what, "ms": times["auto"], "torch_ms": times["torch"], "package_ms": times["package"],
            "GB": moved / 1e9, "TFLOP": flops / 1e12, "share_of_limit": limit / times["auto"],
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:<24}{what:<16}{row['ms']:9.4f}{row['torch_ms']:10.4f}{row['package_ms']:12.4f}{row['GB']:8.3f}{row['TFLOP']:8.3f}"
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
            "command": "python tests/benchmarks/kernels.py " + " ".join(sys.argv[1:]),
            "model": options.model,
            "copy_TB_s": bandwidth / 1e12,
            "product_TFLOP_s": rate / 1e12,
            "rows": [
                {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items() if v == v} for row in rows
            ],
        }
        results_file(f"kernels_{options.model}", "cuda").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
