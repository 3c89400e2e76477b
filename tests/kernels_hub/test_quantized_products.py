"""Products with packed weights: those of the dequantised weights, forward and backward, one expert at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference import quantized_experts, quantized_linear
from nemotron_super.kernels_hub.reference.fp8 import dequantize_fp8, quantize_fp8
from nemotron_super.kernels_hub.reference.moe_experts import moe_experts
from nemotron_super.kernels_hub.reference.nvfp4 import dequantize_nvfp4, quantize_nvfp4


def stored(name, weight):
    """Packed tensors of (..., out, in) and what they stand for."""
    amax = weight.abs().amax((-2, -1))
    if name == "fp8":
        scale = amax / 448
        wide = scale[..., None, None]
        packed = quantize_fp8(weight, wide)
        return (packed, scale), dequantize_fp8(packed, wide, torch.float32)
    scale = amax / 2688
    packed, blocks = quantize_nvfp4(weight, scale[..., None])
    return (packed, blocks, scale), dequantize_nvfp4(packed, blocks, scale[..., None], torch.float32)


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (0,)])
def test_linear(name, shape):
    torch.manual_seed(0)
    packed, weight = stored(name, torch.randn(24, 48))
    x = torch.randn(*shape, 48, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    out, expected = getattr(quantized_linear, f"{name}_linear")(x, *packed), other @ weight.t()
    torch.testing.assert_close(out, expected)
    (out.sin().sum()).backward()
    (expected.sin().sum()).backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_autograd_keeps_only_what_is_packed(name):
    packed, _ = stored(name, torch.randn(64, 64))
    x = torch.randn(1, 64, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        getattr(quantized_linear, f"{name}_linear")(x, *packed)
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in packed)


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_experts(name, data):
    tokens, experts = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    # Scaled so that outputs and gradients are of the order of 1: float32's rounding grows with what is added up.
    up, wide_up = stored(name, torch.randn(experts, 32, 16) / 4)
    down, wide_down = stored(name, torch.randn(experts, 16, 32) / 6)
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    if data.draw(st.booleans()):
        index[:] = index[:1]  # all tokens hit the same experts
    x, weights = torch.randn(tokens, 16, requires_grad=True), torch.rand(tokens, top_k, requires_grad=True)
    others = [t.detach().clone().requires_grad_() for t in (x, weights)]
    out = getattr(quantized_experts, f"{name}_experts")(x, index, weights, up, down)
    expected = moe_experts(others[0], index, others[1], wide_up, wide_down)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip((x, weights), others, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_only_chosen_experts_are_dequantised(monkeypatch):
    """Decoding one token reads as many experts as it has chosen."""
    up, _ = stored("nvfp4", torch.randn(8, 32, 16))
    down, _ = stored("nvfp4", torch.randn(8, 16, 32))
    seen = []

    def dequantize(packed, *scales, dtype):
        seen.append(packed.shape)
        return dequantize_nvfp4(packed, *scales, dtype)

    monkeypatch.setattr(quantized_linear, "dequantize_nvfp4", dequantize)
    quantized_experts.nvfp4_experts(torch.randn(1, 16), torch.tensor([[5, 2]]), torch.ones(1, 2), up, down)
    assert seen == [(32, 8), (16, 16)] * 2


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_simulated_inputs(name):
    """Experts round their input and their activation, each with its expert's scale; gradients pass straight through."""
    torch.manual_seed(0)
    simulate = getattr(quantized_linear, f"simulate_{name}")
    up, wide_up = stored(name, torch.randn(2, 32, 16))
    down, wide_down = stored(name, torch.randn(2, 16, 32))
    scales = torch.tensor([0.01, 0.02]), torch.tensor([0.3, 0.4])
    x = torch.randn(1, 16)
    out = getattr(quantized_experts, f"{name}_experts")(x, torch.tensor([[1]]), torch.ones(1, 1), up, down, scales)
    hidden = (simulate(x, scales[0][1]) @ wide_up[1].t()).relu().square()
    torch.testing.assert_close(out, simulate(hidden, scales[1][1]) @ wide_down[1].t())
    plain = getattr(quantized_experts, f"{name}_experts")(x, torch.tensor([[1]]), torch.ones(1, 1), up, down)
    assert not torch.allclose(out, plain)
    x.requires_grad_()
    simulate(x, scales[0][1]).sum().backward()
    assert x.grad.eq(1).all()


@pytest.mark.parametrize("grad", [False, True])
def test_frozen_products_are_compiled_whole(grad):
    x, weight, scale = torch.randn(3, 32), torch.randn(8, 32).to(torch.float8_e4m3fn), torch.tensor(0.5)
    packed = torch.randint(0, 256, (8, 16), dtype=torch.uint8), torch.ones(8, 2).to(torch.float8_e4m3fn), scale
    for product, stored in ((quantized_linear.fp8_linear, (weight, scale)), (quantized_linear.nvfp4_linear, packed)):
        with torch.set_grad_enabled(grad):
            found = torch.compile(product, backend="aot_eager", fullgraph=True)(
                x.clone().requires_grad_(grad), *stored
            )
            torch.testing.assert_close(found, product(x, *stored))
