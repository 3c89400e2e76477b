"""Routed experts against a loop over tokens and choices, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference import moe_experts as module
from nemotron_super.kernels_hub.reference.moe_experts import moe_experts
from torch.utils._python_dispatch import TorchDispatchMode


def loop(x, index, weights, up, down):
    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[token])
        for choice, expert in enumerate(index[token].tolist()):
            total = total + weights[token, choice] * (down[expert] @ (up[expert] @ x[token]).relu().square())
        rows.append(total)
    return torch.stack(rows)


def make_inputs(tokens, top_k, experts, width, intermediate, routing="any", dtype=torch.float64, seed=0, grad=True):
    """`routing`: "any"; "one", all tokens on the same experts; "avoid", expert 0 gets none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)

    first = 1 if routing == "avoid" and experts > top_k else 0
    choices = [torch.randperm(experts - first, generator=generator)[:top_k] + first for _ in range(tokens)]
    index = torch.stack([choices[0]] * tokens if routing == "one" else choices)
    weights = normal(tokens, top_k, dtype=torch.promote_types(dtype, torch.float32))
    return (
        normal(tokens, width),
        index,
        weights,
        normal(experts, intermediate, width),
        normal(experts, width, intermediate),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([1, 2, 3, 4, 7, 20]),
    experts=st.integers(1, 6),
    data=st.data(),
    width=st.integers(1, 5),
    intermediate=st.integers(1, 5),
    routing=st.sampled_from(["any", "one", "avoid"]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_loop(tokens, experts, data, width, intermediate, routing, seed):
    top_k = data.draw(st.integers(1, experts))
    inputs = make_inputs(tokens, top_k, experts, width, intermediate, routing, seed=seed)
    index, leaves = inputs[1], [inputs[i] for i in (0, 2, 3, 4)]
    found, expected = moe_experts(*inputs), loop(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(moe_experts(*inputs), expected.detach(), rtol=1e-10, atol=1e-11)
    upstream = torch.randn_like(found)
    grads = torch.autograd.grad(found, leaves, upstream)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    unused = [e for e in range(experts) if not (index == e).any()]
    assert not grads[2][unused].any() and not grads[3][unused].any()


def test_no_tokens_with_a_gradient():
    x, index, weights, up, down = make_inputs(1, 2, 4, 6, 3)
    x = x.detach()[:0].requires_grad_()
    grads = torch.autograd.grad(moe_experts(x, index[:0], weights[:0], up, down).sum(), [x, up, down])
    assert grads[0].shape == (0, 6) and not any(g.any() for g in grads[1:])


def test_inputs_are_left_alone():
    inputs = make_inputs(9, 2, 4, 5, 6, dtype=torch.float32, grad=False)
    before = [t.clone() for t in inputs]
    moe_experts(*inputs)
    moe_experts(*(t[:1] if i < 3 else t for i, t in enumerate(inputs)))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_low_precision(tokens, grad):
    inputs = make_inputs(tokens, 3, 5, 16, 12, dtype=torch.bfloat16, grad=grad)
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    with torch.set_grad_enabled(grad):
        out = moe_experts(*inputs)
    expected = loop(*exact)
    # The hidden activations are rounded too, and squaring doubles their error.
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() <= rounding * expected.norm()
    if grad:
        leaves, exact_leaves = ([t for t in ts if t.is_floating_point()] for ts in (inputs, exact))
        grads = torch.autograd.grad(out.double().sum(), leaves)
        for leaf, a, b in zip(leaves, grads, torch.autograd.grad(expected.sum(), exact_leaves), strict=True):
            assert a.dtype == leaf.dtype
            assert (a - b).norm() <= rounding * b.norm()


class Zeros(TorchDispatchMode):
    """Shapes of the zeros that are made while it is entered."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.zeros.default:
            self.shapes.append(tuple(args[0]))
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_made_up_for_what_the_backward_keeps():
    out = moe_experts(*make_inputs(9, 2, 5, 6, 4))
    with Zeros() as zeros:
        out.sum().backward()
    assert (18, 4) not in zeros.shapes


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_registration(tokens, grad, dtype):
    inputs = make_inputs(tokens, 2, 5, 6, 4, "avoid", dtype, grad=grad)
    torch.library.opcheck(torch.ops.nemotron_super.moe_experts.default, inputs)


def test_large_experts_are_not_copied(monkeypatch):
    """Few tokens of a large model must not hold all their experts' matrices a second time."""
    x, up, down = torch.randn(3, 8), torch.randn(5, 6, 8), torch.randn(5, 8, 6)
    index, weights = torch.tensor([[0, 4], [1, 4], [2, 0]]), torch.rand(3, 2)
    with torch.no_grad():
        copied = module.moe_experts(x, index, weights, up, down)
        monkeypatch.setattr(module, "_COPIED", 6 * 6 * 8 - 1)
        monkeypatch.setattr(module, "_few_tokens", lambda *args: pytest.fail("the matrices were copied"))
        torch.testing.assert_close(module.moe_experts(x, index, weights, up, down), copied, rtol=1e-5, atol=1e-5)
