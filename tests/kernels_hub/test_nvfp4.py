"""NVFP4 and FP8 against a float64 model of the formats, built from their bit fields."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference.fp8 import dequantize_fp8, quantize_fp8
from nemotron_super.kernels_hub.reference.nvfp4 import (
    dequantize_nvfp4,
    encode_e2m1,
    pack,
    quantize_nvfp4,
    unpack,
)


def field(code, exponent_bits, mantissa_bits, bias):
    """The value of a small float, from its bits."""
    mantissa, exponent = code % 2**mantissa_bits, code >> mantissa_bits & 2**exponent_bits - 1
    sign = -1.0 if code >> mantissa_bits + exponent_bits & 1 else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


E2M1 = torch.tensor([field(code, 2, 1, 1) for code in range(16)], dtype=torch.float64)
E4M3 = torch.tensor([field(c, 4, 3, 7) if c & 127 != 127 else math.nan for c in range(256)], dtype=torch.float64)


def exact(packed, scale, global_scale):
    """What is stored, in float64."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    scales = E4M3[scale.view(torch.uint8).long()].repeat_interleave(16, -1)
    return E2M1[codes] * scales * global_scale.double()


@st.composite
def weights(draw):
    """(rows, 16 n) float32 of any magnitude, with blocks that are zero, tiny beside their tensor, or one value alone."""
    rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, blocks, 16, generator=generator)
    sizes = draw(st.lists(st.sampled_from([0.0, 1.0, 1e-3, 1e-6, 1e-9]), min_size=blocks, max_size=blocks))
    x = x * torch.tensor(sizes).unsqueeze(-1)
    x[:, :, 1:] *= draw(st.sampled_from([1.0, 1.0, 0.0]))
    return x.flatten(1) * 2.0 ** draw(st.integers(-120, 100))


def global_scale_of(x):
    scale = x.abs().amax() / (6 * 448)
    return torch.where(scale > 0, scale, 1.0)


@settings(max_examples=80, deadline=None)
@given(weights())
def test_codes_are_the_nearest(x):
    """Block scales are the nearest float8 to amax / 6 / global, within its range; then every code is the nearest E2M1."""
    g = global_scale_of(x)
    packed, scale = quantize_nvfp4(x, g)
    blocks = x.double().unflatten(1, (-1, 16))
    ideal = (blocks.abs().amax(-1) / 6 / g.double()).clamp(2.0**-9, 448)
    stored = E4M3[scale.view(torch.uint8).long()]
    zero = blocks.abs().amax(-1) == 0
    assert (stored[zero] == 1).all()
    positive = E4M3[:127]
    nearest = (ideal.unsqueeze(-1) - positive).abs().amin(-1)
    normal = blocks.abs().amax(-1) > 2.0**-120  # below, amax / 6 / global may underflow, which makes a zero block
    assert ((stored - ideal).abs() <= nearest + 1e-6 * ideal)[normal].all()

    step = (stored * g.double()).unsqueeze(-1)
    value = exact(packed, scale, g).unflatten(1, (-1, 16))
    best = (blocks.unsqueeze(-1) - E2M1 * step.unsqueeze(-1)).abs().amin(-1)
    # The quotient is rounded to float32, and scales near the end of float32's range lose bits of their own.
    assert ((blocks - value).abs() <= best + 1e-6 * blocks.abs() + 2.0**-140).all()
    back = dequantize_nvfp4(packed, scale, g, torch.float32)
    assert torch.allclose(back.double(), value.flatten(1), rtol=3e-7, atol=2.0**-140)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(-100, 80))
def test_round_trip(seed, power):
    """What packed codes stand for is quantised to the same bytes, where every block uses its largest code."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (3, 64), generator=generator, dtype=torch.uint8)
    codes[codes == 8] = 0  # minus zero comes back as zero
    codes[:, ::16] = 7
    scale = E4M3[torch.randint(1, 127, (3, 4), generator=generator)].to(torch.float8_e4m3fn)
    g = torch.tensor(2.0**power)
    value = dequantize_nvfp4(pack(codes), scale, g, torch.float32)
    packed, again = quantize_nvfp4(value, g)
    assert packed.equal(pack(codes))
    assert again.view(torch.uint8).equal(scale.view(torch.uint8))


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4), (6.0, 6), (7.0, 6), (1e30, 6)],
)
def test_ties_go_to_the_even_code(value, rounded):
    """And a hair to either side of a tie goes to that side."""
    values = torch.tensor([value, -value])
    assert E2M1[encode_e2m1(values).long()].tolist() == [rounded, -rounded]
    if value < 6:
        below, above = torch.nextafter(values[:1], torch.zeros(1)), torch.nextafter(values[:1], torch.full((1,), 9.0))
        grid = E2M1[:8]
        assert E2M1[encode_e2m1(below).long()] == grid[grid <= value].max()
        assert E2M1[encode_e2m1(above).long()] == grid[grid >= value].min()


def test_packing():
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    assert pack(codes)[0, :2].tolist() == [0x10, 0x32]  # the earlier code in the low half
    assert unpack(pack(codes)).equal(codes)


def test_blocks_of_zero_and_of_next_to_nothing():
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16] = 2688.0, 1e-6
    packed, scale = quantize_nvfp4(x, torch.tensor(1.0))
    assert scale.float().tolist() == [[448, 2.0**-9, 1]]
    assert dequantize_nvfp4(packed, scale, torch.tensor(1.0), torch.float32).tolist()[0][0] == 2688
    assert not dequantize_nvfp4(packed, scale, torch.tensor(1.0), torch.float32)[0, 1:].any()


def test_values_beyond_the_scales():
    """A global scale that is too small for the data saturates; it never makes NaN."""
    x = torch.full((1, 16), 1e6)
    packed, scale = quantize_nvfp4(x, torch.tensor(1.0))
    assert dequantize_nvfp4(packed, scale, torch.tensor(1.0), torch.float32).unique().tolist() == [2688]
    assert dequantize_fp8(quantize_fp8(x, torch.tensor(1.0)), torch.tensor(1.0), torch.float32).unique().tolist() == [
        448
    ]


def test_rows_that_do_not_fit():
    with pytest.raises(ValueError, match=r"blocks of 16.*\(2, 24\)"):
        quantize_nvfp4(torch.ones(2, 24), torch.tensor(1.0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(-100, 60))
def test_fp8_is_the_nearest(seed, power):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    scale = x.abs().amax() / 448
    value = E4M3[quantize_fp8(x, scale).view(torch.uint8).long()] * scale.double()
    grid = E4M3[~E4M3.isnan()] * scale.double()
    best = (x.double().unsqueeze(-1) - grid).abs().amin(-1)
    assert ((x.double() - value).abs() <= best + 1e-6 * x.abs().double()).all()
