"""The causal convolution against four nested loops' worth of plain indexing, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference.causal_conv1d import causal_conv1d, causal_conv1d_update


def loop(x, weight, bias=None, state=None, seq_idx=None):
    """out_t = silu(bias + sum_k w_k x_{t - (K - 1) + k}) over the positions of t's own document."""
    kernel = weight.shape[1]
    outputs = []
    for t in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0])
        for k in range(kernel):
            source = t - (kernel - 1) + k
            if source >= 0:
                value = x[:, source]
            elif state is not None:
                value = state[..., kernel + source]
            else:
                continue
            if seq_idx is not None:
                # What lies before the call belongs to the document of its first position.
                value = value * (seq_idx[:, max(source, 0)] == seq_idx[:, t]).unsqueeze(-1)
            total = total + weight[:, k] * value
        outputs.append(F.silu(total))
    return torch.stack(outputs, 1)


def make_inputs(batch, length, channels, kernel, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, channels), (channels, kernel), (channels,), (batch, channels, kernel)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes]


def documents(batch, length, seed):
    begins = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    return (begins.cumsum(1) * 7) % 13


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 11),
    channels=st.integers(1, 5),
    kernel=st.integers(2, 5),
    with_bias=st.booleans(),
    with_state=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_loop(batch, length, channels, kernel, with_bias, with_state, packed, seed):
    x, weight, bias, state = make_inputs(batch, length, channels, kernel, seed=seed)
    bias, state = bias if with_bias else None, state if with_state else None
    seq_idx = documents(batch, length, seed) if packed else None
    inputs = [t for t in (x, weight, bias, state) if t is not None]
    found, expected = (f(x, weight, bias, state, seq_idx) for f in (causal_conv1d, loop))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(causal_conv1d(x, weight, bias, state, seq_idx), expected, rtol=1e-10, atol=1e-11)
    upstream = torch.randn_like(found)
    grads = torch.autograd.grad(found, inputs, upstream)
    # With a sequence of one token some inputs reach the loop's output by no path at all.
    for a, b in zip(grads, torch.autograd.grad(expected, inputs, upstream, allow_unused=True), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_document(bad):
    x, weight = torch.randn(1, 9, 6, requires_grad=True), torch.randn(6, 4)
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1]])
    spoilt = x.detach().clone()
    spoilt[:, 4] = bad
    spoilt.requires_grad_()
    found, expected = (causal_conv1d(t, weight, None, None, ids)[:, 5:] for t in (spoilt, x))
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(t.sum(), leaf)[0][:, 5:] for t, leaf in ((found, spoilt), (expected, x))]
    torch.testing.assert_close(*grads)


def test_no_position_at_all():
    x, ids = torch.randn(2, 0, 6, requires_grad=True), torch.zeros(2, 0, dtype=torch.int64)
    weight = torch.randn(6, 4, requires_grad=True)
    out = causal_conv1d(x, weight, None, torch.randn(2, 6, 4), ids)
    assert out.shape == x.shape and not torch.autograd.grad(out.sum(), weight)[0].any()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(length=st.integers(1, 9), kernel=st.integers(2, 5), with_bias=st.booleans(), seed=st.integers(0, 2**16))
def test_token_by_token_equals_the_sequence(length, kernel, with_bias, seed):
    x, weight, bias, state = make_inputs(2, length, 3, kernel, seed=seed, grad=False)
    bias = bias if with_bias else None
    whole = causal_conv1d(x, weight, bias, state)
    past = state.clone()
    steps = [causal_conv1d_update(past, x[:, t], weight, bias) for t in range(length)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-10, atol=1e-11)
    assert torch.equal(past, torch.cat([state, x.mT], -1)[..., -kernel:])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(length=st.integers(2, 12), data=st.data())
def test_a_sequence_in_two_calls(length, data):
    x, weight, bias, state = make_inputs(2, length, 3, 4, grad=False)
    cut = data.draw(st.integers(1, length - 1))
    first = causal_conv1d(x[:, :cut], weight, bias, state)
    handed_on = torch.cat([state, x[:, :cut].mT], -1)[..., -4:]
    second = causal_conv1d(x[:, cut:], weight, bias, handed_on)
    torch.testing.assert_close(
        torch.cat([first, second], 1), causal_conv1d(x, weight, bias, state), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_low_precision(dtype, packed):
    leaves = [t.detach().to(dtype).requires_grad_() for t in make_inputs(2, 33, 6, 4, torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    seq_idx = documents(2, 33, 0) if packed else None
    out, expected = causal_conv1d(*leaves, seq_idx), loop(*exact, seq_idx)
    grads = torch.autograd.grad(out.double().square().sum(), leaves)
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    for a, b in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= torch.finfo(dtype).eps * b.norm()


def test_low_precision_update_keeps_the_dtypes():
    x, weight, bias, state = (t.detach() for t in make_inputs(2, 1, 6, 4, torch.float32))
    state = state.bfloat16()
    expected = loop(x.bfloat16().double(), weight.double(), bias.double(), state.double())[:, 0]
    out = causal_conv1d_update(state, x[:, 0].bfloat16(), weight, bias)
    assert out.dtype == state.dtype == torch.bfloat16
    assert (out - expected).norm() <= torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.parametrize("case", ["plain", "state", "packed", "no_bias", "one_token"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_registration(case, grad, dtype):
    length = 1 if case == "one_token" else 7
    x, weight, bias, state = make_inputs(2, length, 3, 4, dtype, grad=grad)
    arguments = (
        x,
        weight,
        None if case == "no_bias" else bias,
        state if case in ("state", "one_token") else None,
        documents(2, length, 0) if case == "packed" else None,
    )
    torch.library.opcheck(torch.ops.nemotron_super.causal_conv1d.default, arguments)
    x, weight, *others = (None if t is None else t.detach() for t in arguments)
    torch.library.opcheck(
        torch.ops.nemotron_super.causal_conv1d_backward.default,
        (torch.ones_like(x), x, weight.t().contiguous().t(), *others),
    )
