"""LoRA on every linear map and on the stacked experts: it trains, takes effect everywhere, saves, loads and merges.

PEFT refuses two modules of this model type by name, `out_proj` and `conv1d`, because other implementations read their
weights inside fused kernels. A test states its error; the day it stops raising, the targets here can grow.
"""

from __future__ import annotations

import nemotron_super
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

LINEARS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj",
    "eh_proj", "lm_head",
]  # fmt: skip
EXPERTS = ["experts.up_proj", "experts.down_proj"]


def add_lora(model, modules=LINEARS, parameters=EXPERTS, random=True, **options):
    """A PEFT model; `random` adapters change the function at once, others start at zero."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=modules,
        target_parameters=parameters,
        task_type="CAUSAL_LM",
        init_lora_weights=not random,
        **options,
    )
    return get_peft_model(model, config).eval()


@torch.no_grad()
def all_logits(model, ids):
    """Next-token and MTP logits, (1 + depths, batch, seq, vocab)."""
    output = model(ids, output_mtp_logits=True)
    return torch.stack([output.logits, *output.mtp_logits])


def adapted(model) -> set[str]:
    """Names of the modules with adapters, as the model without PEFT calls them."""
    names = (name for name, _ in model.named_parameters() if ".lora_A" in name)
    return {name.split(".lora_A")[0].removeprefix("base_model.model.").removesuffix(".base_layer") for name in names}


def test_where_adapters_go(model):
    """Every linear map that PEFT allows and both expert tensors of the backbone and of the MTP layers."""
    found = adapted(add_lora(model))
    attention = {f"mixer.{letter}_proj" for letter in "qkvo"}
    moe = {f"mixer.{name}" for name in ("fc1_latent_proj", "fc2_latent_proj", "experts")}
    moe |= {"mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"}
    assert found == {
        "lm_head",
        "model.layers.0.mixer.in_proj",
        *(f"model.layers.1.{name}" for name in moe),
        *(f"model.layers.2.{name}" for name in attention),
        "model.layers.3.mixer.up_proj",
        "model.layers.3.mixer.down_proj",
        "mtp.layers.0.eh_proj",
        *(f"mtp.layers.0.{name}" for name in attention),
        *(f"mtp.layers.1.{name}" for name in moe),
    }


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [*(([name], None) for name in LINEARS), ([], EXPERTS[:1]), ([], EXPERTS[1:]), ([], ["gate.weight"])],
    ids=[*LINEARS, "experts.up_proj", "experts.down_proj", "gate.weight"],
)
def test_every_adapter_takes_effect(tiny_model, ids, modules, parameters):
    """One kind of target at a time: the logits change, with and without gradients alike, and decoding follows them.

    Decoding and reading without gradients have paths of their own, which must not bypass an adapter.
    """
    before = all_logits(tiny_model(), ids)
    model = add_lora(tiny_model(), modules, parameters)
    after = all_logits(model, ids)
    changed = [float((a - b).abs().max()) > 1e-3 for a, b in zip(after, before, strict=True)]
    assert changed == ([False, True, True] if modules == ["eh_proj"] else [True] * 3)
    with_gradients = model(ids).logits
    torch.testing.assert_close(with_gradients.detach(), after[0], rtol=1e-4, atol=1e-4)
    steps, cache = [], None
    with torch.no_grad():
        for position in range(ids.shape[1]):
            output = model(input_ids=ids[:1, position : position + 1], cache=cache, use_cache=True)
            cache = output.cache
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), after[0, :1], rtol=1e-4, atol=1e-4)


def test_disable_adapter(tiny_model, ids):
    before = all_logits(tiny_model(), ids)
    model = add_lora(tiny_model())
    after = all_logits(model, ids)
    assert (after - before).abs().amax((1, 2, 3)).min() > 0.1
    with model.disable_adapter():
        assert all_logits(model, ids).equal(before)
    assert all_logits(model, ids).equal(after)


def test_merge(tiny_model, ids, tmp_path):
    """Merged weights give the adapter's logits, in our own class, through a published-layout checkpoint too."""
    model = add_lora(tiny_model())
    expected = all_logits(model, ids)
    merged = model.merge_and_unload()
    assert type(merged) is nemotron_super.NemotronHForCausalLM
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    torch.testing.assert_close(all_logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all_logits(again, ids).equal(all_logits(merged, ids))


def test_unload(tiny_model, ids):
    before = all_logits(tiny_model(), ids)
    assert all_logits(add_lora(tiny_model()).unload(), ids).equal(before)


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter", "AutoPeftModel", "AutoModel"])
def test_save_and_load(tiny_model, ids, tmp_path, way):
    """The four ways to load a saved adapter, each with the MTP layers' share."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    expected = all_logits(model, ids)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    if way == "PeftModel":
        again = PeftModel.from_pretrained(tiny_model(), folder)
    elif way == "load_adapter":
        again = tiny_model()
        again.load_adapter(str(folder))
    elif way == "AutoPeftModel":
        again = AutoPeftModelForCausalLM.from_pretrained(folder)
    else:
        again = AutoModelForCausalLM.from_pretrained(folder)
    assert all_logits(again.eval(), ids).equal(expected)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_training(tiny_model, ids, checkpointing):
    """The loss falls, only adapters move, and each of them gets a gradient, the MTP layers' included."""
    model = add_lora(tiny_model(), random=False).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()  # PEFT's own way; frozen embeddings would end the gradient otherwise
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for step in range(12):
        output = model(ids, labels=ids)
        output.loss.backward()
        if step == 1:  # at step 0 half of the factors are zero
            assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
        optimizer.step()
        optimizer.zero_grad()
        losses.append((float(output.lm_loss.detach()), float(output.mtp_loss.detach())))
    assert losses[-1][0] < 0.8 * losses[0][0] and losses[-1][1] < 0.9 * losses[0][1], losses
    assert all(p.equal(frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_generate_with_adapter(tiny_model, ids):
    """`generate` uses the adapter at every step: as the merged model does."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = add_lora(tiny_model())
    found = model.generate(input_ids=ids, **options)
    with model.disable_adapter():
        assert not found.equal(model.generate(input_ids=ids, **options))
    assert found.equal(model.merge_and_unload().generate(ids, **options))


@pytest.mark.parametrize("target", ["out_proj", "conv1d", "all-linear"])
def test_what_peft_refuses(model, target):
    """`out_proj` and `conv1d`, by name; and so "all-linear", which contains `out_proj`."""
    name = "conv1d" if target == "conv1d" else "out_proj"
    message = rf"\[PEFT:.*LORA\] Module '{name}' is incompatible with Mamba-based models \(model_type='nemotron_h'\)"
    modules = target if target == "all-linear" else [target]
    with pytest.raises(ValueError, match=message):
        add_lora(model, modules, parameters=None)


def test_all_linear_without_out_proj(tiny_model, ids):
    """The way round the refusal: exclude `out_proj` by name."""
    model = add_lora(tiny_model(), "all-linear", parameters=None, exclude_modules=["out_proj"])
    found = adapted(model)
    assert len(found) == 20 and "model.layers.0.mixer.in_proj" in found  # PEFT leaves `lm_head` out
    assert not all_logits(model, ids).equal(all_logits(tiny_model(), ids))
