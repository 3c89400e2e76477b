"""Products of quantised operands: FP8 on the CPU's own; of FP4 the operands to the bit, and how they are handed over."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub import scaled_linear
from nemotron_super.kernels_hub.reference.fp8 import quantize_fp8
from nemotron_super.kernels_hub.reference.nvfp4 import quantize_nvfp4
from nemotron_super.kernels_hub.reference.quantized_linear import (
    fp8_linear,
    nvfp4_linear,
    simulate_fp8,
    simulate_nvfp4,
)
from nemotron_super.kernels_hub.scaled_linear import (
    fp8_unsupported,
    nvfp4_operand,
    nvfp4_unsupported,
    scaled_fp8_linear,
    scaled_nvfp4_linear,
    swizzle_scales,
)
from torch.nn.functional import ScalingType, SwizzleType

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def place(row, block, blocks):
    """Where the scale of a row's block lies, as NVIDIA's cuBLAS documentation describes it."""
    tile = (row // 128) * -(-blocks // 4) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def numbers(codes, scales, global_scale):
    """What an operand stands for, (rows, n) in float64, read from the layout of the hardware."""
    packed = codes.view(torch.uint8)
    rows, blocks = packed.shape[0], packed.shape[1] // 8
    places = [[place(r, b, blocks) for b in range(blocks)] for r in range(rows)]
    steps = scales.double()[torch.tensor(places)].repeat_interleave(16, 1)
    values = E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()]
    return values * steps * global_scale.double()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 300), blocks=st.integers(1, 11), seed=st.integers(0, 2**16))
def test_swizzled_scales(rows, blocks, seed):
    scale = torch.randint(1, 127, (rows, blocks), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    found = swizzle_scales(scale.view(torch.float8_e4m3fn))
    assert found.dtype == torch.float8_e4m3fn and found.numel() == -(-rows // 128) * -(-blocks // 4) * 512
    expected = torch.zeros(found.numel(), dtype=torch.uint8)
    for row in range(rows):
        for block in range(blocks):
            expected[place(row, block, blocks)] = scale[row, block]
    assert found.view(torch.uint8).equal(expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 140),
    blocks=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    power=st.integers(-20, 20),
    seed=st.integers(0, 2**16),
)
def test_operand_of_fp4(rows, blocks, dtype, power, seed):
    """Read back from the hardware's layout in float64, it is what simulating the activation gives, to the bit."""
    x = torch.randn(rows, 16 * blocks, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    x = x.to(dtype)
    global_scale = torch.tensor(2.0 ** (power - 8))
    codes, scales = nvfp4_operand(x, global_scale)
    assert codes.dtype == torch.float4_e2m1fn_x2 and scales.dtype == torch.float8_e4m3fn
    assert numbers(codes, scales, global_scale).equal(simulate_nvfp4(x.float(), global_scale).double())


def fp8_weight(rows, width):
    weight = torch.randn(rows, width)
    scale = weight.abs().amax() / 448
    return quantize_fp8(weight, scale), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (0,)])
def test_fp8(shape, dtype):
    torch.manual_seed(0)
    stored, input_scale = fp8_weight(48, 64), torch.tensor(0.01)
    x = torch.randn(*shape, 64, dtype=dtype, requires_grad=True)
    out = scaled_fp8_linear(x, *stored, input_scale)
    exact = (simulate_fp8(x, input_scale).double() @ (stored[0].double() * stored[1].double()).t()).detach()
    assert out.dtype == dtype and out.shape == (*shape, 48)
    assert (out.double() - exact).norm() <= (1e-6 if dtype == torch.float32 else 3e-3) * exact.norm()
    grad, expected = (torch.autograd.grad(y.sum(), x)[0] for y in (out, fp8_linear(x, *stored)))
    torch.testing.assert_close(grad, expected)


def test_inputs_are_rounded_once():
    """From the float32 quotient: by way of bfloat16, as weights are exported, some would end in the other of two neighbours."""
    torch.manual_seed(0)
    x, scale = torch.randn(64, 64).bfloat16(), torch.tensor(0.0123)
    once = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert not once.view(torch.uint8).equal(quantize_fp8(x, scale).view(torch.uint8))
    assert simulate_fp8(x, scale).equal((once.float() * scale).bfloat16())
    eye, one = torch.eye(64).to(torch.float8_e4m3fn), torch.tensor(1.0)
    assert scaled_fp8_linear(x, eye, one, scale).equal(simulate_fp8(x, scale))


def test_fp4_as_it_is_handed_over(monkeypatch):
    """torch's product, written out in float64 from the layouts it is documented to take, gives the simulated product."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(2, 5, 64, requires_grad=True)
    global_scale, input_scale = weight.abs().amax() / 2688, x.detach().abs().amax() / 2688
    stored = (*quantize_nvfp4(weight, global_scale), global_scale)

    def product(a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, output_dtype):
        assert recipe_a == recipe_b == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        assert swizzle_a == swizzle_b == [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
        assert a.is_contiguous() and b.t().is_contiguous()
        return (numbers(a, *scale_a) @ numbers(b.t(), *scale_b).t()).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", product)
    monkeypatch.setattr(scaled_linear, "nvfp4_unsupported", lambda *_: None)
    out = scaled_nvfp4_linear(x, *stored, input_scale)
    expected = nvfp4_linear(simulate_nvfp4(x, input_scale), *stored)
    torch.testing.assert_close(out, expected)
    for grad in (torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)):
        torch.testing.assert_close(grad, nvfp4_linear(torch.eye(64), *stored).sum(1).expand(2, 5, 64))


@pytest.mark.parametrize(
    "unsupported, device, capability, words",
    [
        (fp8_unsupported, "cuda", (8, 9), None),
        (fp8_unsupported, "cuda", (9, 0), None),
        (fp8_unsupported, "cpu", None, None),
        (fp8_unsupported, "cuda", (8, 0), r"Some GPU \(compute capability 8.0\).* FP8 operands.* 8.9"),
        (fp8_unsupported, "mps", None, "'mps' does not multiply FP8"),
        (nvfp4_unsupported, "cuda", (10, 0), None),
        (nvfp4_unsupported, "cuda", (9, 0), r"Some GPU \(compute capability 9.0\).* FP4 operands.* 10.0"),
        (nvfp4_unsupported, "cpu", None, "'cpu' does not multiply FP4"),
    ],
)
def test_devices(unsupported, device, capability, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    reason = unsupported(torch.device(device), 64, 64)
    assert reason is None if words is None else re.search(words, reason)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"'cpu' does not multiply FP4"):
        scaled_nvfp4_linear(
            torch.ones(1, 32), *quantize_nvfp4(torch.ones(32, 32), torch.ones(1)), torch.ones(()), torch.ones(())
        )
    with pytest.raises(ValueError, match=r"\(40, 64\) does not fit.* multiples of 16"):
        scaled_fp8_linear(torch.ones(1, 64), *fp8_weight(40, 64), torch.ones(()))
