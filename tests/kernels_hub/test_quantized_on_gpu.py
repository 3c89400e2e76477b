"""The kernels of packed weights compiled, at the shapes of Nemotron 3 Super, on a GPU."""

import copy
import sys

import pytest
import torch
from nemotron_super import NVFP4Config, offload_experts, quantize_model
from nemotron_super.kernels_hub import registry
from nemotron_super.kernels_hub.reference.fp8 import dequantize_fp8, quantize_fp8
from nemotron_super.kernels_hub.reference.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from nemotron_super.kernels_hub.reference.quantized_linear import simulate_fp8, simulate_nvfp4
from nemotron_super.kernels_hub.registry import use_kernels
from nemotron_super.kernels_hub.scaled_linear import scaled_fp8_linear, scaled_nvfp4_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the kernels are compiled here"),
]
NAMES = ["nvfp4", "fp8"]
EXPERTS, TOP_K, LATENT, INNER = 512, 22, 1024, 2688


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, scale=1.0):
    return (scale * torch.randn(shape, device="cuda")).bfloat16()


def stored(name, weight):
    """The packed tensors of a matrix (out, in)."""
    amax = weight.abs().amax().float()
    if name == "fp8":
        return quantize_fp8(weight, amax / 448), amax / 448
    return *quantize_nvfp4(weight, amax / 2688), amax / 2688


def exact(name, packed):
    """What they stand for, in float64."""
    if name == "fp8":
        return packed[0].double() * packed[1].double()
    return dequantize_nvfp4(*packed[:2], torch.ones((), device="cuda"), torch.float64) * packed[2].double()


def stacked(name, experts, *shape):
    each = [stored(name, normal(*shape, scale=0.03)) for _ in range(experts)]
    return tuple(torch.stack(tensors) for tensors in zip(*each, strict=True))


def assert_close(found, same, truth):
    error, allowed = (((t.double() - truth).norm() / truth.norm()).item() for t in (found, same))
    assert error <= 2 * allowed + 1e-5, (error, allowed)


@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 64, 65, 700])
@pytest.mark.parametrize("rows, width", [(18560, 4096), (4096, 8192), (5376, 4096), (4096, 5376), (1000, 2688)])
@pytest.mark.parametrize("name", NAMES)
def test_linear(name, rows, width, tokens):
    x, packed, op = (
        normal(tokens, width),
        stored(name, normal(rows, width, scale=0.02)),
        getattr(registry, f"{name}_linear"),
    )
    results = {}
    for source in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        with use_kernels(source), torch.no_grad():
            plain = op(x, *packed)
            followed = op(x, *packed, False, (x[:, :1].expand(-1, rows), plain))
        torch.testing.assert_close(followed, plain + (x[:, :1] + plain), rtol=1e-2, atol=1e-2)
        with use_kernels(source):
            out = op(leaf, *packed)
        assert torch.equal(out, plain)
        results[source] = [out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out))[0]]
    weight = exact(name, packed)
    truths = [x.double() @ weight.t(), torch.ones(tokens, rows, device="cuda", dtype=torch.float64) @ weight]
    for found, same, truth in zip(results["triton"], results["torch"], truths, strict=True):
        assert_close(found, same, truth)


@pytest.fixture(scope="module", params=NAMES)
def super_experts(request):
    """All routed experts of one layer, up and down."""
    torch.manual_seed(1)
    return (
        request.param,
        stacked(request.param, EXPERTS, INNER, LATENT),
        stacked(request.param, EXPERTS, LATENT, INNER),
    )


