"""The published layout is read exactly and written always, whatever was read; nothing loaded is initialised again."""

import json
import re
import shutil

import pytest
import torch
from nemotron_super import NemotronHForCausalLM, NemotronHForSequenceClassification, NemotronHModel
from nemotron_super.modeling.published_names import published_layout, register_layout
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM as Upstream


def weights(folder):
    """All tensors of a checkpoint folder; every file must be named by the index, if there is one."""
    files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(file)
        assert not part.keys() & tensors.keys()
        tensors.update(part)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == tensors.keys()
    return tensors


def to_fused(tensors):
    """In place: module names and stacked experts, as `save_original_format=False` writes them."""
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        name = re.sub(r"^backbone\.", "model.", name)
        found = re.fullmatch(r"(.*experts)\.(\d+)\.(up_proj|down_proj)\.weight", name)
        if found:
            stacks.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = tensor
        else:
            tensors[name] = tensor
    tensors.update({name: torch.stack([s[e] for e in range(len(s))]) for name, s in stacks.items()})


WAYS = {
    "plain": {},
    "dtype": {"dtype": torch.bfloat16},
    "auto dtype": {"dtype": "auto"},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "device_map auto": {"device_map": "auto"},
    "device_map cpu": {"device_map": "cpu"},
    "device_map dict": {"device_map": {"": "cpu"}},
    "ignore_mismatched_sizes": {"ignore_mismatched_sizes": True},
    "key_mapping": {"key_mapping": {r"^nothing\.": "backbone."}},
}


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS)
def test_every_tensor_is_the_file(arguments, files, rewrite, by_published_name, same_tensors, caplog):
    """Bit for bit; `published` holds values of A_log, D, dt_bias and out_proj that no initialisation gives."""
    folder = rewrite(files=files)
    model, info = NemotronHForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info.values())
    same_tensors(by_published_name(model), weights(folder))
    assert not model.training and not any(tensor.is_meta for tensor in model.state_dict().values())


def test_the_values_are_unusual(published):
    """The tests above would pass with default values if initialisation ran again: they must not be defaults."""
    tensors = weights(published)
    prefix = "backbone.layers.0.mixer."
    assert tensors[prefix + "dt_bias"].float().min() < -6.9 or tensors[prefix + "dt_bias"].float().max() > -2.2
    assert (tensors[prefix + "D"].float() - 1).abs().max() > 0.1
    assert tensors[prefix + "A_log"].float().min() < 0
    assert tensors[prefix + "out_proj.weight"].float().std() > 0.02
    assert tensors["backbone.layers.1.mixer.gate.e_score_correction_bias"].abs().max() > 0.01
    assert (tensors["mtp.layers.0.enorm.weight"].float() - 1).abs().max() > 0.1


def test_float32_router_bias_survives_any_dtype(rewrite):
    """A bias whose digits bfloat16 would lose."""
    bias = torch.linspace(0.1234567, 0.7654321, 6)
    name = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    folder = rewrite(lambda tensors: tensors.update({name: bias}))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, "auto"):
        model = NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)
        assert model.model.layers[1].mixer.gate.e_score_correction_bias.equal(bias)
        assert model.lm_head.weight.dtype == (torch.bfloat16 if dtype == "auto" else dtype)


def test_float32_is_the_same_numbers(published, by_published_name, same_tensors):
    model = NemotronHForCausalLM.from_pretrained(published, dtype=torch.float32)
    same_tensors(by_published_name(model), {name: t.float() for name, t in weights(published).items()})


@pytest.mark.parametrize("gone", ["mtp.", "backbone.layers.0.mixer.A_log", "backbone.layers.1.mixer.gate.e_score"])
@pytest.mark.parametrize("arguments", [{}, {"device_map": "auto"}], ids=["plain", "auto"])
def test_only_what_is_missing_is_initialised(gone, arguments, rewrite, by_published_name, caplog):
    """The rest keeps its bits, and the report names what is missing."""
    folder = rewrite(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(gone)])
    model, info = NemotronHForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    found, expected = by_published_name(model), weights(folder)
    assert not [name for name in expected if not found[name].equal(expected[name])]
    lost = {name for name in model.state_dict() if name.replace("model.", "backbone.", 1).startswith(gone)}
    assert lost and info["missing_keys"] == lost
    assert all(torch.isfinite(found[name]).all() for name in found)
    assert "MISSING" in caplog.text
    if gone != "mtp.":
        assert all(name in caplog.text for name in lost)
    else:
        assert "mtp.layers.0.eh_proj.weight" in caplog.text
        assert model.mtp.layers[0].enorm.weight.eq(1).all() and model.mtp.layers[0].eh_proj.weight.std() > 0


def test_surplus_is_reported(rewrite, caplog):
    folder = rewrite(lambda tensors: tensors.update({"backbone.layers.9.mixer.mystery.weight": torch.ones(3)}))
    _, info = NemotronHForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["unexpected_keys"] == {"model.layers.9.mixer.mystery.weight"}
    assert "UNEXPECTED" in caplog.text and "layers.9.mixer.mystery.weight" in caplog.text


