"""Products that go on in their own kernel, and what keeps them from it."""

from types import SimpleNamespace

import pytest
import torch
from nemotron_super.configuration.presets import preset
from nemotron_super.modeling import linear as linear_maps
from nemotron_super.modeling.latent_moe import NemotronHMoE
from nemotron_super.modeling.linear import NemotronHLinear, product_of
from torch import nn


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return NemotronHLinear(8, 6)


@pytest.fixture
def fused(linear, monkeypatch):
    """Whether the last call of `product_of` went to the module's own product."""
    calls = []
    product = NemotronHLinear.product

    def noted(self, *args):
        calls.append(True)
        return product(self, *args)

    monkeypatch.setattr(NemotronHLinear, "product", noted)
    return calls


def expected(module, x, relu2, terms):
    out = module(x)
    out = out.relu().square() if relu2 else out
    for term in terms:
        out = term + out
    return out


@pytest.mark.parametrize("relu2", [False, True])
@pytest.mark.parametrize("terms", [0, 1, 2])
def test_as_one_after_another(linear, fused, relu2, terms):
    x, plus = torch.randn(2, 3, 8), tuple(torch.randn(2, 3, 6) for _ in range(terms))
    with torch.no_grad():
        found = product_of(linear, x, relu2, (*plus, None))
        assert torch.equal(found, expected(linear, x, relu2, plus))
    assert fused


def test_gradients_reach_everything(linear, fused):
    x, term = torch.randn(3, 8, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    product_of(linear, x, True, (term,)).sum().backward()
    assert x.grad.any() and term.grad.eq(1).all() and linear.weight.grad.any() and not fused


def hooked(module):
    module.register_forward_hook(lambda _, __, out: out + 1)


def prepared(module):
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))


def replaced(module):
    forward = module.forward
    module.forward = lambda x: forward(x) + 1


@pytest.mark.parametrize("change", [hooked, prepared, replaced])
def test_whatever_has_a_hand_in_the_output_sees_it_alone(linear, fused, change):
    change(linear)
    x, term = torch.randn(3, 8), torch.randn(3, 6)
    with torch.no_grad():
        found = product_of(linear, x, False, (term,))
        assert torch.equal(found, term + linear(x)) and not fused


def test_other_modules(fused):
    class Twice(NemotronHLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, term = torch.randn(3, 8), torch.randn(3, 6)
    with torch.no_grad():
        for module in (Twice(8, 6), nn.Linear(8, 6)):
            assert torch.equal(product_of(module, x, False, (term,)), term + module(x))
        assert torch.equal(product_of(nn.Identity(), term, True), term.relu().square())
    assert not fused


def test_many_tokens_go_the_usual_way(linear, fused):
    with torch.no_grad():
        product_of(linear, torch.randn(65, 8))
    assert not fused


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A product may add itself to a term; on a CPU it is left alone."""
    allowed = linear_maps._adds_up

    def told(x, weight, term):
        gpu = SimpleNamespace(is_cuda=True, device=x.device, dtype=x.dtype, dim=x.dim)
        return allowed(gpu, weight, term)

    monkeypatch.setattr(linear_maps, "_adds_up", told)


def test_a_product_adds_itself_to_a_term(linear, as_on_a_gpu):
    x, term, other = torch.randn(70, 8), torch.randn(70, 6), torch.randn(70, 6)
    bare = NemotronHLinear(8, 6, bias=False)
    with torch.no_grad():
        for plus in ((term, other), (term, None), (term,)):
            kept = term.clone()
            found = product_of(bare, x, plus=(kept, *plus[1:]), overwrite=True)
            torch.testing.assert_close(found, expected(bare, x, False, [t for t in plus if t is not None]))
            torch.testing.assert_close(kept, expected(bare, x, False, [term]))  # the product is in its place
        kept = term.clone()
        for again in (
            lambda: product_of(bare, x, plus=(kept,)),  # not allowed to
            lambda: product_of(linear, x, plus=(kept,), overwrite=True),  # more than a product
            lambda: product_of(bare, x, True, (kept,), True),
            lambda: product_of(bare, x.view(7, 10, 8), plus=(kept.view(7, 10, 6),), overwrite=True),
        ):
            again()
            assert torch.equal(kept, term)
    product_of(bare, x, plus=(kept,), overwrite=True).sum().backward()
    assert torch.equal(kept, term) and bare.weight.grad.any()


@pytest.mark.parametrize("change", [hooked, prepared, replaced])
def test_what_others_may_have_kept_is_not_overwritten(change, as_on_a_gpu):
    torch.manual_seed(0)
    moe = NemotronHMoE(preset("tiny"))
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, kept = torch.randn(70, moe.gate.weight.shape[1]), []
    with torch.no_grad():
        plain = moe(x, residual=x)
        for module in (moe.shared_experts, moe.shared_experts.down_proj):
            assert moe._shared_unseen()
            change(module)
            assert not moe._shared_unseen()
            vars(module).pop("forward", None)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        moe.shared_experts.register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
        found = moe(x, residual=x)
    assert torch.equal(*kept[0])
    torch.testing.assert_close(found, plain)