@pytest.mark.parametrize("routing", ["any", "one"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 300, 4000, 5000])
def test_experts(super_experts, tokens, routing):
    """As a stream; in tiles; and, 5,000 tokens, 214 pairs an expert, unpacked in memory."""
    name, up, down = super_experts
    x, weights = normal(tokens, LATENT), torch.rand(tokens, TOP_K, device="cuda")
    index = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices
    index = index[:1].expand(tokens, -1).contiguous() if routing == "one" else index
    op, results = getattr(registry, f"{name}_experts"), {}
    for source in ("triton", "torch"):
        with use_kernels(source), torch.no_grad():
            results[source] = op(x, index, weights, up, down)
    truth = torch.zeros(tokens, LATENT, device="cuda", dtype=torch.float64)
    for e in index.unique().tolist():
        token, choice = (index == e).nonzero(as_tuple=True)
        hidden = (x[token].double() @ exact(name, [t[e] for t in up]).t()).relu().square()
        y = hidden @ exact(name, [t[e] for t in down]).t()
        truth.index_add_(0, token, weights[token, choice].double()[:, None] * y)
    assert_close(results["triton"], results["torch"], truth)


@pytest.mark.parametrize("name", NAMES)
def test_experts_unpacked_in_parts(name, monkeypatch):
    """Of 250 pairs an expert: all at once or in parts, the last of them smaller, it is the same to the bit."""
    quantized = sys.modules[f"{registry._bundle().__name__}.quantized_experts"]
    up, down = stacked(name, 16, INNER, LATENT), stacked(name, 16, LATENT, INNER)
    x, weights = normal(1000, LATENT), torch.rand(1000, 4, device="cuda")
    index = torch.rand(1000, 16, device="cuda").topk(4).indices
    op, parts, unpack_into = getattr(registry, f"{name}_experts"), [], quantized.unpack_into

    def watched(packed, out):
        parts.append(len(out))
        return unpack_into(packed, out)

    monkeypatch.setattr(quantized, "unpack_into", watched)
    with torch.no_grad(), use_kernels("triton"):
        whole = op(x, index, weights, up, down)
        monkeypatch.setattr(quantized, "_ROOM", 6 * INNER * LATENT * 2)
        assert op(x, index, weights, up, down).equal(whole)
        assert parts == [16, 16] + [6, 6, 4] * 2
        monkeypatch.setattr(quantized, "_MANY", 1000)
        in_tiles = op(x, index, weights, up, down)
    with torch.no_grad(), use_kernels("torch"):
        same = op(x, index, weights, up, down)
    wide = [torch.stack([exact(name, [t[e] for t in m]) for e in range(16)]) for m in (up, down)]
    truth = registry.moe_experts.reference(x.double(), index, weights.double(), *wide)
    for found in (whole, in_tiles):
        assert_close(found, same, truth)


@pytest.mark.parametrize("tokens", [3, 100, 2000])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_experts(name, tokens):
    up, down = stacked(name, 16, 320, 256), stacked(name, 16, 256, 320)
    x, weights = normal(tokens, 256), torch.rand(tokens, 4, device="cuda")
    index = torch.rand(tokens, 16, device="cuda").topk(4).indices
    towards, grads = normal(tokens, 256), {}
    for source in ("triton", "torch", "exact"):
        leaves = [
            t.detach().to(torch.float64 if source == "exact" else t.dtype).requires_grad_() for t in (x, weights)
        ]
        if source == "exact":
            wide = [torch.stack([exact(name, [t[e] for t in m]) for e in range(16)]) for m in (up, down)]
            out = registry.moe_experts.reference(leaves[0], index, leaves[1], *wide)
        else:
            with use_kernels(source):
                out = getattr(registry, f"{name}_experts")(leaves[0], index, leaves[1], up, down)
        grads[source] = torch.autograd.grad(out, leaves, towards.to(out.dtype))
    for found, same, truth in zip(grads["triton"], grads["torch"], grads["exact"], strict=True):
        assert_close(found, same, truth)


