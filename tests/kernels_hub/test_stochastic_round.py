"""Stochastic rounding: between the neighbours, unbiased, exact where it can be, and repeatable."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference.replay import selective_state_replay
from nemotron_super.kernels_hub.reference.selective_state_update import selective_state_update
from nemotron_super.kernels_hub.reference.stochastic_round import stochastic_round, store_as

DTYPES = [torch.bfloat16, torch.float16]
every = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def all_values(dtype):
    """Every number of a 16-bit format, NaN and infinities too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@every
def test_what_is_representable_stays(dtype):
    values = all_values(dtype)
    for wide in (torch.float32, torch.float64):
        found = stochastic_round(values.to(wide), dtype)
        number = ~values.isnan()
        assert found[number].view(torch.int16).equal(values[number].view(torch.int16))  # the sign of zero too
        assert found[~number].isnan().all()


@every
@settings(max_examples=60, deadline=None, derandomize=True)
@given(exponent=st.integers(-26, 12), seed=st.integers(0, 2**16), wide=st.sampled_from([torch.float32, torch.float64]))
def test_unbiased_and_between_its_neighbours(dtype, exponent, seed, wide):
    """The mean over many draws is x within five standard errors, at every size, subnormal numbers included."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, generator=generator, dtype=wide) * 2.0**exponent
    draws = 4000
    found = stochastic_round(x.expand(draws, -1), dtype, generator).double()
    low, high = found.amin(0), found.amax(0)
    nearest = x.to(dtype)
    gap = 2.0 ** (
        nearest.double().abs().clamp(min=torch.finfo(dtype).tiny).log2().floor() + math.log2(torch.finfo(dtype).eps)
    )
    assert ((low <= x) & (x <= high)).all() and (high - low <= gap).all()
    error = (found.mean(0) - x.double()).abs()
    assert (error <= 5 * gap * 0.5 / math.sqrt(draws)).all()
    assert ((found == nearest.double()).double().mean(0) > 0.45).all()  # the nearer one is the likelier


@every
def test_the_chances(dtype):
    """A quarter of the way up is one in four."""
    step = torch.finfo(dtype).eps
    x = torch.full((40_000,), -1 - 0.25 * step)
    up = (stochastic_round(x, dtype, torch.Generator().manual_seed(0)) == -1 - step).double().mean().item()
    assert up == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 40_000))


def test_beyond_the_range():
    """As rounding to nearest: 65,519 is still the largest float16, 65,520 is not."""
    x = torch.tensor([65504.0, 65519.0, 65520.0, -1e6, math.inf, -math.inf])
    expected = [65504.0, 65504.0, math.inf, -math.inf, math.inf, -math.inf]
    assert stochastic_round(x, torch.float16).tolist() == x.half().tolist() == expected


@every
def test_repeatable(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def own(seed):
        return stochastic_round(x, dtype, generator=torch.Generator().manual_seed(seed))

    def shared(seed):
        torch.manual_seed(seed)
        return stochastic_round(x, dtype)

    for rounded in (own, shared):
        first, again, other = (rounded(seed) for seed in (1, 1, 2))
        assert first.equal(again) and not first.equal(other)


def test_only_where_there_is_something_to_round():
    x = torch.randn(100, dtype=torch.float64)
    assert store_as(x, torch.float32).equal(x.float()) and store_as(x, torch.float64) is x
    half = x.half()
    assert store_as(half, torch.float16) is half
    assert not store_as(x, torch.float16).equal(half)
    with pytest.raises(ValueError, match=r"`dtype` is torch\.float8"):
        stochastic_round(x, torch.float8_e4m3fn)


@every
def test_a_slow_state_keeps_moving(dtype):
    """The reason for it: terms below half a step. Rounded to nearest a state of 1 never leaves 1; here it arrives."""
    steps, add = 4000, torch.finfo(dtype).eps / 8
    state = torch.ones(1, 1, 8, 8, dtype=dtype)
    one, zero = torch.ones(1, 1, 8), torch.zeros(1)
    torch.manual_seed(0)
    for _ in range(steps):
        selective_state_update(state, one, torch.full((1, 1), add), zero, one, one, zero)
    assert (torch.ones((), dtype=dtype) + add).item() == 1
    assert state.float().mean().item() == pytest.approx(1 + steps * add, rel=0.02)


@every
def test_settled_tokens_are_rounded_once(dtype):
    """Many rows alike: each state is a neighbour of the exact one, their mean is it; outputs go on from the exact one."""
    generator = torch.Generator().manual_seed(0)
    row = [
        torch.randn(shape, generator=generator) for shape in ((1, 2, 4, 8), (1, 3, 2, 4), (1, 3, 1, 8), (1, 3, 1, 8))
    ]
    row[0] = row[0].to(dtype).float()
    rows = 4000
    steps, A, D = torch.full((1, 3, 2), 0.1), -torch.ones(2), torch.ones(2)

    def replayed(state, count):
        x, B, C = (t.expand(count, -1, -1, -1) for t in row[1:])
        return selective_state_replay(state, x, steps.expand(count, -1, -1), A, B, C, D, 2)

    exact, state = row[0].clone(), row[0].expand(rows, -1, -1, -1).to(dtype)
    expected = replayed(exact, 1).expand(rows, -1, -1, -1)
    torch.manual_seed(0)
    torch.testing.assert_close(replayed(state, rows), expected)
    gap = exact.abs().clamp(min=1e-3) * torch.finfo(dtype).eps
    found = state.float()
    assert (found - exact).abs().le(gap).all()
    assert (found.mean(0) - exact[0]).abs().le(gap[0] * 5 * 0.5 / math.sqrt(rows) + 1e-6).all()
