"""Weights of Nemotron 3 Super that stay packed, NVFP4 and FP8, each function beside plain torch, which unpacks them first.

    kernels benchmark ./nemotron-h-kernels        (pip install "kernels[benchmark]"; a GPU of 40 GB)

Numbers are scaled as in `benchmark_sequence.py`.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


class Packed(Benchmark):
    """One token."""

    seed = 0
    tokens, hidden, inner = 1, 4096, 18560
    experts, top_k, latent, intermediate = 512, 22, 1024, 2688

    def rand(self, *shape, scale=0.2, dtype=torch.bfloat16):
        return torch.randn(shape, device=self.device).clamp_(-3, 3).mul_(scale).to(dtype)

    def nvfp4(self, *shape):
        """Codes, scales of blocks of 16, and the scale of each matrix, which makes a product of the size of its factor."""
        *stack, rows, columns = shape
        codes = torch.randint(0, 256, (*stack, rows, columns // 2), dtype=torch.uint8, device=self.device)
        blocks = (0.5 + torch.rand(*stack, rows, columns // 16, device=self.device)).to(torch.float8_e4m3fn)
        return codes, blocks, torch.full(stack, 0.3 * columns**-0.5, device=self.device)

    def from_nvfp4(self, codes, blocks, scale):
        values = torch.tensor(E2M1, device=self.device)[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
        return (values * (blocks.float() * scale).repeat_interleave(16, -1)).bfloat16()

    def fp8(self, *shape):
        *stack, _, columns = shape
        scale = torch.full(stack, columns**-0.5, device=self.device)
        return self.rand(*shape, scale=1).to(torch.float8_e4m3fn), scale

    def from_fp8(self, weight, scale):
        return (weight.float() * scale).bfloat16()

    def setup_nvfp4_linear(self):
        self.x, self.weight = self.rand(self.tokens, self.hidden), self.nvfp4(self.inner, self.hidden)

    def benchmark_nvfp4_linear(self):
        self.out = self.kernel.nvfp4_linear(self.x, *self.weight)

    def verify_nvfp4_linear(self):
        return F.linear(self.x, self.from_nvfp4(*self.weight))

    def setup_fp8_linear(self):
        self.x, self.weight = self.rand(self.tokens, self.hidden), self.fp8(self.inner, self.hidden)

    def benchmark_fp8_linear(self):
        self.out = self.kernel.fp8_linear(self.x, *self.weight)

    def verify_fp8_linear(self):
        return F.linear(self.x, self.from_fp8(*self.weight))

    def setup_experts(self, pack):
        self.x = self.rand(self.tokens, self.latent, scale=0.7)
        self.up = pack(self.experts, self.intermediate, self.latent)
        self.down = pack(self.experts, self.latent, self.intermediate)
        self.index = torch.rand(self.tokens, self.experts, device=self.device).topk(self.top_k).indices
        self.weights = torch.rand(self.tokens, self.top_k, device=self.device) / self.top_k

    def verify_experts(self, unpack):
        """One expert after another, each on the tokens that chose it."""
        total = torch.zeros_like(self.x, dtype=torch.float32)
        for expert in self.index.unique().tolist():
            token, place = (self.index == expert).nonzero(as_tuple=True)
            up, down = (unpack(*(part[expert] for part in weight)) for weight in (self.up, self.down))
            y = F.linear(F.relu(F.linear(self.x[token], up)).square(), down)
            total.index_add_(0, token, y * self.weights[token, place, None])
        return total.to(self.x.dtype)

    def setup_nvfp4_experts(self):
        self.setup_experts(self.nvfp4)

    @torch.no_grad()
    def benchmark_nvfp4_experts(self):
        self.out = self.kernel.nvfp4_experts(self.x, self.index, self.weights, self.up, self.down)

    def verify_nvfp4_experts(self):
        return self.verify_experts(self.from_nvfp4)

    def setup_fp8_experts(self):
        self.setup_experts(self.fp8)

    @torch.no_grad()
    def benchmark_fp8_experts(self):
        self.out = self.kernel.fp8_experts(self.x, self.index, self.weights, self.up, self.down)

    def verify_fp8_experts(self):
        return self.verify_experts(self.from_fp8)
