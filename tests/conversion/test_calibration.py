"""Scales measured on sample text: those that the dequantised model's own activations give."""

import copy
import dataclasses
import json

import pytest
import torch
from nemotron_super import (
    NemotronHForCausalLM,
    NVFP4Config,
    calibrate,
    quantize_activations,
    quantize_model,
    simulate_activations,
)
from nemotron_super.modeling.latent_moe import NemotronHExperts
from nemotron_super.modeling.quantized_layers import CacheScaledLinear, QuantizedExperts, QuantizedLinear
from nemotron_super.training.lora import add_lora
from safetensors.torch import load_file

SIZES = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 32, "intermediate_size": 48}
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


@pytest.fixture
def quantized(make_model):
    return lambda recipe: quantize_model(make_model("ME*-ME", seed=5, **MTP, **SIZES), NVFP4Config(recipe=recipe))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 61, (2, 9), generator=generator) for _ in range(3)]


@torch.no_grad()
def measured(model, batches):
    """Largest magnitude of what every linear map and both projections of the experts take in; of keys and values too."""
    largest: dict[str, float] = {}

    def note(name, x):
        largest[name] = max(largest.get(name, 0.0), x.abs().max().item())

    def experts(name, module, inputs):
        x, index, _ = inputs
        note(f"{name}.up_proj", x)
        for token, chosen in zip(x, index.tolist(), strict=True):
            for expert in chosen:
                note(f"{name}.down_proj", (module.up_proj[expert] @ token).relu().square())

    def linear(name, inputs, output):
        note(name, inputs[0])
        note(f"{name} out", output)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, x, y, n=name: linear(n, x, y))
        elif isinstance(module, NemotronHExperts):
            module.register_forward_pre_hook(lambda m, x, n=name: experts(n, m, x))
    for batch in batches:
        model(batch)
    return largest


@pytest.mark.parametrize(("recipe", "divisor"), [("nvfp4", 6 * 448), ("fp8", 448)])
def test_scales(recipe, divisor, quantized, batches):
    twin = quantized(recipe)
    twin.dequantize()
    largest = measured(twin, batches)
    model = calibrate(quantized(recipe), iter(batches))
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.input_scale.item() == pytest.approx(largest[name] / divisor, rel=1e-4), name
            seen += 1
        elif isinstance(module, QuantizedExperts):
            for projection in ("up_proj", "down_proj"):
                scales = getattr(module, f"{projection}_input_scale")
                assert scales.unique().tolist() == [pytest.approx(largest[f"{name}.{projection}"] / divisor, rel=1e-4)]
            seen += 1
    assert seen == 20  # 2 x 2 of Mamba, 4 of attention, 2 of the MLP, 2 x 5 of the MoE
    attention = model.model.layers[2].mixer
    for letter, projection in (("k", attention.k_proj), ("v", attention.v_proj)):
        scale = getattr(projection, f"{letter}_scale").item()
        assert scale == pytest.approx(largest[f"model.layers.2.mixer.{letter}_proj out"] / 448, rel=1e-4)


def test_saved_and_reopened(quantized, batches, tmp_path):
    """With cache scales where wanted; MTP, which no token reached, has none."""
    for cache in (False, True):
        model = quantized("release").bfloat16()
        model.config = copy.deepcopy(
            model.config
        )  # as some tools do it; the copy learns of the cache when it is saved
        calibrate(model, batches, cache=cache).save_pretrained(tmp_path)
        described = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
        assert described["kv_cache_quant_algo"] == ("FP8" if cache else None)
        names = {n for n in load_file(tmp_path / "model.safetensors") if n.endswith(("k_scale", "v_scale"))}
        assert names == ({f"backbone.layers.2.mixer.{x}_proj.{x}_scale" for x in "kv"} if cache else set())
        again = NemotronHForCausalLM.from_pretrained(tmp_path)
        assert again.model.layers[0].mixer.in_proj.input_scale != 1


@torch.no_grad()
def test_measured_scales_serve_better(quantized, batches, relative):
    """Activations in FP8 lose less with measured scales than with scales far off."""
    model = quantized("fp8")
    exact = model(batches[0]).logits
    calibrate(model, batches)
    simulate_activations(model)
    close = relative(model(batches[0]).logits, exact)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.input_scale.mul_(0.05)  # most of what comes in is cut off
    assert 0 < close < 0.2 * relative(model(batches[0]).logits, exact)


