"""The memory-bound kernels of this repository against the bandwidth of a copy, and the scan's time.

python benchmarks/benchmark.py
"""

from pathlib import Path

import torch
import triton
from kernels import get_local_kernel


def main() -> None:
    ops = get_local_kernel(Path(__file__).parents[1])
    n = 8192

    def rand(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device="cuda").to(dtype)

    def time(work):
        return triton.testing.do_bench(work, return_mode="median")

    big = rand(1 << 29)
    bandwidth = 2 * big.numel() * 2 / time(lambda: torch.empty_like(big).copy_(big))
    y, z, x = rand(n, 8192), rand(n, 8192), rand(1, n, 10240)
    weight, taps, bias = rand(8192), rand(10240, 4), rand(10240)
    heads, B, C = rand(1, n, 128, 64), rand(1, n, 8, 128), rand(1, n, 8, 128)
    dt = torch.rand(1, n, 128, device="cuda") * 0.1
    A, D = -torch.ones(128, device="cuda"), torch.ones(128, device="cuda")
    query, slots = rand(1, 32, 1, 128), rand(2, 1, 2, 1 << 18, 128)
    last = torch.full((1, 1), (1 << 18) - 1, device="cuda")
    with torch.no_grad():
        for name, work, moved in (
            ("gated_rms_norm", lambda: ops.gated_rms_norm(y, z, weight, 1e-5, 1024), 6 * y.numel()),
            ("causal_conv1d", lambda: ops.causal_conv1d(x, taps, bias), 4 * x.numel()),
            ("ssd_chunk_scan", lambda: ops.ssd_chunk_scan(heads, dt, A, B, C, D), 4 * heads.numel() + 4 * B.numel()),
            ("decode_attention", lambda: ops.decode_attention(query, *slots, last, None, 0.1), 2 * slots.numel()),
        ):
            ms = time(work)
            print(f"{name:<16}{ms:8.3f} ms  {moved / ms / bandwidth:5.0%} of the bandwidth of a copy")


if __name__ == "__main__":
    main()
