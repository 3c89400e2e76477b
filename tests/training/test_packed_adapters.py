"""Adapters on packed experts: the gradients of the dequantised model, PEFT's files, merging; and nothing passed over."""

import pytest
import torch
from nemotron_super import NemotronHForCausalLM, NVFP4Config, quantize_model, simulate_activations
from nemotron_super.modeling.quantized_layers import QuantizedExperts, QuantizedLinear
from nemotron_super.training.lora import adapted_names, add_lora, export_merged, load_lora, lora_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

SIZES = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 32, "intermediate_size": 48}
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
RECIPES = ["release", "nvfp4", "fp8"]  # the release's MTP experts are in full precision


@pytest.fixture
def quantized(make_model):
    return lambda recipe: quantize_model(make_model("ME*-ME", seed=5, **MTP, **SIZES), NVFP4Config(recipe=recipe))


@pytest.fixture
def dequantized(quantized):
    """The same weights in full precision."""

    def build(recipe):
        model = quantized(recipe)
        model.dequantize()
        return model

    return build


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(model, random=True):
    torch.manual_seed(1)
    return add_lora(model, r=3, alpha=6, init_lora_weights=not random)


def gradients(model, ids):
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids, use_cache=False).logits


def packed_bytes(model):
    return {
        f"{n}.{k}": p.detach().clone().reshape(-1).view(torch.uint8)
        for n, m in model.named_modules()
        if isinstance(m, QuantizedLinear | QuantizedExperts)
        for k, p in m.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients(recipe, quantized, dequantized, ids, relative):
    """Those that the same adapters get over the dequantised weights, through PEFT's own wrapper."""
    model = adapted(quantized(recipe))
    assert [m for m in model.modules() if isinstance(m, QuantizedExperts)]
    loss, found = gradients(model, ids)
    expected_loss, expected = gradients(adapted(dequantized(recipe)), ids)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys() == {n for n, p in model.named_parameters() if "lora_" in n}
    assert {g.dtype for g in found.values()} == {torch.float32}
    for name, gradient in expected.items():
        assert gradient.any() and relative(found[name], gradient) < 1e-3, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, quantized, ids, relative):
    _, expected = gradients(adapted(quantized("nvfp4")), ids)
    model = adapted(quantized("nvfp4"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _, found = gradients(model, ids)
    assert found.keys() == expected.keys()
    assert all(relative(found[name], gradient) < 1e-5 for name, gradient in expected.items())


@pytest.mark.parametrize("recipe", ["release", "nvfp4"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_lower_precision(how, recipe, quantized, ids, relative):
    """In bfloat16 and under autocast: float32 adapters, and gradients as far as bfloat16 goes."""
    _, exact = gradients(adapted(quantized(recipe)), ids)
    model = quantized(recipe).bfloat16() if how == "bfloat16" else quantized(recipe)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        _, found = gradients(adapted(model), ids)
    assert {g.dtype for g in found.values()} == {torch.float32}
    errors = sorted(relative(found[name], gradient) for name, gradient in exact.items())
    assert errors[len(errors) // 2] < 0.1 and errors[-1] < 0.6


@pytest.mark.parametrize("recipe", RECIPES)
def test_adapters_move_between_formats(recipe, quantized, dequantized, ids, relative, tmp_path):
    """Files are PEFT's, with the names and shapes that PEFT's own wrapper gives over full precision."""
    model = adapted(quantized(recipe))
    expected = logits(model, ids)
    assert not expected.equal(logits(quantized(recipe), ids))
    model.save_pretrained(tmp_path / "packed")
    assert logits(load_lora(quantized(recipe), tmp_path / "packed"), ids).equal(expected)
    assert relative(logits(load_lora(dequantized(recipe), tmp_path / "packed"), ids), expected) < 1e-4
    adapted(dequantized(recipe)).save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("packed", "plain")]
    assert {n: t.shape for n, t in files[0].items()} == {n: t.shape for n, t in files[1].items()}
    assert relative(logits(load_lora(quantized(recipe), tmp_path / "plain"), ids), expected) < 1e-4
    more = load_lora(quantized(recipe), tmp_path / "packed", trainable=True)
    assert gradients(more, ids)[1].keys() == {n for n, p in more.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("recipe", ["release", "nvfp4"])
def test_training(recipe, quantized, ids, tmp_path):
    """Under transformers' Trainer with gradient checkpointing the loss falls; every packed tensor stays bit for bit."""
    model = adapted(quantized(recipe), random=False)
    before = packed_bytes(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(10, 1)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    after = packed_bytes(model)
    assert all(after[n].equal(t) for n, t in before.items())
    experts = [p for n, p in model.named_parameters() if "experts" in n and "lora_B" in n]
    assert experts and all(p.any() for p in experts)  # they began at zero


def test_several_adapters_and_none(quantized, ids, relative):
    """A second adapter, a sum of both, and none, each as over one at a time."""
    base = logits(quantized("nvfp4"), ids)
    model = adapted(quantized("nvfp4"))
    first = logits(model, ids)
    with model.disable_adapter():
        assert logits(model, ids).equal(base)
    config = lora_config(quantized("nvfp4"), r=3, alpha=6)
    config.init_lora_weights = False
    for name in ("target_modules", "target_parameters"):
        setattr(config, name, {t for t in getattr(config, name) if "out_proj" not in t})
    model.add_adapter("second", config)
    assert logits(model, ids).equal(first)
    model.set_adapter("second")
    second = logits(model, ids)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, ids)
    assert min(relative(a, b) for a, b in ((first, base), (second, base), (second, first), (both, first))) > 1e-2


def test_activations_are_rounded_for_the_weights_only(quantized, ids):
    """With adapters of zero the simulated model is the simulated model."""
    plain = quantized("nvfp4")
    simulate_activations(plain)
    model = adapted(quantized("nvfp4"), random=False)
    simulate_activations(model)
    expected = logits(plain, ids)
    assert logits(model, ids).equal(expected) and not expected.equal(logits(quantized("nvfp4"), ids))


@pytest.mark.parametrize("recipe", ["release", "fp8"])
def test_merging(recipe, quantized, ids, tmp_path, relative):
    """Not into packed weights; into dequantised ones, which are saved as published, or packed again."""
    expected = logits(adapted(quantized(recipe)), ids)
    with pytest.raises(RuntimeError):
        adapted(quantized(recipe)).merge_and_unload()
    experts = next(m for n, m in adapted(quantized(recipe)).named_modules() if n.endswith("1.mixer.experts"))
    with pytest.raises(RuntimeError, match=r"is packed in (NVFP4|FP8)"):
        experts.merge()
    merged = export_merged(adapted(quantized(recipe)), tmp_path / "full")
    assert type(merged) is NemotronHForCausalLM and not packed_bytes(merged)
    assert relative(logits(merged, ids), expected) < 1e-4
    names = load_file(tmp_path / "full" / "model.safetensors").keys()
    assert "backbone.layers.1.mixer.experts.5.down_proj.weight" in names
    assert not [n for n in names if "lora" in n or n.endswith("_scale")]

    again = export_merged(adapted(quantized(recipe)), tmp_path / "packed", NVFP4Config(recipe=recipe))
    opened = NemotronHForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert packed_bytes(opened).keys() == packed_bytes(quantized(recipe)).keys()
    assert logits(opened, ids).equal(logits(again, ids))
    assert relative(logits(opened, ids), expected) < 0.5


def test_a_refused_export_keeps_the_adapters(make_model, ids, tmp_path):
    """What the result cannot be quantised to is said before it is dequantised and merged."""
    model = make_model("ME", seed=5, **{**SIZES, "moe_intermediate_size": 24})
    model = adapted(quantize_model(model, NVFP4Config(recipe="fp8")))
    before, expected = packed_bytes(model), logits(model, ids)
    cache = {"dynamic": False, "num_bits": 8, "type": "float"}
    for config, message in (
        (NVFP4Config(recipe="nvfp4"), "rows of 24, which NVFP4's blocks of 16"),
        (NVFP4Config(quant_algo="FP8", kv_cache_scheme=cache), "scales of an FP8 cache come from data"),
    ):
        with pytest.raises(ValueError, match=message):
            export_merged(model, tmp_path, config)
    assert packed_bytes(model).keys() == before.keys() and logits(model, ids).equal(expected)


def test_what_is_refused(quantized, ids, tmp_path):
    """PEFT's own wrapper would add to the codes; ours says which experts it cannot adapt and how to leave them out."""
    targets = [f"{n}.up_proj" for n, m in quantized("fp8").named_modules() if isinstance(m, QuantizedExperts)]
    plain = get_peft_model(quantized("fp8"), LoraConfig(r=2, target_modules=[], target_parameters=targets))
    with pytest.raises(RuntimeError, match="packed codes of quantised experts are parametrised"):
        plain(input_ids=ids)
    adapted(quantized("fp8")).save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError)):
        PeftModel.from_pretrained(quantized("fp8"), tmp_path)(input_ids=ids)
    with pytest.raises(ValueError, match="lora_dropout"):
        add_lora(quantized("fp8"), r=2, lora_dropout=0.1)
    without = add_lora(quantized("nvfp4"), r=2, exclude=["mixer.experts"])
    assert adapted_names(without) and not [n for n in adapted_names(without) if ".experts." in n]


def test_a_failed_call_leaves_no_adapter_behind(quantized, ids, monkeypatch):
    model = adapted(quantized("nvfp4"))
    experts = [m for m in model.modules() if isinstance(m, QuantizedExperts)]
    with pytest.raises(TypeError), monkeypatch.context() as patch:
        patch.setattr(type(experts[0]), "stored", lambda self: None)
        model(input_ids=ids)
    assert not any(m.low_rank for m in experts)
