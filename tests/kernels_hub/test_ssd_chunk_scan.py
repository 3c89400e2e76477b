"""The chunked scan against the recurrence written as a loop, in float64, and its bounds on memory."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference import ssd_chunk_scan as module
from nemotron_super.kernels_hub.reference.ssd_chunk_scan import ssd_chunk_scan

CHUNK = 8


def loop(x, dt, A, B, C, D, initial_state=None, seq_idx=None):
    """H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T;  y_t = H_t C_t + D x_t, one position after another."""
    batch, length, heads, head_dim = x.shape
    repeats = heads // B.shape[2]
    B, C = B.repeat_interleave(repeats, 2), C.repeat_interleave(repeats, 2)
    state = x.new_zeros(batch, heads, head_dim, B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).view(-1, 1, 1, 1)
        update = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(2)
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + update
        outputs.append((state * C[:, t].unsqueeze(2)).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def make_inputs(batch, length, groups, per_group, head_dim, state_size, dtype=torch.float64, seed=0, grad=True):
    """Inputs x, dt, A, B, C, D and an initial state. Some time steps are far below 1e-3, some are zero."""
    generator = torch.Generator().manual_seed(seed)
    heads = groups * per_group

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    dt = torch.rand(batch, length, heads, generator=generator, dtype=dtype)
    dt = torch.where(dt < 0.2, dt * 1e-3, dt) * (dt > 0.1)
    tensors = [
        normal(batch, length, heads, head_dim),
        dt,
        -3 * torch.rand(heads, generator=generator, dtype=dtype),
        normal(batch, length, groups, state_size),
        normal(batch, length, groups, state_size),
        normal(heads),
        normal(batch, heads, head_dim, state_size),
    ]
    return [t.requires_grad_(grad) for t in tensors]


@st.composite
def shapes(draw):
    return {
        "batch": draw(st.integers(1, 3)),
        "length": draw(st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3, 37])),
        "groups": draw(st.integers(1, 2)),
        "per_group": draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 3)),
        "state_size": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**16)),
    }


def documents(shape, generator_seed):
    """Ids that are equal within a document and in no particular order between documents."""
    generator = torch.Generator().manual_seed(generator_seed)
    begins = torch.rand(shape["batch"], shape["length"], generator=generator) < 0.25
    return (begins.cumsum(1) * 7) % 13


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=shapes(),
    chunk=st.sampled_from([1, 3, CHUNK, 64]),
    budget=st.sampled_from([1, 1 << 9, 1 << 18]),
    with_state=st.booleans(),
    packed=st.booleans(),
)
def test_equals_the_loop(shape, chunk, budget, with_state, packed):
    *tensors, state = make_inputs(**shape)
    state = state if with_state else None
    seq_idx = documents(shape, shape["seed"]) if packed else None
    inputs = [*tensors, state] if with_state else tensors
    expected = loop(*tensors, state, seq_idx)
    with mock.patch.dict(module._DECAY_BUDGET, {"cpu": budget}):
        found = ssd_chunk_scan(*tensors, chunk, state, seq_idx)
        with torch.no_grad():
            plain = ssd_chunk_scan(*tensors, chunk, state, seq_idx)
        weights = [torch.randn_like(t) for t in expected]
        grads = torch.autograd.grad(sum((f * w).sum() for f, w in zip(found, weights, strict=True)), inputs)
    expected_grads = torch.autograd.grad(sum((e * w).sum() for e, w in zip(expected, weights, strict=True)), inputs)
    for a, b in zip([*found, *plain, *grads], [*expected, *expected, *expected_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch, length", [(2, 0), (0, 3), (0, 0)])
def test_nothing_to_scan(batch, length):
    *inputs, initial = make_inputs(batch, length, 2, 2, 3, 4)
    y, state = ssd_chunk_scan(*inputs, CHUNK, initial)
    assert y.shape == (batch, length, 4, 3) and torch.equal(state, initial)
    *grads, grad_initial = torch.autograd.grad(y.sum() + state.sum(), [*inputs, initial])
    assert torch.equal(grad_initial, torch.ones_like(state)) and not any(g.any() for g in grads)


@pytest.mark.parametrize("dt, A", [(1e6, -1.0), (1e30, -1.0), (1.0, -1e38), (100.0, -1e38)])
def test_a_step_that_forgets_everything(dt, A):
    """In float32 what comes behind it is as exact as ever, and nothing is infinite."""
    inputs = [t.detach().float() for t in make_inputs(1, 9, 1, 2, 3, 4)[:6]]
    inputs[1][:, 3:5], inputs[2][:] = dt, A
    leaves = [[t.to(d).requires_grad_() for t in inputs] for d in (torch.float32, torch.float64)]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
    found, exact = ssd_chunk_scan(*leaves[0], CHUNK), loop(*leaves[1])
    grads = torch.autograd.grad(found[0], leaves[0], upstream)
    truths = torch.autograd.grad(exact[0], leaves[1], upstream.double())
    for a, b in zip((*found, *grads), (*exact, *truths), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output):
    *tensors, state = make_inputs(2, 19, 2, 2, 3, 4)
    found = torch.autograd.grad(ssd_chunk_scan(*tensors, CHUNK, state)[output].square().sum(), [tensors[0], state])
    expected = torch.autograd.grad(loop(*tensors, state)[output].square().sum(), [tensors[0], state])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=shapes(), data=st.data())
def test_a_sequence_in_two_calls(shape, data):
    *tensors, state = make_inputs(**{**shape, "length": shape["length"] + 1, "grad": False})
    cut = data.draw(st.integers(1, shape["length"]))
    x, dt, A, B, C, D = tensors
    whole, end = ssd_chunk_scan(*tensors, CHUNK, state)
    first, middle = ssd_chunk_scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, CHUNK, state)
    second, last = ssd_chunk_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, CHUNK, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(last, end, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, CHUNK, 3 * CHUNK + 1])
def test_time_steps_of_zero_leave_the_state_as_it_is(length):
    x, dt, A, B, C, D, state = make_inputs(2, length, 2, 2, 3, 4, torch.float32, grad=False)
    _, end = ssd_chunk_scan(x, torch.zeros_like(dt), A, B, C, D, CHUNK, state)
    assert torch.equal(end, state)


def test_time_steps_of_zero_are_as_if_the_position_were_not_there():
    x, dt, A, B, C, D, state = make_inputs(1, 30, 1, 2, 3, 4, grad=False)
    kept = torch.rand(30, generator=torch.Generator().manual_seed(1)) < 0.6
    dt = dt * kept[None, :, None]
    y, end = ssd_chunk_scan(x, dt, A, B, C, D, CHUNK, state)
    short_y, short_end = ssd_chunk_scan(x[:, kept], dt[:, kept], A, B[:, kept], C[:, kept], D, CHUNK, state)
    torch.testing.assert_close(y[:, kept], short_y, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(end, short_end, rtol=1e-10, atol=1e-11)


def test_large_decays_stay_finite():
    x, dt, A, B, C, D, state = make_inputs(1, 40, 1, 2, 3, 4, torch.float32)
    with torch.no_grad():
        dt.mul_(1e4)
    y, end = ssd_chunk_scan(x, dt, A, B, C, D, CHUNK, state)
    grads = torch.autograd.grad(y.sum() + end.sum(), [x, dt, A, B, C, D, state])
    assert all(t.isfinite().all() for t in (y, end, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(dtype):
    x, dt, A, B, C, D, state = make_inputs(2, 75, 2, 3, 4, 5, torch.float32)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, B, C)]
    y, end = ssd_chunk_scan(leaves[0], dt, A, *leaves[1:], D, CHUNK, state)
    assert y.dtype == dtype and end.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in leaves]
    rest = [t.detach().double() for t in (dt, A, D, state)]
    expected, expected_end = loop(exact[0], rest[0], rest[1], *exact[1:], rest[2], rest[3])
    grads = torch.autograd.grad(y.double().square().sum(), leaves)
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    rounding = torch.finfo(dtype).eps
    assert (end - expected_end).norm() <= 1e-5 * expected_end.norm()
    for a, b in zip([y, *grads], [expected, *expected_grads], strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= rounding * b.norm()


@pytest.mark.parametrize("steps", [(1e-4, 1e-3), (1e-3, 0.1), (0.1, 1.0)])
@pytest.mark.parametrize("length, chunk", [(2, 1), (200, 64)])
def test_float32_gradients_of_the_decay(length, chunk, steps):
    """d dt and d A are differences of large sums: each must be taken so that rounding does not remain of them."""
    x, dt, A, B, C, D, _ = make_inputs(1, length, 2, 4, 16, 32, torch.float32)
    with torch.no_grad():
        dt.copy_(steps[0] * (steps[1] / steps[0]) ** torch.rand(dt.shape, generator=torch.Generator().manual_seed(1)))
        A.copy_(torch.linspace(-16, -1, 8))
    tensors = [x, dt, A, B, C, D]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((ssd_chunk_scan(*tensors, chunk)[0] * weights).sum(), tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad((loop(*exact)[0] * weights).sum(), exact)
    naive = torch.autograd.grad((loop(*tensors)[0] * weights).sum(), tensors)
    for name, a, b, plain in zip(("x", "dt", "A", "B", "C", "D"), found, expected, naive, strict=True):
        error, plain_error = ((t - b).norm() / b.norm() for t in (a, plain))
        assert error <= 2 * plain_error + 1e-5, name


def largest_allocation(length, backward):
    """Bytes of the largest tensor allocated by one call, on inputs far smaller than a step's temporaries."""
    *tensors, state = make_inputs(1, length, 1, 8, 2, 2, torch.float32)
    y, end = ssd_chunk_scan(*tensors, 64, state)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        if backward:
            torch.autograd.grad(y.sum() + end.sum(), [*tensors, state])
        else:
            ssd_chunk_scan(*tensors, 64, state)
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("backward", [False, True])
def test_largest_temporary_does_not_grow_with_the_sequence(backward):
    short, long = largest_allocation(1024, backward), largest_allocation(4096, backward)
    # A step over chunks repeats identically, so not even its rounding differs.
    assert short == long
    assert long <= 4 * module._DECAY_BUDGET["cpu"]  # float32
    with mock.patch.dict(module._DECAY_BUDGET, {"cpu": 1 << 40}):
        assert largest_allocation(4096, backward) > 4 * long, "the measure is blind"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_operator_registration(packed, grad):
    *tensors, state = make_inputs(2, 11, 2, 2, 3, 4, torch.float32, grad=grad)
    seq_idx = documents({"batch": 2, "length": 11}, 0) if packed else None
    torch.library.opcheck(
        torch.ops.nemotron_super.ssd_chunk_scan.default, (*tensors, CHUNK, None if packed else state, seq_idx)
    )


def test_operator_registration_low_precision():
    x, dt, A, B, C, D, _ = make_inputs(2, 11, 2, 2, 3, 4, torch.float32)
    x, B, C = (t.detach().bfloat16().requires_grad_() for t in (x, B, C))
    torch.library.opcheck(torch.ops.nemotron_super.ssd_chunk_scan.default, (x, dt, A, B, C, D, CHUNK, None, None))
