"""The linear map: the same numbers as torch's whichever product serves, with and without a gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.reference import linear as module
from nemotron_super.kernels_hub.reference.linear import linear, onednn_serves
from nemotron_super.modeling.linear import NemotronHLinear
from torch.utils.flop_counter import FlopCounterMode

onednn = pytest.mark.skipif(not module._HAS_ONEDNN, reason="this build of torch has no oneDNN for x86")


def tensors(rows, width, out, with_bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((*rows, width), (out, width), (out,)))
    return x, weight, bias if with_bias else None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    with_bias=st.booleans(),
    large=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradients(rows, width, out, with_bias, large, seed):
    x, weight, bias = tensors(rows, width, out, with_bias, seed)
    found_in, exact_in = [x, weight], [x.double(), weight.double()]
    if with_bias:
        found_in, exact_in = [*found_in, bias], [*exact_in, bias.double()]
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(module, "_SMALL", 0)  # even one row goes to oneDNN
        with torch.no_grad():
            inferred = linear(*found_in)
        found_in = [t.requires_grad_() for t in found_in]
        exact_in = [t.requires_grad_() for t in exact_in]
        found, exact = linear(*found_in), F.linear(*exact_in)
        upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
        grads = torch.autograd.grad(found, found_in, upstream)
        truths = torch.autograd.grad(exact, exact_in, upstream.double())
    assert found.shape == inferred.shape == exact.shape and found.dtype == torch.float32
    for a, b in zip((found, inferred, *grads), (exact, exact, *truths), strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm() + 1e-6


@pytest.mark.parametrize("rows", [1, 3])
def test_a_bias_with_gaps(rows):
    x, weight, bias = tensors([rows], 16, 8, True)
    apart = torch.zeros(8, 2)
    apart[:, 0] = bias
    torch.testing.assert_close(linear(x, weight, apart[:, 0]), F.linear(x, weight, bias))
    torch.testing.assert_close(linear(x, weight, bias[:1].expand(8)), F.linear(x, weight, bias[:1].repeat(8)))


def test_a_bias_that_alone_has_a_gradient():
    x, weight, bias = tensors([3], 16, 8, True)
    (grad,) = torch.autograd.grad(linear(x, weight, bias.requires_grad_()).sum(), bias)
    assert torch.equal(grad, torch.full((8,), 3.0))


@pytest.mark.parametrize("x, weight", [((1, 16), (8, 1)), ((1, 1), (8, 16)), ((3, 16), (8, 15))])
def test_widths_that_differ(x, weight):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.ones(x), torch.ones(weight))


@pytest.mark.parametrize("grad", [False, True])
def test_counters_and_transforms_see_the_product(grad):
    x, weight, _ = tensors([3], 16, 8, False)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        linear(x, weight.clone().requires_grad_(grad))
    assert counter.get_total_flops() == 2 * 3 * 16 * 8
    found = torch.func.grad(lambda w: linear(x, w).sum())(weight)
    torch.testing.assert_close(found, x.sum(0).expand(8, -1))


@onednn
def test_onednn_serves_only_what_it_can():
    x, weight, _ = tensors([4], 8, 6, False)
    assert onednn_serves(x, weight)
    assert not onednn_serves(x.bfloat16(), weight.bfloat16())
    assert not onednn_serves(x, weight.double())
    assert not onednn_serves(x.to("meta"), weight.to("meta"))
    assert not onednn_serves(x.as_subclass(type("Special", (torch.Tensor,), {})), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not onednn_serves(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_serves(x, weight)


@onednn
@pytest.mark.parametrize("rows, entries", [(1, 0), (1, 1 << 20), (5, 1 << 20)])
def test_which_product_serves(monkeypatch, rows, entries):
    monkeypatch.setattr(module, "_SMALL", entries)
    called: list[str] = []
    vecdot = torch.linalg.vecdot

    def noted(*args):
        called.append("sum")
        return vecdot(*args)

    monkeypatch.setattr(torch.linalg, "vecdot", noted)
    x, weight, bias = tensors([rows], 8, 6, True)
    with torch.no_grad():
        linear(x, weight, bias)
    assert called == (["sum"] if rows == 1 and entries else [])


def test_without_rows():
    x, weight, bias = tensors([0], 8, 6, True)
    assert linear(x, weight, bias).shape == (0, 6)


def test_frozen_weight_gets_no_gradient():
    x, weight, _ = tensors([3], 8, 6, False)
    (grad,) = torch.autograd.grad(linear(x.requires_grad_(), weight).sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(3, -1))


def test_module_is_a_linear():
    layer = NemotronHLinear(8, 6)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert isinstance(layer, torch.nn.Linear) and list(layer.state_dict()) == ["weight", "bias"]
