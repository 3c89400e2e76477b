"""LoRA over frozen NVFP4 and FP8 weights: the gradients of the dequantised model, and adapters that can be merged."""

import pytest
import torch
from nemotron_super import NemotronHForCausalLM, NVFP4Config, quantize_model
from nemotron_super.modeling.quantized_layers import QuantizedExperts, QuantizedLinear
from nemotron_super.training.lora import export_merged
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

SIZES = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 32, "intermediate_size": 48}
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj", "fc1_latent_proj", "eh_proj"]
RECIPES = ["release", "nvfp4", "fp8"]


@pytest.fixture
def quantized(make_model):
    def build(recipe, **fields):
        model = make_model("ME*-ME", seed=5, **MTP, **SIZES, **fields)
        return quantize_model(model, NVFP4Config(recipe=recipe))

    return build


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def add_lora(model):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)


def gradients(model, ids):
    """Loss and gradients by name, with MTP."""
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def packed(model):
    """Every tensor of the quantised modules, as bytes."""
    return {
        f"{n}.{k}": p.detach().clone().reshape(-1).view(torch.uint8)
        for n, m in model.named_modules()
        if isinstance(m, QuantizedLinear | QuantizedExperts)
        for k, p in m.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients(recipe, quantized, ids, relative):
    """Adapters get the gradients that they get over the dequantised model, with and without checkpointing."""
    model = add_lora(quantized(recipe))
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in adapters)
    dtypes = {p.dtype for n, p in model.named_parameters() if n in adapters}
    assert dtypes == {torch.float32}  # not that of the weights, which PEFT would take
    loss, found = gradients(model, ids)
    assert found.keys() == adapters

    checkpointed = add_lora(quantized(recipe))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, again = gradients(checkpointed, ids)
    plain = quantized(recipe)
    plain.dequantize()
    expected_loss, expected = gradients(add_lora(plain), ids)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name in adapters:
        assert relative(found[name], expected[name]) < 1e-3, name
        assert relative(again[name], found[name]) < 1e-5, name


def test_leaves_train_without_adapters(quantized, ids):
    """What is in full precision trains over what is not: norms, router, convolutions, embeddings and head."""
    model = quantized("nvfp4")
    _, found = gradients(model, ids)
    frozen = set(packed(model))
    assert not frozen & found.keys()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == found.keys()
    assert {"lm_head.weight", "model.layers.1.mixer.gate.weight", "model.layers.0.mixer.conv1d.weight"} < found.keys()
    assert all(g.isfinite().all() and g.any() for g in found.values())


def test_trainer_without_adapters(quantized, ids, tmp_path):
    """Under transformers' Trainer they train too, and go on from a checkpoint; packed weights stay bit for bit."""

    def train(folder, **options):
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            learning_rate=2e-3,
            num_train_epochs=1,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=5,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in ids.repeat(10, 1)]
        trainer = Trainer(model=quantized("release"), args=arguments, train_dataset=data)
        trainer.train(**options)
        return trainer

    trainer = train(tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    before, after = packed(quantized("release")), packed(trainer.model)
    assert all(after[n].equal(t) for n, t in before.items())
    again = train(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected = trainer.model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in again.model.state_dict().items() if t.dtype == torch.float32)
    opened = NemotronHForCausalLM.from_pretrained(tmp_path / "checkpoint-10").eval()
    assert opened(ids).logits.equal(trainer.model.eval()(ids).logits)


@torch.no_grad()
def test_merging(quantized, ids, tmp_path, relative):
    """Adapters cannot be added to packed weights; they merge into the dequantised model, which can be quantised again."""
    model = add_lora(quantized("release")).eval()
    expected = model(ids).logits
    with pytest.raises(RuntimeError):
        model.merge_and_unload()
    merged = export_merged(add_lora(quantized("release")).eval(), tmp_path / "merged")
    assert isinstance(merged, NemotronHForCausalLM)
    saved = NemotronHForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for one in (merged, saved):
        assert not packed(one)
        assert relative(one(ids).logits, expected) < 1e-4
    quantize_model(merged, NVFP4Config(recipe="release")).save_pretrained(tmp_path / "packed")
    again = NemotronHForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert again(ids).logits.equal(merged(ids).logits)
    assert relative(again(ids).logits, expected) < 0.5
