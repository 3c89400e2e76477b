"""What writes a few tokens with Nemotron 3 Super behind 131,072 others, each function beside plain torch.

    kernels benchmark ./nemotron-h-kernels        (pip install "kernels[benchmark]"; a GPU of 40 GB)

Numbers are scaled as in `benchmark_sequence.py`. What works in place is verified on its first call.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class Decoding(Benchmark):
    seed = 0
    batch, drafts, slots, hidden, vocab = 8, 3, 131072, 4096, 131072
    heads, head_dim, groups, state_size, taps = 128, 64, 8, 128, 4
    query_heads, kv_heads, width, inner = 32, 2, 128, 18560
    experts, top_k, latent, intermediate = 512, 22, 1024, 2688

    def rand(self, *shape, scale=0.2, dtype=torch.bfloat16):
        return torch.randn(shape, device=self.device).clamp_(-3, 3).mul_(scale).to(dtype)

    # Mamba-2

    def setup_state_replay(self):
        tokens = 1 + self.drafts
        self.x = self.rand(self.batch, tokens, self.heads, self.head_dim)
        self.B, self.C = (self.rand(self.batch, tokens, self.groups, self.state_size, scale=0.3) for _ in "BC")
        self.dt = 0.1 * torch.rand(self.batch, tokens, self.heads, device=self.device)
        self.A = -torch.ones(self.heads, device=self.device)
        self.D = 0.1 * torch.ones(self.heads, device=self.device)
        self.state = self.rand(self.batch, self.heads, self.head_dim, self.state_size, scale=0.1, dtype=torch.float32)
        self.before = self.state.clone()

    def benchmark_state_replay(self):
        self.out = self.kernel.selective_state_replay(self.state, self.x, self.dt, self.A, self.B, self.C, self.D)

    def verify_state_replay(self):
        return torch.stack(self.steps(1 + self.drafts), 1)

    def setup_state_update(self):
        self.setup_state_replay()

    def benchmark_state_update(self):
        x, dt, B, C = (t[:, 0] for t in (self.x, self.dt, self.B, self.C))
        self.out = self.kernel.selective_state_update(self.state, x, dt, self.A, B, C, self.D)

    def verify_state_update(self):
        return self.steps(1)[0]

    def steps(self, count):
        """The recurrence, one token after another, from the state before."""
        state, outputs = self.before, []
        for t in range(count):
            x, dt, B, C = (part[:, t].float() for part in (self.x, self.dt, self.B, self.C))
            B, C = (part.repeat_interleave(self.heads // self.groups, 1) for part in (B, C))
            state = state * (dt * self.A).exp()[..., None, None] + (dt[..., None] * x)[..., None] * B[:, :, None]
            outputs.append(((state * C[:, :, None]).sum(-1) + self.D[:, None] * x).to(self.x.dtype))
        return outputs

    def setup_convolution_replay(self):
        channels = self.heads * self.head_dim + 2 * self.groups * self.state_size
        self.x = self.rand(self.batch, 1 + self.drafts, channels)
        self.weight, self.bias = self.rand(channels, self.taps, scale=0.3), self.rand(channels, scale=0.1)
        self.window = self.rand(self.batch, channels, self.taps)
        self.before = self.window.clone()

    def benchmark_convolution_replay(self):
        self.out = self.kernel.causal_conv1d_replay(self.window, self.x, self.weight, self.bias)

    def verify_convolution_replay(self):
        inputs = torch.cat([self.before[..., 1:], self.x.mT], -1)
        return F.silu(F.conv1d(inputs, self.weight[:, None], self.bias, groups=len(self.bias))).mT

    def setup_convolution_update(self):
        self.setup_convolution_replay()
        self.x = self.x[:, :1]

    def benchmark_convolution_update(self):
        self.out = self.kernel.causal_conv1d_update(self.window, self.x[:, 0], self.weight, self.bias)

    def verify_convolution_update(self):
        return self.verify_convolution_replay()[:, 0]

    # Attention

    def setup_attention(self):
        # Long queries look at few keys: the mean of all values would be almost nothing.
        self.query = self.rand(1, self.query_heads, 1, self.width, scale=4)
        self.key = self.rand(1, self.kv_heads, self.slots, self.width, scale=1)
        self.value = self.rand(1, self.kv_heads, self.slots, self.width, scale=0.4)
        self.last = torch.full((1, 1), self.slots - 1, device=self.device)

    def benchmark_attention(self):
        scaling = self.width**-0.5
        self.out = self.kernel.decode_attention(self.query, self.key, self.value, self.last, None, scaling)

    def verify_attention(self):
        return F.scaled_dot_product_attention(self.query, self.key, self.value, enable_gqa=True).transpose(1, 2)

    def setup_slots(self):
        shape = self.batch, self.kv_heads, 1024, self.width
        self.keys, self.values = self.rand(*shape), self.rand(*shape)
        self.new = self.rand(self.batch, self.kv_heads, 1 + self.drafts, self.width)
        self.index = torch.arange(1 + self.drafts, device=self.device).expand(self.batch, -1) + 500
        self.before = self.keys.clone()

    def benchmark_slots(self):
        self.kernel.fill_slots(self.keys, self.values, self.new, self.new, self.index)
        self.out = self.keys

    def verify_slots(self):
        place = self.index[:, None, :, None].expand_as(self.new)
        return self.before.scatter(2, place, self.new)

    # Linear maps and experts

    def setup_linear(self):
        self.x = self.rand(self.batch, self.hidden, scale=1)
        self.weight = self.rand(
            self.inner, self.hidden, scale=0.2 * self.hidden**-0.5
        )  # the input projection of Mamba-2

    def benchmark_linear(self):
        self.out = self.kernel.small_batch_linear(self.x, self.weight)

    def verify_linear(self):
        return F.linear(self.x, self.weight)

    def setup_joint_linear(self):
        self.x = self.rand(self.batch, self.hidden, scale=1)
        heads = self.query_heads, self.kv_heads, self.kv_heads
        self.parts = [self.rand(n * self.width, self.hidden, scale=0.2 * self.hidden**-0.5) for n in heads]

    def benchmark_joint_linear(self):
        self.out = self.kernel.joint_linear(self.x, self.parts)

    def verify_joint_linear(self):
        return torch.cat([F.linear(self.x, part) for part in self.parts], -1)

    def setup_routing(self):
        self.x = self.rand(self.batch, self.hidden, scale=1)
        scale = self.hidden**-0.5
        self.weight = self.rand(self.experts, self.hidden, scale=scale)
        self.bias = torch.zeros(self.experts, device=self.device)
        self.narrowing = self.rand(self.latent, self.hidden, scale=0.2 * scale)

    def benchmark_routing(self):
        args = self.x, self.weight, self.bias, self.narrowing, self.top_k, True, 5.0
        _, weights, _, narrow = self.kernel.route_few_tokens(*args)
        self.out = torch.cat([weights, narrow], -1)

    def verify_routing(self):
        scores = F.linear(self.x.float(), self.weight.float()).sigmoid()
        chosen = scores.gather(1, (scores + self.bias).topk(self.top_k).indices)
        weights = 5.0 * chosen / chosen.sum(-1, keepdim=True)
        return torch.cat([weights, F.linear(self.x, self.narrowing)], -1)

    def setup_experts(self):
        self.x = self.rand(self.batch, self.latent, scale=0.7)
        self.up = self.rand(self.experts, self.intermediate, self.latent, scale=self.latent**-0.5)
        self.down = self.rand(self.experts, self.latent, self.intermediate, scale=self.intermediate**-0.5)
        self.index = torch.rand(self.batch, self.experts, device=self.device).topk(self.top_k).indices
        self.weights = torch.rand(self.batch, self.top_k, device=self.device) / self.top_k

    @torch.no_grad()
    def benchmark_experts(self):
        self.out = self.kernel.moe_experts(self.x, self.index, self.weights, self.up, self.down)

    def verify_experts(self):
        """One token after another, each by the experts that it chose."""
        rows = []
        for x, index, weights in zip(self.x, self.index, self.weights, strict=True):
            inner = F.relu(torch.einsum("kiw,w->ki", self.up[index], x)).square()
            rows.append(weights @ torch.einsum("kwi,ki->kw", self.down[index], inner).float())
        return torch.stack(rows).to(self.x.dtype)

    # Choosing tokens

    def setup_likeliest(self):
        self.logits = self.rand(self.batch, self.vocab, scale=1, dtype=torch.float32)
        self.out = torch.empty(self.batch, dtype=torch.long, device=self.device)

    def benchmark_likeliest(self):
        self.kernel.likeliest(self.logits, self.out)

    def verify_likeliest(self):
        return self.logits.argmax(-1)

    def setup_keep_drafts(self):
        count = 1 + self.drafts
        self.tokens = torch.randint(2, (self.batch, count), device=self.device)
        self.own = torch.randint(2, (self.batch, count), device=self.device)
        self.drafted = self.tokens[:, 1:].clone()
        self.stops = torch.full((16,), -1, device=self.device)
        self.room = torch.full((self.batch,), 1 << 40, device=self.device)
        self.kept, self.newest, self.out = (torch.zeros_like(self.room) for _ in range(3))
        self.positions = torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)

    def benchmark_keep_drafts(self):
        counts = self.kept, self.newest, self.positions, self.out
        self.kernel.keep_drafts(self.tokens, self.own, self.stops, self.room, *counts)

    def verify_keep_drafts(self):
        return (self.drafted == self.own[:, :-1]).long().cumprod(1).sum(1)
