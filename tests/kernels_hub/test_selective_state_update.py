"""One step of the recurrence against its formula in float64, and against the scan."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference.selective_state_update import selective_state_update
from nemotron_super.kernels_hub.reference.ssd_chunk_scan import ssd_chunk_scan
from nemotron_super.kernels_hub.reference.time_step import step_and_decay


def formula(state, x, dt, A, B, C, D):
    """H' = exp(dt A) H + dt x B^T and y = H' C + D x, one head at a time."""
    new, y = torch.empty_like(state), torch.empty_like(x)
    per_group = x.shape[1] // B.shape[1]
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            step, group = dt[b, h], h // per_group
            new[b, h] = torch.exp(step * A[h]) * state[b, h] + step * torch.outer(x[b, h], B[b, group])
            y[b, h] = new[b, h] @ C[b, group] + D[h] * x[b, h]
    return y, new


def make_inputs(batch, groups, per_group, head_dim, state_size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = groups * per_group

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    dt = torch.rand(batch, heads, generator=generator, dtype=dtype)
    return [
        normal(batch, heads, head_dim, state_size),
        normal(batch, heads, head_dim),
        torch.where(dt < 0.3, dt * 1e-4, dt),
        -3 * torch.rand(heads, generator=generator, dtype=dtype),
        normal(batch, groups, state_size),
        normal(batch, groups, state_size),
        normal(heads),
    ]


sizes = {
    "batch": st.integers(1, 3),
    "groups": st.integers(1, 3),
    "per_group": st.integers(1, 3),
    "head_dim": st.integers(1, 4),
    "state_size": st.integers(1, 5),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**sizes)
def test_equals_the_formula(**shape):
    state, *rest = make_inputs(**shape)
    expected, expected_state = formula(state, *rest)
    y = selective_state_update(state, *rest)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-11, atol=1e-12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(length=st.integers(1, 9), **sizes)
def test_equals_the_scan(length, **shape):
    steps = [make_inputs(**{**shape, "seed": shape["seed"] + t}) for t in range(length)]
    state, _, _, A, _, _, D = steps[0]
    x, dt, B, C = (torch.stack([s[i] for s in steps], 1) for i in (1, 2, 4, 5))
    whole, end = ssd_chunk_scan(x, dt, A, B, C, D, 4, state)
    ours = [selective_state_update(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D) for t in range(length)]
    torch.testing.assert_close(torch.stack(ours, 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_time_step_of_zero_leaves_the_state_as_it_is(state_dtype):
    state, x, dt, A, B, C, D = make_inputs(2, 2, 2, 3, 4, torch.float32)
    state = state.to(state_dtype)
    before = state.clone()
    selective_state_update(state, x, torch.zeros_like(dt), A, B, C, D)
    assert torch.equal(state, before)


@pytest.mark.parametrize("apart", [lambda t: t.repeat_interleave(2, 1)[:, ::2], lambda t: t.mT.contiguous().mT])
def test_a_state_with_gaps(apart):
    state, x, *rest = make_inputs(2, 2, 2, 3, 4)
    y, new = formula(state, x, *rest)
    strided = apart(state)
    torch.testing.assert_close(selective_state_update(strided, x.mT.contiguous().mT, *rest), y)
    torch.testing.assert_close(strided, new)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, state_dtype):
    state, x, dt, A, B, C, D = make_inputs(2, 2, 3, 4, 5, torch.float32)
    state, x, B, C = state.to(state_dtype), x.to(dtype), B.to(dtype), C.to(dtype)
    expected, expected_state = formula(*(t.double() for t in (state, x, dt, A, B, C, D)))
    y = selective_state_update(state, x, dt, A, B, C, D)
    assert y.dtype == dtype and state.dtype == state_dtype
    # The output is read before the state is rounded, so only its own dtype limits it.
    assert (y - expected).norm() <= max(torch.finfo(dtype).eps, 1e-6) * expected.norm()
    assert (state - expected_state).norm() <= max(torch.finfo(state_dtype).eps, 1e-6) * expected_state.norm()


def test_time_steps_keep_float64():
    dt, bias, A_log = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 4), (4,), (4,)))
    assert torch.autograd.gradcheck(step_and_decay, (dt, bias, A_log))


def test_autocast_leaves_the_recurrence_alone():
    state, x, dt, A, B, C, D = (t.float() for t in make_inputs(2, 2, 2, 4, 5))
    results = []
    for autocast in (False, True):
        kept, leaf = state.clone(), x.unsqueeze(1).clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = selective_state_update(kept, x, dt, A, B, C, D)
            scanned = ssd_chunk_scan(leaf, dt.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), D)
            results.append((y, kept, *scanned, *torch.autograd.grad(scanned[0].square().sum(), leaf)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
