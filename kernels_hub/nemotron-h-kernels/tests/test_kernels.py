"""A build of this repository, loaded by the `kernels` library, against plain formulas. Needs a GPU.

pytest tests/test_kernels.py
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

kernels = pytest.importorskip("kernels")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU can but interpret these kernels


@pytest.fixture(scope="module")
def ops():
    return kernels.get_local_kernel(Path(__file__).parents[1])


def close(found, expected, tolerance):
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def rand(*shape):
    return torch.randn(shape, device=DEVICE)


def test_scan_is_the_recurrence(ops):
    x, B, C = (rand(1, 70, n, width).bfloat16() for n, width in ((4, 64), (2, 128), (2, 128)))
    D, A = rand(4), -rand(4).exp()
    dt = F.softplus(rand(1, 70, 4) - 2)
    state, outputs = torch.zeros(1, 4, 64, 128, device=DEVICE), []
    stepped = state.clone()
    for t in range(70):
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
    dt, bias, A_log, lengths = rand(2, 70, 10)[..., :6], rand(6), rand(6), torch.tensor([70, 31], device=DEVICE)
    step, decay = ops.step_and_decay(dt, bias, A_log, (1e-3, 0.5), lengths)
    real = torch.arange(70, device=DEVICE) < lengths.unsqueeze(1)
    close(step, F.softplus(dt + bias).clamp(1e-3, 0.5) * real.unsqueeze(-1), 1e-6)
    close(decay, -A_log.exp(), 1e-6)


def test_norms(ops):
    y, z, weight = rand(7, 256), rand(7, 256), rand(256)
    close(ops.rms_norm(y, weight, 1e-5), weight * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt(), 1e-5)
    v = (y * F.silu(z)).view(7, 4, 64)
    expected = weight * (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1)
    close(ops.gated_rms_norm(y, z, weight, 1e-5, 64), expected, 1e-5)


def test_residual_add_and_norm(ops):
    x, residual, weight = rand(7, 256), rand(7, 256), rand(256)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    close(total, x + residual, 1e-6)
    close(normed, weight * total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt(), 1e-5)


def test_relu_squared(ops):
    x = rand(7, 256)
    close(ops.relu_squared(x), F.relu(x).square(), 1e-6)


@pytest.mark.parametrize("classes", [1000, 131072])
def test_likeliest(ops, classes):
    logits = (rand(2, 3, classes) * 8).round().bfloat16()  # many are equal
    out = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    assert torch.equal(ops.likeliest(logits, out[:, 1:4]), logits.argmax(-1))
    assert not out[:, ::4].any()


def test_keep_drafts(ops):
    def whole(*numbers):
        return torch.tensor(numbers, device=DEVICE)

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
    window = torch.zeros(2, 96, 4, device=DEVICE)
    steps = [ops.causal_conv1d_update(window, x[:, t], weight, bias) for t in range(50)]
    close(torch.stack(steps, 1), expected, 1e-5)


def test_convolution_of_a_few_tokens(ops):
    """Behind drafts, of which the first two are taken in."""
    x, weight, bias = rand(2, 50, 96), rand(96, 4), rand(96)
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=96)).mT
    window, drafts = x[:, 40:44].mT.contiguous(), x[:, 44:47].clone()
    close(ops.causal_conv1d_replay(window, x[:, 46:49], weight, bias, drafts, 2), expected[:, 44:49], 1e-5)
    assert torch.equal(window, x[:, 42:46].mT) and torch.equal(drafts, x[:, 46:49])


def test_state_of_a_few_tokens(ops):
    """As many single steps; the state takes in the first two."""
    x, B, C = rand(2, 5, 4, 64), rand(2, 5, 2, 128), rand(2, 5, 2, 128)
    D, A, dt = rand(4), -rand(4).exp(), F.softplus(rand(2, 5, 4) - 2)
    state = rand(2, 4, 64, 128)
    stepped, outputs, kept = state.clone(), [], None
    for t in range(5):
        outputs.append(ops.selective_state_update(stepped, x[:, t], dt[:, t], A, B[:, t], C[:, t], D))
        kept = stepped.clone() if t == 1 else kept
    close(ops.selective_state_replay(state, x, dt, A, B, C, D, 2), torch.stack(outputs[2:], 1), 1e-5)
    close(state, kept, 1e-5)


def test_slots(ops):
    keys, values, new_keys, new_values = rand(2, 2, 9, 64), rand(2, 2, 9, 64), rand(2, 2, 3, 64), rand(2, 2, 3, 64)
    index = torch.tensor([[0, 5, 8], [7, 1, 2]], device=DEVICE)
    expected = keys.clone(), values.clone()
    for stored, new in zip(expected, (new_keys, new_values), strict=True):
        for row in range(2):
            stored[row, :, index[row]] = new[row]
    ops.fill_slots(keys, values, new_keys, new_values, index)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_linear_maps_of_a_few_tokens(ops):
    x, first, second, bias, term = rand(5, 256), rand(96, 256), rand(40, 256), rand(96), rand(5, 96)
    close(ops.small_batch_linear(x, first, bias), x @ first.t() + bias, 1e-5)
    close(ops.small_batch_linear(x, first, relu2=True), F.relu(x @ first.t()).square(), 1e-5)
    close(ops.small_batch_linear(x, first, plus=(term,)), x @ first.t() + term, 1e-5)
    close(ops.joint_linear(x, [first, second]), torch.cat((x @ first.t(), x @ second.t()), -1), 1e-5)


def test_cross_entropy_of_a_head(ops):
    hidden, weight = rand(9, 64).requires_grad_(), rand(1000, 64).requires_grad_()
    targets = torch.tensor([3, 999, -100, 0, 5, 5, 7, -100, 1], device=DEVICE)
    found, each = ops.linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    close(found, expected.sum(), 1e-5)
    close(each, expected, 1e-5)
    grads = (torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected.sum()))
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("tokens", [3, 100])
def test_router(ops, tokens):
    x, weight, bias, narrowing = rand(tokens, 128), rand(16, 128), rand(16), rand(24, 128)
    logits = ops.router_logits(x, weight)
    close(logits, x.double() @ weight.double().t(), 1e-5)
    weights, index = ops.topk_routing(logits, bias, 4, True, 2.5)
    scores = logits.sigmoid()
    assert torch.equal(index, (scores + bias).topk(4).indices)
    chosen = scores.gather(1, index)
    close(weights, 2.5 * chosen / chosen.sum(-1, keepdim=True), 1e-5)
    if tokens <= 64:
        found = ops.route_few_tokens(x, weight, bias, narrowing, 4, True, 2.5)
        assert torch.equal(found[2], index)
        for a, b in zip((found[0], found[1], found[3]), (logits, weights, x @ narrowing.t()), strict=True):
            close(a, b, 1e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_attention_to_slots(ops, narrow):
    query, key, value = rand(2, 8, 3, 64).bfloat16(), rand(2, 2, 500, 64).bfloat16(), rand(2, 2, 500, 64).bfloat16()
    last = torch.tensor([[400, 401, 402], [7, 8, 9]], device=DEVICE)
    there = rand(2, 500) < 1
    scales = ()
    if narrow:
        key, value = key.to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn)
        scales = torch.tensor(0.5, device=DEVICE), torch.tensor(2.0, device=DEVICE)
    wide_key, wide_value = key.double().repeat_interleave(4, 1), value.double().repeat_interleave(4, 1)
    if narrow:
        wide_key, wide_value = 0.5 * wide_key, 2.0 * wide_value
    seen = (torch.arange(500, device=DEVICE) <= last[..., None]) & there[:, None]
    scores = (0.3 * query.double() @ wide_key.mT).masked_fill(~seen[:, None], -torch.inf)
    found = ops.decode_attention(query, key, value, last, there, 0.3, *scales)
    close(found, (scores.softmax(-1) @ wide_value).transpose(1, 2), 1e-2)


@pytest.mark.parametrize("tokens", [3, 40])
def test_mixture_of_experts(ops, tokens):
    x, up, down = rand(tokens, 64).bfloat16(), rand(8, 96, 64).bfloat16(), rand(8, 64, 96).bfloat16()
    weights, index = ops.topk_routing(rand(tokens, 8), torch.zeros(8, device=DEVICE), 2)
    with torch.no_grad():
        found = ops.moe_experts(x, index, weights, up, down)
    hidden = torch.einsum("tkiw,tw->tki", up.double()[index], x.double()).relu().square()
    expected = torch.einsum("tk,tkwi,tki->tw", weights.double(), down.double()[index], hidden)
    close(found, expected, 1e-2)


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_packed_weights(ops, tokens):
    x = rand(tokens, 64).bfloat16()
    weight, scale = rand(96, 64).to(torch.float8_e4m3fn), torch.tensor(0.5, device=DEVICE)
    close(ops.fp8_linear(x, weight, scale), x.double() @ weight.double().t() * 0.5, 1e-2)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], device=DEVICE).double()

    def matrices(*shape):
        codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=DEVICE)
        blocks = (rand(*shape[:-1], shape[-1] // 16).abs() + 0.1).to(torch.float8_e4m3fn)
        wide = values[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
        scales = 0.1 + torch.rand(shape[:-2], device=DEVICE)
        wide = wide * blocks.double().repeat_interleave(16, -1) * scales.double()[..., None, None]
        return (codes, blocks, scales), wide

    packed, wide = matrices(96, 64)
    close(ops.nvfp4_linear(x, *packed), x.double() @ wide.t(), 1e-2)
    (up, wide_up), (down, wide_down) = matrices(8, 96, 64), matrices(8, 64, 96)
    weights, index = torch.rand(tokens, 2, device=DEVICE), torch.rand(tokens, 8, device=DEVICE).topk(2).indices
    with torch.no_grad():
        found = ops.nvfp4_experts(x, index, weights, up, down)
    hidden = torch.einsum("tkiw,tw->tki", wide_up[index], x.double()).relu().square()
    close(found, torch.einsum("tk,tkwi,tki->tw", weights.double(), wide_down[index], hidden), 2e-2)

    up, down = rand(8, 96, 64).to(torch.float8_e4m3fn), rand(8, 64, 96).to(torch.float8_e4m3fn)
    scales = 0.1 + torch.rand(2, 8, device=DEVICE)
    with torch.no_grad():
        found = ops.fp8_experts(x, index, weights, (up, scales[0]), (down, scales[1]))
    wide_up, wide_down = (w.double() * s.double()[:, None, None] for w, s in zip((up, down), scales, strict=True))
    hidden = torch.einsum("tkiw,tw->tki", wide_up[index], x.double()).relu().square()
    close(found, torch.einsum("tk,tkwi,tki->tw", weights.double(), wide_down[index], hidden), 2e-2)


def test_every_function_is_tested(ops):
    text = Path(__file__).read_text(encoding="utf-8")
    assert not [name for name in ops.__all__ if name != "layers" and f"ops.{name}(" not in text]
