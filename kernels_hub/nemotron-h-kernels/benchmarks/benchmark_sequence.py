"""What reads a prompt of Nemotron 3 Super, each function beside plain torch.

    kernels benchmark ./nemotron-h-kernels        (pip install "kernels[benchmark]"; a GPU of 40 GB)

Numbers are scaled, and have no long tails, so that results are about 0.2 and none is above 2: the runner compares them with an
absolute tolerance of 0.01, and there bfloat16 has steps of at most 0.008.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class Sequence(Benchmark):
    seed = 0
    tokens, hidden, vocab = 8192, 4096, 131072
    heads, head_dim, groups, state_size, taps = 128, 64, 8, 128, 4
    experts, top_k, latent, intermediate = 512, 22, 1024, 2688

    def rand(self, *shape, scale=0.2, dtype=torch.bfloat16):
        return torch.randn(shape, device=self.device).clamp_(-3, 3).mul_(scale).to(dtype)

    # Mamba-2

    def setup_scan(self):
        shape = 1, self.tokens
        self.x = self.rand(*shape, self.heads, self.head_dim, scale=1)
        self.B, self.C = (self.rand(*shape, self.groups, self.state_size, scale=0.3) for _ in "BC")
        self.dt = 0.1 * torch.rand(*shape, self.heads, device=self.device)
        self.A = -torch.ones(self.heads, device=self.device)
        self.D = 0.1 * torch.ones(self.heads, device=self.device)

    def benchmark_scan(self):
        self.out, _ = self.kernel.ssd_chunk_scan(self.x, self.dt, self.A, self.B, self.C, self.D)

    def verify_scan(self):
        """Chunk by chunk, in float32: within a chunk all pairs of positions, between chunks the state."""
        state = torch.zeros(1, self.heads, self.head_dim, self.state_size, device=self.device)
        outputs = []
        parts = (t.float().split(128, 1) for t in (self.x, self.dt, self.B, self.C))
        for x, dt, B, C in zip(*parts, strict=True):
            B, C = (t.repeat_interleave(self.heads // self.groups, 2) for t in (B, C))
            passed = (dt * self.A).cumsum(1)
            apart = (passed[:, :, None] - passed[:, None]).permute(0, 3, 1, 2)
            mixed = torch.einsum("bthn,bshn->bhts", C, B) * apart.tril().exp().tril() * dt.mT[:, :, None]
            y = torch.einsum("bhts,bshp->bthp", mixed, x)
            y += torch.einsum("bthn,bhpn->bthp", C, state) * passed.exp()[..., None]
            left = (dt * (passed[:, -1:] - passed).exp())[..., None] * x
            state = state * passed[:, -1].exp()[..., None, None] + torch.einsum("bshn,bshp->bhpn", B, left)
            outputs.append(y + self.D[:, None] * x)
        return torch.cat(outputs, 1).to(self.x.dtype)

    def setup_time_steps(self):
        self.dt = self.rand(1, self.tokens, self.heads)
        self.bias, self.A_log = (self.rand(self.heads, dtype=torch.float32) for _ in "bA")

    def benchmark_time_steps(self):
        self.out, _ = self.kernel.step_and_decay(self.dt, self.bias, self.A_log)

    def verify_time_steps(self):
        return F.softplus(self.dt.float() + self.bias)

    def setup_convolution(self):
        channels = self.heads * self.head_dim + 2 * self.groups * self.state_size
        self.x = self.rand(1, self.tokens, channels)
        self.weight, self.bias = self.rand(channels, self.taps, scale=0.3), self.rand(channels, scale=0.1)

    def benchmark_convolution(self):
        self.out = self.kernel.causal_conv1d(self.x, self.weight, self.bias)

    def verify_convolution(self):
        padded = F.pad(self.x.mT, (self.taps - 1, 0))
        return F.silu(F.conv1d(padded, self.weight[:, None], self.bias, groups=len(self.bias))).mT

    # Norms and activations

    def setup_norm(self):
        self.x, self.weight = self.rand(self.tokens, self.hidden), self.rand(self.hidden)

    def benchmark_norm(self):
        self.out = self.kernel.rms_norm(self.x, self.weight, 1e-5)

    def verify_norm(self):
        return F.rms_norm(self.x, self.weight.shape, self.weight, 1e-5)

    def setup_residual_and_norm(self):
        self.setup_norm()
        self.residual = self.rand(self.tokens, self.hidden)

    def benchmark_residual_and_norm(self):
        self.out, _ = self.kernel.add_rms_norm(self.x, self.residual, self.weight, 1e-5)

    def verify_residual_and_norm(self):
        return F.rms_norm(self.x + self.residual, self.weight.shape, self.weight, 1e-5)

    def setup_gated_norm(self):
        inner = self.heads * self.head_dim
        self.x, self.gate = self.rand(self.tokens, inner, scale=1), self.rand(self.tokens, inner, scale=1)
        self.weight, self.group = self.rand(inner, scale=0.03), inner // self.groups

    def benchmark_gated_norm(self):
        self.out = self.kernel.gated_rms_norm(self.x, self.gate, self.weight, 1e-5, self.group)

    def verify_gated_norm(self):
        gated = (self.x.float() * F.silu(self.gate.float())).unflatten(1, (-1, self.group))
        return (F.rms_norm(gated, (self.group,), eps=1e-5).flatten(1) * self.weight).to(self.x.dtype)

    def setup_relu_squared(self):
        self.x = self.rand(self.tokens, 2 * self.intermediate)

    def benchmark_relu_squared(self):
        self.out = self.kernel.relu_squared(self.x)

    def verify_relu_squared(self):
        return F.relu(self.x).square()

    # Mixture of experts

    def setup_router(self):
        self.x = self.rand(self.tokens, self.hidden, scale=1)
        self.weight = self.rand(self.experts, self.hidden, scale=0.2 * self.hidden**-0.5)

    def benchmark_router(self):
        self.out = self.kernel.router_logits(self.x, self.weight)

    def verify_router(self):
        return F.linear(self.x.float(), self.weight.float())

    def setup_routing(self):
        self.logits = self.rand(self.tokens, self.experts, scale=1, dtype=torch.float32)
        # The same for all: where two scores are equal but for rounding, either may be chosen.
        self.bias = torch.full((self.experts,), 0.1, device=self.device)

    def benchmark_routing(self):
        self.out, _ = self.kernel.topk_routing(self.logits, self.bias, self.top_k, True, 5.0)

    def verify_routing(self):
        scores = self.logits.sigmoid()
        chosen = scores.gather(1, (scores + self.bias).topk(self.top_k).indices)
        return 5.0 * chosen / chosen.sum(-1, keepdim=True)

    def setup_experts(self):
        self.x = self.rand(self.tokens, self.latent, scale=0.7)
        self.up = self.rand(self.experts, self.intermediate, self.latent, scale=self.latent**-0.5)
        self.down = self.rand(self.experts, self.latent, self.intermediate, scale=self.intermediate**-0.5)
        self.index = torch.rand(self.tokens, self.experts, device=self.device).topk(self.top_k).indices
        self.weights = torch.rand(self.tokens, self.top_k, device=self.device) / self.top_k

    @torch.no_grad()
    def benchmark_experts(self):
        self.out = self.kernel.moe_experts(self.x, self.index, self.weights, self.up, self.down)

    def verify_experts(self):
        """One expert after another, each on the tokens that chose it."""
        total = torch.zeros_like(self.x, dtype=torch.float32)
        for expert in range(self.experts):
            token, place = (self.index == expert).nonzero(as_tuple=True)
            y = F.linear(F.relu(F.linear(self.x[token], self.up[expert])).square(), self.down[expert])
            total.index_add_(0, token, y * self.weights[token, place, None])
        return total.to(self.x.dtype)

    # Training

    def setup_head_loss(self):
        tokens = self.tokens // 2
        self.x = self.rand(tokens, self.hidden, scale=0.5).requires_grad_()
        self.weight = self.rand(self.vocab, self.hidden, scale=self.hidden**-0.5).requires_grad_()
        self.targets = torch.randint(self.vocab, (tokens,), device=self.device)

    def benchmark_head_loss(self):
        loss, self.out = self.kernel.linear_cross_entropy(self.x, self.weight, self.targets)
        torch.autograd.grad(loss, (self.x, self.weight))

    def verify_head_loss(self):
        losses = F.cross_entropy(F.linear(self.x, self.weight).float(), self.targets, reduction="none")
        torch.autograd.grad(losses.sum(), (self.x, self.weight))
        return losses.detach()
