"""Adapters everywhere: named, effective on every path, trained, saved in PEFT's format, merged into the published layout."""

import json

import pytest
import torch
from nemotron_super import NemotronHForCausalLM, NVFP4Config, quantize_model
from nemotron_super.training.lora import (
    adapted_names,
    add_lora,
    allow_out_proj,
    export_merged,
    load_lora,
    lora_config,
    lora_targets,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


@pytest.fixture
def model(make_model):
    return make_model("ME*-", **MTP)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))


def randomized(model, **options):
    """With adapters that change the function at once."""
    torch.manual_seed(1)
    return add_lora(model, r=2, alpha=2, init_lora_weights=False, **options).eval()


@torch.no_grad()
def all_logits(model, ids):
    out = model(input_ids=ids, output_mtp_logits=True, use_cache=False)
    return torch.stack([out.logits, *out.mtp_logits])


def test_every_matrix_but_embeddings_convolution_and_router(model):
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() >= 2}
    left = {name for name in matrices if name.endswith(("embeddings", "conv1d", "gate"))}
    assert len(left) == 4
    peft_model = add_lora(model, r=2)
    assert adapted_names(peft_model) == matrices - left
    trained = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_exclude(model):
    modules, parameters = lora_targets(model, exclude=["mtp", "lm_head", "experts.down_proj"])
    assert not [name for name in (*modules, *parameters) if "mtp" in name or "lm_head" in name]
    assert parameters == ["model.layers.1.mixer.experts.up_proj"]
    assert "model.layers.1.mixer.shared_experts.down_proj" in modules
    peft_model = add_lora(model, r=2, exclude=["mtp", "lm_head", "experts.down_proj"])
    assert adapted_names(peft_model) == {*modules, *parameters}


def test_nothing_is_left_out_unsaid(model):
    with pytest.raises(ValueError, match="does not have: k_prj"):
        lora_config(model, exclude=["k_prj", "q_proj"])

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(4, 4, dtype=torch.uint8))

    model.model.layers[2].mixer.o_proj = Packed()
    with pytest.raises(ValueError, match=r"layers\.2\.mixer\.o_proj\.weight: no adapter is known for a Packed"):
        lora_config(model)
    modules, _ = lora_targets(model, exclude=["o_proj"])
    assert not [name for name in modules if name.endswith("o_proj")]


def test_what_peft_passes_over_is_named(model, monkeypatch):
    monkeypatch.setattr(
        "nemotron_super.training.lora.get_peft_model",
        lambda model, config: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    )
    with pytest.raises(ValueError, match=r"PEFT put no adapter on: lm_head, model\.layers\.0\.mixer\.in_proj"):
        add_lora(model)


def test_tied_head(make_model):
    tied = make_model("ME*-", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="exclude=\\['lm_head'\\]"):
        add_lora(tied)
    add_lora(tied, exclude=["lm_head"])