@pytest.mark.parametrize("layout", ["published", "sharded", "fused", "mapped"])
def test_saved_is_published_whatever_was_read(layout, rewrite, published, same_tensors, tmp_path):
    arguments = {}
    if layout == "fused":
        folder = rewrite(to_fused)
    elif layout == "mapped":
        folder = rewrite(
            lambda tensors: tensors.update(
                {
                    name.replace("backbone.", "trunk.").replace("mixer", "mix"): tensors.pop(name)
                    for name in list(tensors)
                }
            )
        )
        arguments = {"key_mapping": {r"^trunk\.": "backbone.", r"\.mix\.": ".mixer."}}
    else:
        folder = rewrite(files=3 if layout == "sharded" else 1)
    model, info = NemotronHForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info.values())
    model.save_pretrained(tmp_path / "out")
    same_tensors(weights(tmp_path / "out"), weights(published))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["NemotronHForCausalLM"]


@pytest.mark.parametrize("arguments", [{}, {"device_map": "auto"}], ids=["plain", "auto"])
def test_shards(arguments, published, same_tensors, by_published_name, tmp_path):
    """`max_shard_size`, also where transformers takes the model for an offloaded one (device_map on a CPU)."""
    model = NemotronHForCausalLM.from_pretrained(published, **arguments)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    same_tensors(weights(tmp_path), weights(published))
    again = NemotronHForCausalLM.from_pretrained(tmp_path)
    same_tensors(by_published_name(again), weights(published))
    # A smaller save into the same folder leaves no old shard behind.
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    same_tensors(weights(tmp_path), weights(published))


def test_disk_offload(published, same_tensors, tmp_path):
    """Layers on disk: loaded, run and saved as they were."""
    devices = {"model.embeddings": "cpu", "model.norm_f": "cpu", "lm_head": "cpu", "mtp": "cpu"}
    devices.update({f"model.layers.{i}": "disk" if i in (0, 1) else "cpu" for i in range(6)})
    model = NemotronHForCausalLM.from_pretrained(published, device_map=devices, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mixer.experts.up_proj.is_meta
    ids = torch.arange(8)[None]
    plain = NemotronHForCausalLM.from_pretrained(published)
    with torch.no_grad():
        assert model(ids).logits.equal(plain(ids).logits)
    generated = [m.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1) for m in (model, plain)]
    assert generated[0].equal(generated[1]) and generated[0].shape == (1, 11)
    model.save_pretrained(tmp_path / "out")
    same_tensors(weights(tmp_path / "out"), weights(published))


def test_given_state_dict(published, make_model, same_tensors, tmp_path):
    """As Trainer and accelerate save: the module's names, given from outside, and as a positional argument."""
    source = NemotronHForCausalLM.from_pretrained(published)
    other = NemotronHForCausalLM(source.config).to(torch.bfloat16)
    other.save_pretrained(tmp_path / "keyword", state_dict=source.state_dict())
    other.save_pretrained(tmp_path / "positional", True, source.state_dict())
    # Names that are published already stay.
    other.save_pretrained(tmp_path / "published", state_dict=weights(published))
    for folder in ("keyword", "positional", "published"):
        same_tensors(weights(tmp_path / folder), weights(published))


def test_accelerate(published, same_tensors, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(NemotronHForCausalLM.from_pretrained(published), evaluation_mode=True)
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path, state_dict=accelerator.get_state_dict(model), is_main_process=True, save_function=accelerator.save
    )
    same_tensors(weights(tmp_path), weights(published))


def test_save_over_itself(rewrite, published, same_tensors):
    """Into the folder it came from, which is then open."""
    folder = rewrite(files=2)
    NemotronHForCausalLM.from_pretrained(folder).save_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    same_tensors(weights(folder), weights(published))


def test_fresh_model(make_model, by_published_name, same_tensors, tmp_path):
    model = make_model("ME*-", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="-E")
    model.save_pretrained(tmp_path)
    same_tensors(weights(tmp_path), by_published_name(model))


def test_compiled_model(published, same_tensors, tmp_path):
    torch.compile(NemotronHForCausalLM.from_pretrained(published)).save_pretrained(tmp_path)
    same_tensors(weights(tmp_path), weights(published))


@pytest.mark.parametrize("loaded", [True, False])
def test_backbone_alone(loaded, published, same_tensors, tmp_path):
    """Saved without its heads, the backbone keeps its published names, and any of the classes reads it back."""
    expected = {name: tensor for name, tensor in weights(published).items() if name.startswith("backbone.")}
    if loaded:
        backbone = NemotronHModel.from_pretrained(published)
    else:
        backbone = NemotronHForCausalLM.from_pretrained(published).model
    backbone.save_pretrained(tmp_path)
    same_tensors(weights(tmp_path), expected)
    for cls in (NemotronHModel, NemotronHForCausalLM):
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        assert {name.split(".")[0] for name in info["missing_keys"]} <= {"lm_head", "mtp"}
        same_tensors(model.base_model.state_dict(), backbone.state_dict())


