"""Products of the same tokens that are taken together, and what keeps them apart."""

import pytest
import torch
from nemotron_super import NVFP4Config, quantize_model
from nemotron_super.modeling import latent_moe, linear
from nemotron_super.modeling.attention import NemotronHAttention
from nemotron_super.modeling.latent_moe import NemotronHMoE
from nemotron_super.modeling.linear import NemotronHLinear, products_of
from nemotron_super.modeling.quantized_layers import CacheScaledLinear
from peft import LoraConfig, get_peft_model
from torch import nn

SIZES = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 16}


def hooked(module):
    module.register_forward_hook(lambda _, __, out: out)


def prepared(module):
    module.register_forward_pre_hook(lambda _, args: args)


def replaced(module):
    module.forward = module.forward


UNTOUCHED, TOUCHED = [lambda module: None], [hooked, prepared, replaced]


@pytest.fixture
def moe(make_model):
    return next(m for m in make_model("E", **SIZES).modules() if isinstance(m, NemotronHMoE))


@pytest.fixture
def routed(monkeypatch):
    """What `route_few_tokens` was given to narrow tokens by, call by call."""
    calls, route = [], latent_moe.route_few_tokens

    def noted(*args):
        calls.append(args[3])
        return route(*args)

    monkeypatch.setattr(latent_moe, "route_few_tokens", noted)
    return calls


def one_by_one(moe, tokens):
    _, weights, index = moe.gate(tokens)
    return moe.fc2_latent_proj(moe.experts(moe.fc1_latent_proj(tokens), index, weights)) + moe.shared_experts(tokens)


@torch.no_grad()
@pytest.mark.parametrize("change", UNTOUCHED + TOUCHED)
@pytest.mark.parametrize("what", ["gate", "fc1_latent_proj"])
def test_the_router_and_what_narrows(moe, routed, what, change):
    change(getattr(moe, what))
    tokens = torch.randn(3, 32)
    expected = one_by_one(moe, tokens)
    assert not routed
    assert torch.allclose(moe(tokens), expected, rtol=1e-6, atol=1e-7)
    if change in UNTOUCHED:
        assert routed[0] is moe.fc1_latent_proj.weight
    else:
        assert routed == ([] if what == "gate" else [None])


@torch.no_grad()
def test_many_tokens_and_gradients_go_the_usual_way(moe, routed):
    moe(torch.randn(65, 32))
    with torch.enable_grad():
        moe(torch.randn(3, 32)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        moe(torch.randn(3, 32))
    assert not routed and moe.gate.weight.grad.any()


@torch.no_grad()
def test_other_maps_narrow_alone(make_model, routed):
    """Quantised, with an adapter, and none at all."""
    tokens = torch.randn(3, 32)
    adapted = get_peft_model(
        make_model("E", **SIZES), LoraConfig(target_modules=["fc1_latent_proj"], init_lora_weights=False)
    )
    for model in (
        quantize_model(make_model("E", **SIZES), NVFP4Config(recipe="fp8")),
        adapted,
        make_model("E", **SIZES | {"moe_latent_size": None}),
    ):
        moe = next(m for m in model.modules() if isinstance(m, NemotronHMoE))
        moe.eval()
        torch.testing.assert_close(moe(tokens), one_by_one(moe, tokens), rtol=1e-5, atol=1e-6)
    assert routed == [None] * 3 and isinstance(moe.fc1_latent_proj, nn.Identity)


@torch.no_grad()
def test_logits_that_are_asked_for(make_model, routed):
    """They come from hooks, which the router must not go around."""
    model, ids = make_model("E", **SIZES), torch.tensor([[3, 4, 5]])
    expected = model(ids).logits
    assert len(routed) == 1
    out = model(ids, output_router_logits=True)
    assert len(out.router_logits) == 1 and len(routed) == 1
    torch.testing.assert_close(out.logits, expected)


@pytest.fixture
def joined(monkeypatch):
    """The numbers of weights that were multiplied by at once, call by call."""
    calls, join = [], linear.joint_linear

    def noted(x, weights):
        calls.append(len(weights))
        return join(x, weights)

    monkeypatch.setattr(linear, "joint_linear", noted)
    return calls


def maps(kind=NemotronHLinear, **options):
    torch.manual_seed(0)
    return [NemotronHLinear(8, 6, bias=False), kind(8, 4, bias=False, **options), NemotronHLinear(8, 5, bias=False)]


class Doubled(NemotronHLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def simulating():
    modules = maps(CacheScaledLinear)
    modules[1].add_cache_scale("k_scale")
    modules[1].k_scale.fill_(0.1)
    modules[1].simulate_activations = True
    return modules


def with_bias():
    modules = maps()
    modules[2] = NemotronHLinear(8, 5)
    return modules


@torch.no_grad()
@pytest.mark.parametrize("make", [maps, lambda: maps(CacheScaledLinear)], ids=["plain", "with a cache's scale"])
def test_maps_of_the_same_tokens(make, joined):
    modules, x = make(), torch.randn(2, 3, 8)
    found = products_of(modules, x)
    assert joined == [3]
    for module, out in zip(modules, found, strict=True):
        assert torch.equal(out, module(x))
    assert len(products_of(modules, torch.randn(65, 8))) == 3 and joined == [3]
    with torch.enable_grad():
        sum(out.sum() for out in products_of(modules, x)).backward()
    assert joined == [3] and all(module.weight.grad.any() for module in modules)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: maps(Doubled), lambda: maps(nn.Linear), simulating, with_bias])
def test_maps_that_do_more(make, joined):
    modules, x = make(), torch.randn(3, 8)
    for module, out in zip(modules, products_of(modules, x), strict=True):
        assert torch.equal(out, module(x))
    assert not joined


@torch.no_grad()
@pytest.mark.parametrize("change", UNTOUCHED + TOUCHED)
def test_queries_keys_and_values(make_model, joined, change):
    model = make_model("*")
    attention = next(m for m in model.modules() if isinstance(m, NemotronHAttention))
    change(attention.k_proj)
    model(torch.tensor([[3, 4, 5]]))
    assert joined == ([3] if change in UNTOUCHED else [])