def test_the_refusal_is_lifted_for_our_models_only(model):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.out_proj, self.config = nn.Linear(4, 4), model.config

    with allow_out_proj(), pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(Other(), LoraConfig(target_modules=["out_proj"]))
    with allow_out_proj(), pytest.raises(ValueError, match="'conv1d' is incompatible"):
        get_peft_model(model, LoraConfig(target_modules=["conv1d"]))
    with pytest.raises(ValueError, match="'out_proj' is incompatible"):
        get_peft_model(model, LoraConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("target", ["out_proj", "in_proj"])
def test_mamba_projections_on_every_path(make_model, ids, target):
    """With gradients, without, in segments, token by token and packed: each gives the merged model's logits."""
    everything = {
        name.rpartition(".")[2] for name, m in make_model("ME*-").named_modules() if isinstance(m, nn.Linear)
    }
    model = make_model("ME*-")
    before = model(ids, use_cache=False).logits
    peft_model = randomized(
        model, exclude=[*sorted(everything - {target, "up_proj", "down_proj"}), "layers.1", "layers.3"]
    )
    assert adapted_names(peft_model) == {f"model.layers.0.mixer.{target}"}
    with_gradients = peft_model(input_ids=ids, use_cache=False).logits
    assert (with_gradients - before).abs().max() > 1e-2
    with torch.no_grad():
        without = peft_model(input_ids=ids, use_cache=False).logits
        cache, steps = None, []
        for position in range(ids.shape[1]):
            out = peft_model(input_ids=ids[:, position : position + 1], cache=cache, use_cache=True)
            cache = out.cache
            steps.append(out.logits)
        long = torch.cat([ids] * 60, dim=1)[:1]
        segments = peft_model(input_ids=long, use_cache=False).logits
    trained = peft_model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    merged = peft_model.eval().merge_and_unload()
    expected = merged(ids, use_cache=False).logits
    for found in (with_gradients, without, torch.cat(steps, dim=1)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(segments, merged(long, use_cache=False).logits, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(trained, merged.train()(ids, labels=ids, use_cache=False).loss, rtol=1e-4, atol=1e-4)


def test_training_moves_adapters_only(model, ids):
    peft_model = add_lora(model, r=4, alpha=8).train()
    frozen = {name: p.detach().clone() for name, p in peft_model.named_parameters() if not p.requires_grad}
    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    losses = []
    for step in range(12):
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 1:  # at step 0 half of the factors are zero
            assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(p.equal(frozen[name]) for name, p in peft_model.named_parameters() if name in frozen)


def test_save_load_merge_export(make_model, ids, tmp_path):
    peft_model = randomized(make_model("ME*-", **MTP))
    expected = all_logits(peft_model, ids)
    peft_model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = load_lora(make_model("ME*-", **MTP), tmp_path / "adapter")
    assert all_logits(again, ids).equal(expected)
    assert not any(p.requires_grad for p in again.parameters())
    more = load_lora(make_model("ME*-", **MTP), tmp_path / "adapter", trainable=True)
    assert all(p.requires_grad == ("lora_" in name) for name, p in more.named_parameters())
    with allow_out_proj():  # PEFT's own door
        assert all_logits(PeftModel.from_pretrained(make_model("ME*-", **MTP), tmp_path / "adapter"), ids).equal(
            expected
        )

    merged = export_merged(again, tmp_path / "merged")
    assert type(merged) is NemotronHForCausalLM
    torch.testing.assert_close(all_logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert "backbone.layers.1.mixer.experts.5.up_proj.weight" in names and not [n for n in names if "lora" in n]
    assert all_logits(NemotronHForCausalLM.from_pretrained(tmp_path / "merged"), ids).equal(all_logits(merged, ids))


def test_bfloat16_base(make_model, ids):
    """Adapters of a bfloat16 model are float32, train, and merge back into bfloat16."""
    peft_model = add_lora(make_model("ME*-", **MTP).bfloat16(), r=2).train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    peft_model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert {p.dtype for p in peft_model.merge_and_unload().parameters()} == {torch.bfloat16}


def test_over_quantised_weights(make_model, ids, relative, tmp_path):
    """Every linear map and the routed experts, quantised or not: named as over full precision, and merged there."""
    sizes = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 32, "intermediate_size": 48}
    peft_model = randomized(quantize_model(make_model("ME*-", **MTP, **sizes), NVFP4Config(recipe="nvfp4")))
    assert adapted_names(peft_model) == adapted_names(randomized(make_model("ME*-", **MTP, **sizes)))
    peft_model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in peft_model.named_parameters() if "lora_" in name)
    expected = all_logits(peft_model.eval(), ids)
    merged = export_merged(peft_model, tmp_path)
    assert relative(all_logits(merged, ids), expected) < 1e-4
    assert all_logits(NemotronHForCausalLM.from_pretrained(tmp_path), ids).equal(all_logits(merged, ids))