def test_classifier(published, same_tensors, tmp_path):
    model = NemotronHForSequenceClassification.from_pretrained(published, num_labels=3)
    model.save_pretrained(tmp_path)
    expected = {name: tensor for name, tensor in weights(published).items() if name.startswith("backbone.")}
    same_tensors(weights(tmp_path), {**expected, "score.weight": model.score.weight.detach()})
    # Another number of labels: the head starts afresh where that is asked for, and only the head.
    with pytest.raises(ValueError, match=r"score.weight has shape \(3, 24\).*\(5, 24\) \(see num_labels\)"):
        NemotronHForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    again, info = NemotronHForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"score.weight"} and again.score.weight.shape == (5, 24)
    same_tensors(again.model.state_dict(), model.model.state_dict())


def test_tied_embeddings(make_model, tmp_path):
    model = make_model("ME*-", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in weights(tmp_path)
    again, info = NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and again.lm_head.weight is again.model.embeddings.weight
    assert again.lm_head.weight.equal(model.lm_head.weight)


def test_modules_own_layout_on_request(published, same_tensors, tmp_path):
    model = NemotronHForCausalLM.from_pretrained(published)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    same_tensors(weights(tmp_path / "fused"), model.state_dict())
    again = NemotronHForCausalLM.from_pretrained(tmp_path / "fused")
    same_tensors(again.state_dict(), model.state_dict())


def test_logits_survive(published, tmp_path):
    model = NemotronHForCausalLM.from_pretrained(published, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        first, second = model(ids, output_mtp_logits=True), again(ids, output_mtp_logits=True)
    assert second.logits.equal(first.logits) and second.mtp_logits[1].equal(first.mtp_logits[1])


def rounded_routers(tensors):
    """transformers keeps routers' weights in float32; published files have them in bfloat16."""
    return {name: t.bfloat16() if name.endswith("gate.weight") else t for name, t in tensors.items()}


def test_transformers_reads_what_we_save(published, by_published_name, same_tensors):
    """All but MTP, which transformers' class does not have."""
    theirs: Upstream
    info: dict
    theirs, info = Upstream.from_pretrained(published, output_loading_info=True)
    assert type(theirs) is Upstream
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected = {name: tensor for name, tensor in weights(published).items() if not name.startswith("mtp.")}
    same_tensors(rounded_routers(by_published_name(theirs)), expected)


@pytest.mark.parametrize("original", [True, False], ids=["per expert", "fused"])
def test_we_read_what_transformers_saves(original, published, by_published_name, same_tensors, tmp_path):
    theirs = Upstream.from_pretrained(published)
    theirs.config.num_nextn_predict_layers = 0
    theirs.save_pretrained(tmp_path, save_original_format=original)
    ours, info = NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    same_tensors(by_published_name(ours), rounded_routers(by_published_name(theirs)))


def test_subfolder(published, same_tensors, by_published_name, tmp_path):
    shutil.copytree(published, tmp_path / "part")
    model = NemotronHForCausalLM.from_pretrained(tmp_path, subfolder="part")
    same_tensors(by_published_name(model), weights(published))


def test_variant(published, same_tensors, by_published_name, tmp_path):
    NemotronHForCausalLM.from_pretrained(published).save_pretrained(tmp_path, variant="bf16")
    assert (tmp_path / "model.bf16.safetensors").exists()
    model = NemotronHForCausalLM.from_pretrained(tmp_path, variant="bf16")
    same_tensors(by_published_name(model), weights(published))


def test_a_model_from_a_state_dict(published, by_published_name, same_tensors):
    """No file at all: a config, and tensors in the published layout."""
    config = NemotronHForCausalLM.from_pretrained(published).config
    model = NemotronHForCausalLM.from_pretrained(None, config=config, state_dict=weights(published))
    same_tensors(by_published_name(model), weights(published))


def test_extra_files_stay(published, tmp_path):
    """Saving touches nothing that is not its own."""
    (tmp_path / "README.md").write_text("mine")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    NemotronHForCausalLM.from_pretrained(published).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "adapter_model.safetensors").exists()


def test_a_layout_that_the_user_registers_stays(make_model):
    """The first model registers the published layout, but not over one that is there before it."""
    register_checkpoint_conversion_mapping("nemotron_h", [WeightRenaming("a", "b")], overwrite=True)
    try:
        register_layout.cache_clear()
        make_model("M")
        assert len(get_checkpoint_conversion_mapping("nemotron_h")) == 1
    finally:
        register_checkpoint_conversion_mapping("nemotron_h", published_layout(), overwrite=True)
