"""A build of this repository, loaded by the `kernels` library, against plain formulas. Needs a GPU.

pytest tests/test_kernels.py
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

kernels = pytest.importorskip("kernels")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def ops():
    return kernels.get_local_kernel(Path(__file__).parents[1])


def close(found, expected, tolerance):
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def rand(*shape):
    return torch.randn(shape, device="cuda")


def test_scan_is_the_recurrence(ops):
    x, B, C = (rand(1, 90, n, width).bfloat16() for n, width in ((4, 64), (2, 128), (2, 128)))
    D, A = rand(4), -rand(4).exp()
    dt = F.softplus(rand(1, 90, 4) - 2)
    state, outputs = torch.zeros(1, 4, 64, 128, device="cuda"), []
    stepped = state.clone()
    for t in range(90):
        args = x[:, t], dt[:, t], A, B[:, t], C[:, t], D
        outputs.append(ops.selective_state_update(stepped, *args))
        b, c = (v[:, t].float().repeat_interleave(2, 1) for v in (B, C))
        state = (
            state * (dt[:, t] * A).exp()[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, :, None]
        )
        close(outputs[-1], (state * c[:, :, None]).sum(-1) + D[:, None] * x[:, t], 1e-2)
    y, final = ops.ssd_chunk_scan(x, dt, A, B, C, D)
    close(y, torch.stack(outputs, 1), 1e-2)
    close(final, state, 1e-4)


def test_step_and_decay(ops):
    dt, bias, A_log, lengths = rand(2, 70, 10)[..., :6], rand(6), rand(6), torch.tensor([70, 31], device="cuda")
    step, decay = ops.step_and_decay(dt, bias, A_log, (1e-3, 0.5), lengths)
    real = torch.arange(70, device="cuda") < lengths.unsqueeze(1)
    close(step, F.softplus(dt + bias).clamp(1e-3, 0.5) * real.unsqueeze(-1), 1e-6)
    close(decay, -A_log.exp(), 1e-6)


def test_norms(ops):
    y, z, weight = rand(7, 256), rand(7, 256), rand(256)
    close(ops.rms_norm(y, weight, 1e-5), weight * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt(), 1e-5)
    v = (y * F.silu(z)).view(7, 4, 64)
    expected = weight * (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1)
    close(ops.gated_rms_norm(y, z, weight, 1e-5, 64), expected, 1e-5)


def test_relu_squared(ops):
    x = rand(7, 256)
    close(ops.relu_squared(x), F.relu(x).square(), 1e-6)


@pytest.mark.parametrize("classes", [1000, 131072])
def test_likeliest(ops, classes):
    logits = (rand(2, 3, classes) * 8).round().bfloat16()  # many are equal
    out = torch.zeros(2, 5, dtype=torch.int64, device="cuda")
    assert torch.equal(ops.likeliest(logits, out[:, 1:4]), logits.argmax(-1))
    assert not out[:, ::4].any()


def test_keep_drafts(ops):
    def whole(*numbers):
        return torch.tensor(numbers, device="cuda")

    tokens, own = whole([5, 6, 7], [5, 6, 9], [5, 6, 7]), whole([6, 7, 8], [6, 7, 8], [6, 7, 8])
    room, kept, newest, accepted = whole(9, 9, 9), whole(0, 0, 0), whole(0, 0, 0), whole(0, 0, 0)
    room[2] = 1
    positions = whole([10, 11], [20, 21], [30, 31])
    ops.keep_drafts(tokens, own, whole(8, -1), room, kept, newest, positions, accepted)
    assert kept.tolist() == [3, 2, 1] and newest.tolist() == [2, 1, 0] and accepted.tolist() == [2, 1, 2]
    assert room.tolist() == [0, 7, 0] and positions[:, 0].tolist() == [13, 22, 31]
    assert tokens[:, 0].tolist() == [8, 7, 6]


def test_convolution(ops):
    x, weight, bias = rand(2, 50, 96), rand(96, 4), rand(96)
    padded = F.pad(x.mT, (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=96)).mT
    close(ops.causal_conv1d(x, weight, bias), expected, 1e-5)
    window = torch.zeros(2, 96, 4, device="cuda")
    steps = [ops.causal_conv1d_update(window, x[:, t], weight, bias) for t in range(50)]
    close(torch.stack(steps, 1), expected, 1e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_attention_to_slots(ops, narrow):
    query, key, value = rand(2, 8, 3, 64).bfloat16(), rand(2, 2, 500, 64).bfloat16(), rand(2, 2, 500, 64).bfloat16()
    last = torch.tensor([[400, 401, 402], [7, 8, 9]], device="cuda")
    there = rand(2, 500) < 1
    scales = ()
    if narrow:
        key, value = key.to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn)
        scales = torch.tensor(0.5, device="cuda"), torch.tensor(2.0, device="cuda")
    wide_key, wide_value = key.double().repeat_interleave(4, 1), value.double().repeat_interleave(4, 1)
    if narrow:
        wide_key, wide_value = 0.5 * wide_key, 2.0 * wide_value
    seen = (torch.arange(500, device="cuda") <= last[..., None]) & there[:, None]
    scores = (0.3 * query.double() @ wide_key.mT).masked_fill(~seen[:, None], -torch.inf)
    found = ops.decode_attention(query, key, value, last, there, 0.3, *scales)
    close(found, (scores.softmax(-1) @ wide_value).transpose(1, 2), 1e-2)


@pytest.mark.parametrize("tokens", [3, 40])
def test_mixture_of_experts(ops, tokens):
    x, up, down = rand(tokens, 64).bfloat16(), rand(8, 96, 64).bfloat16(), rand(8, 64, 96).bfloat16()
    weights, index = ops.topk_routing(rand(tokens, 8), torch.zeros(8, device="cuda"), 2)
    with torch.no_grad():
        found = ops.moe_experts(x, index, weights, up, down)
    hidden = torch.einsum("tkiw,tw->tki", up.double()[index], x.double()).relu().square()
    expected = torch.einsum("tk,tkwi,tki->tw", weights.double(), down.double()[index], hidden)
    close(found, expected, 1e-2)


@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_packed_weights(ops, tokens):
    x = rand(tokens, 64).bfloat16()
    weight, scale = rand(96, 64).to(torch.float8_e4m3fn), torch.tensor(0.5, device="cuda")
    close(ops.fp8_linear(x, weight, scale), x.double() @ weight.double().t() * 0.5, 1e-2)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], device="cuda").double()

    def matrices(*shape):
        codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device="cuda")
        blocks = (rand(*shape[:-1], shape[-1] // 16).abs() + 0.1).to(torch.float8_e4m3fn)
        wide = values[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
        scales = 0.1 + torch.rand(shape[:-2], device="cuda")
        wide = wide * blocks.double().repeat_interleave(16, -1) * scales.double()[..., None, None]
        return (codes, blocks, scales), wide

    packed, wide = matrices(96, 64)
    close(ops.nvfp4_linear(x, *packed), x.double() @ wide.t(), 1e-2)
    (up, wide_up), (down, wide_down) = matrices(8, 96, 64), matrices(8, 64, 96)
    weights, index = torch.rand(tokens, 2, device="cuda"), torch.rand(tokens, 8, device="cuda").topk(2).indices
    with torch.no_grad():
        found = ops.nvfp4_experts(x, index, weights, up, down)
    hidden = torch.einsum("tkiw,tw->tki", wide_up[index], x.double()).relu().square()
    close(found, torch.einsum("tk,tkwi,tki->tw", weights.double(), wide_down[index], hidden), 2e-2)