@torch.no_grad()
def test_simulated_cache(quantized, batches):
    """Keys and values are rounded to FP8 with the stored scales, beside projections that are quantised or are not."""
    for recipe in ("release", "nvfp4"):
        model = calibrate(quantized(recipe), batches)
        attention = model.model.layers[2].mixer
        x = torch.randn(1, 5, 32)
        plain = attention.k_proj(x), attention.v_proj(x), attention.q_proj(x)
        simulate_activations(model)
        if recipe == "nvfp4":  # leave the rounding of inputs aside
            for projection in (attention.k_proj, attention.v_proj, attention.q_proj):
                projection.weight_format = dataclasses.replace(projection.weight_format, simulate=lambda x, scale: x)
        for found, exact, scale in (
            (attention.k_proj(x), plain[0], attention.k_proj.k_scale),
            (attention.v_proj(x), plain[1], attention.v_proj.v_scale),
        ):
            assert found.equal((exact / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
            assert not found.equal(exact)
        assert attention.q_proj(x).equal(plain[2])


@pytest.mark.parametrize("rounding", [simulate_activations, quantize_activations])
def test_nothing_is_rounded_while_measured(rounding, make_model, batches, same_tensors):
    """Neither inputs, nor keys and values, which the scales of a smaller text would cut off; afterwards they are again."""

    def model():
        fields = {**SIZES, "mamba_num_heads": 8, "n_groups": 1, "ssm_state_size": 4}  # sizes that FP8 products take
        return quantize_model(make_model("ME*-ME", seed=5, **MTP, **fields), NVFP4Config(recipe="fp8"))

    expected = calibrate(model(), batches)
    again = calibrate(model(), [batches[0][:1, :2]])
    rounding(again)
    name = rounding.__name__
    before = [getattr(module, name, None) for module in again.modules()]
    calibrate(again, batches)
    scales = [{n: t for n, t in m.state_dict().items() if n.endswith("_scale")} for m in (again, expected)]
    same_tensors(*scales)
    assert True in before and [getattr(module, name, None) for module in again.modules()] == before


def test_adapters_stay(quantized, batches, relative):
    """Keys and values are measured with them; the scale goes to what they stand upon."""
    torch.manual_seed(1)
    model = add_lora(quantized("release"), r=2, init_lora_weights=False).eval()
    with torch.no_grad():
        before = model(input_ids=batches[0]).logits
        calibrate(model, batches)
        assert model(input_ids=batches[0]).logits.equal(before)
    projection = model.get_base_model().get_submodule("model.layers.2.mixer.k_proj.base_layer")
    assert isinstance(projection, CacheScaledLinear)
    plain = calibrate(quantized("release"), batches).get_submodule("model.layers.2.mixer.k_proj")
    assert projection.k_scale != plain.k_scale


def test_mode_and_hooks(quantized, batches):
    """Calibrating twice is calibrating once; the model is left in its mode, without hooks, and may be trained."""
    model = quantized("release").train()
    calibrate(model, batches)
    first = {n: t.clone() for n, t in model.state_dict().items() if n.endswith("_scale")}
    calibrate(model, batches)
    assert all(model.state_dict()[n].equal(t) for n, t in first.items())
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_is_refused(quantized, make_model, batches):
    with pytest.raises(ValueError, match="no quantised layer"):
        calibrate(make_model("M*"), batches)
    with pytest.raises(ValueError, match="`batches` is empty"):
        calibrate(quantized("fp8"), [])
    wrong = [{"input_ids": batches[0]}], batches[0], [batches[0][:, :0]]
    for given, what in zip(wrong, ("a dict", r"of shape \(9,\)", r"of shape \(2, 0\)"), strict=True):
        with pytest.raises(ValueError, match=f"`batches` holds {what}: each must be a tensor of token ids"):
            calibrate(quantized("fp8"), given)
    model = quantized("fp8")
    with torch.no_grad():
        model.model.embeddings.weight[5] = torch.inf
    with pytest.raises(ValueError, match=r"not finite at model.layers.0.mixer.in_proj"):
        calibrate(model, [torch.tensor([[5, 5]])])
