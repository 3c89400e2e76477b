"""Both norms against their formulas, differentiated by autograd, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference.rms_norm import gated_rms_norm, rms_norm


def formula(y, z, weight, eps, group_size):
    """w * v / sqrt(mean over the group of v^2 + eps), v = y * z * sigmoid(z)."""
    v = y if z is None else y * z * torch.sigmoid(z)
    groups = [g / (g.square().mean(-1, keepdim=True) + eps).sqrt() for g in v.split(group_size, dim=-1)]
    return weight * torch.cat(groups, -1)


def make_inputs(lead, width, dtype=torch.float64, seed=0, size=1.0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*lead, width), (*lead, width), (width,)]
    tensors = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    tensors[0] *= size
    return [t.requires_grad_(grad) for t in tensors]


leads = st.lists(st.integers(1, 4), min_size=1, max_size=3)
# 1e-3: there eps outweighs the mean square, so a misplaced eps shows.
sizes = st.sampled_from([1e-3, 1.0, 30.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lead=leads, groups=st.integers(1, 3), group_size=st.integers(1, 6), size=sizes, seed=st.integers(0, 2**16))
def test_gated_norm(lead, groups, group_size, size, seed):
    inputs = make_inputs(lead, groups * group_size, seed=seed, size=size)
    found, expected = gated_rms_norm(*inputs, 1e-5, group_size), formula(*inputs, 1e-5, group_size)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(gated_rms_norm(*inputs, 1e-5, group_size), found)
    upstream = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(o, inputs, upstream) for o in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lead=leads, width=st.integers(1, 9), size=sizes, seed=st.integers(0, 2**16))
def test_plain_norm(lead, width, size, seed):
    x, _, weight = make_inputs(lead, width, seed=seed, size=size)
    found, expected = rms_norm(x, weight, 1e-5), formula(x, None, weight, 1e-5, width)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5), found)
    upstream = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(o, [x, weight], upstream) for o in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_inputs_are_left_alone():
    inputs = make_inputs((2, 3), 8, torch.float32, grad=False)
    before = [t.clone() for t in inputs]
    gated_rms_norm(*inputs, 1e-5, 4)
    rms_norm(inputs[0], inputs[2], 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_single_row_has_no_dimension_to_spare():
    y, z, weight = make_inputs((), 8)
    assert torch.autograd.gradcheck(lambda y, weight: rms_norm(y, weight, 1e-5), (y, weight))
    assert torch.autograd.gradcheck(lambda *args: gated_rms_norm(*args, 1e-5, 4), (y, z, weight))


def test_rows_of_zeros():
    y, z, weight = (t.detach().mul(0).requires_grad_() for t in make_inputs((2,), 6))
    out = gated_rms_norm(y, z, weight, 1e-5, 3)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), [y, z, weight])))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, gated):
    leaves = [t.detach().to(dtype).requires_grad_() for t in make_inputs((5, 7), 64, torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out = gated_rms_norm(*leaves, 1e-5, 16) if gated else rms_norm(leaves[0], leaves[2], 1e-5)
    expected = formula(exact[0], exact[1] if gated else None, exact[2], 1e-5, 16 if gated else 64)
    used = [0, 1, 2] if gated else [0, 2]
    weights = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad((out * weights.to(dtype)).double().sum(), [leaves[i] for i in used])
    expected_grads = torch.autograd.grad((expected * weights.to(dtype)).sum(), [exact[i] for i in used])
    for a, b in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_registration(gated, grad, dtype):
    y, z, weight = make_inputs((2, 3), 8, dtype, grad=grad)
    torch.library.opcheck(
        torch.ops.nemotron_super.gated_rms_norm.default, (y, z if gated else None, weight, 1e-5, 4 if gated else 8)
    )