@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize("name", NAMES)
def test_in_a_cuda_graph(name, tokens):
    """Captured once, replayed with other tokens and other experts: nothing waits for the host or depends on values."""
    up, down = stacked(name, 64, 512, 256), stacked(name, 64, 256, 512)
    head = stored(name, normal(1024, 256))

    def step(x, index, weights):
        y = getattr(registry, f"{name}_experts")(x, index, weights, up, down)
        return getattr(registry, f"{name}_linear")(y, *head)

    def inputs():
        index = torch.rand(tokens, 64, device="cuda").topk(6).indices
        return [normal(tokens, 256), index, torch.rand(tokens, 6, device="cuda")]

    with torch.no_grad(), use_kernels("triton"):
        slots, fresh = inputs(), inputs()
        step(*slots)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(*slots)
        for slot, value in zip(slots, fresh, strict=True):
            slot.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, step(*fresh))


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name):
    packed = stored(name, normal(128, 256))
    op = getattr(registry, f"{name}_linear")
    x = normal(5, 256).requires_grad_()

    def work(x):
        return op(x, *packed).float().square().sum()

    with use_kernels("triton"):
        expected = torch.autograd.grad(work(x), x)[0]
        found = torch.autograd.grad(torch.compile(work, fullgraph=True)(x), x)[0]
    assert ((found - expected).float().norm() / expected.float().norm()).item() < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_unpacked_as_the_reference_does(name):
    """To the last bit but one of bfloat16: scales are multiplied in another order."""
    packed = stored(name, normal(512, 1024))
    dequantize = dequantize_fp8 if name == "fp8" else dequantize_nvfp4
    with use_kernels("triton"):
        columns = getattr(registry, f"{name}_linear")(torch.eye(1024, device="cuda").bfloat16(), *packed).t()
    torch.testing.assert_close(columns, dequantize(*packed, torch.bfloat16), rtol=2**-7, atol=0)


@pytest.mark.parametrize("recipe", ["release", "nvfp4", "fp8"])
def test_a_small_model(make_model, recipe):
    """A whole model, prefill and decoding, with kernels and with the reference; then with its experts in CPU memory."""
    sizes = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 32}
    model = quantize_model(make_model("MEM*E", scale=2.0, **sizes).bfloat16(), NVFP4Config(recipe=recipe)).cuda()
    ids = torch.randint(3, 61, (2, 40), device="cuda")
    logits = {}
    packed = [op for op in registry.OPS if op.startswith(("nvfp4", "fp8"))]
    with torch.no_grad():
        for source in ("triton", "torch"):
            with use_kernels(**dict.fromkeys(packed, source)):
                logits[source] = model(ids).logits.double()
                model.generate(ids[:, :5], max_new_tokens=4, min_new_tokens=4)
        exact = copy.deepcopy(model).dequantize().float()(ids).logits.double()
        assert (logits["triton"] - exact).norm() <= 2 * (logits["torch"] - exact).norm() + 1e-5 * exact.norm()
        if recipe != "nvfp4":
            assert offload_experts(model) > 0
            with use_kernels(**dict.fromkeys(packed, "triton")):
                assert (model(ids).logits.double() - exact).norm() <= 2 * (logits["torch"] - exact).norm()


def test_fp8_products():
    """W8A8 on tensor cores against the product of the simulated operands, in float64."""
    weight, x, input_scale = stored("fp8", normal(5376, 4096)), normal(100, 4096), torch.tensor(0.01, device="cuda")
    out = scaled_fp8_linear(x, *weight, input_scale)
    truth = simulate_fp8(x, input_scale).double() @ exact("fp8", weight).t()
    assert (out.double() - truth).norm() <= 4e-3 * truth.norm()


def test_fp4_products():
    """W4A4 on Blackwell, where it can be run; elsewhere it says what it needs."""
    weight, x = stored("nvfp4", normal(512, 1024)), normal(100, 1024)
    input_scale = x.abs().amax().float() / 2688
    if torch.cuda.get_device_capability() < (10, 0):
        with pytest.raises(ValueError, match=r"does not multiply FP4 operands.*10.0"):
            scaled_nvfp4_linear(x, *weight, input_scale)
        return
    truth = simulate_nvfp4(x.float(), input_scale).double() @ exact("nvfp4", weight).t()
    assert (scaled_nvfp4_linear(x, *weight, input_scale).double() - truth).norm() <= 4e-3 * truth.norm()
