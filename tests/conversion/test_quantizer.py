"""Quantising, saving and opening whole models with MTP, and what is refused of a damaged checkpoint."""

import io
import json
import shutil
from collections import Counter

import pytest
import torch
from nemotron_super import (
    NemotronHForCausalLM,
    NemotronHForSequenceClassification,
    NemotronHModel,
    NVFP4Config,
    calibrate,
    offload_experts,
    preset,
    quantize_activations,
    quantize_model,
    simulate_activations,
)
from nemotron_super.conversion.quantizer import install_empty, quantizable, resolve_recipe
from nemotron_super.modeling.quantized_layers import QuantizedExperts, QuantizedLinear, _fetch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
# NVFP4 needs rows of a multiple of 16.
SIZES = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 32, "intermediate_size": 48}
PATTERN = "ME*-ME"


@pytest.fixture
def full(make_model):
    """A fresh model in bfloat16."""
    return lambda **fields: make_model(PATTERN, seed=5, **{**MTP, **SIZES, **fields}).to(torch.bfloat16)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    """`saved[recipe]`: folders of quantised checkpoints. Do not write to them."""
    folders = {}
    for recipe in ("release", "nvfp4", "fp8"):
        folders[recipe] = tmp_path_factory.mktemp(recipe)
        model = make_model(PATTERN, seed=5, **MTP, **SIZES).to(torch.bfloat16)
        quantize_model(model, NVFP4Config(recipe=recipe)).save_pretrained(folders[recipe])
    return folders


@pytest.fixture
def rewritten(saved, tmp_path):
    """`rewritten(recipe, tensors=None, config=None)`: a copy of a checkpoint, edited in place by the two functions."""

    def copy(recipe, tensors=None, config=None):
        folder = tmp_path / "rewritten"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[recipe], folder)
        (folder / "hf_quant_config.json").unlink()
        if tensors is not None:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            described = json.loads((folder / "config.json").read_text())
            config(described["quantization_config"])
            (folder / "config.json").write_text(json.dumps(described))
        return folder

    return copy


def formats(model):
    """Format by published module name, a set of experts once."""
    return {
        name.replace("model.", "backbone.", 1): module.weight_format.name if hasattr(module, "weight_format") else None
        for name, module in quantizable(model)
    }


@torch.no_grad()
def all_logits(model, ids):
    output = model(ids, output_mtp_logits=True)
    return torch.stack([output.logits, *output.mtp_logits])


def test_recipes(full):
    """The release's mix: experts NVFP4, Mamba and shared experts FP8, the rest and all of MTP as it was."""
    release = formats(quantize_model(full(), NVFP4Config(recipe="release")))
    expected = dict.fromkeys(release)
    for layer in (0, 4):
        expected |= {f"backbone.layers.{layer}.mixer.{name}": "FP8" for name in ("in_proj", "out_proj")}
    for layer in (1, 5):
        expected[f"backbone.layers.{layer}.mixer.experts"] = "NVFP4"
        expected |= {f"backbone.layers.{layer}.mixer.shared_experts.{name}_proj": "FP8" for name in ("up", "down")}
    assert release == expected
    for recipe in ("nvfp4", "fp8"):
        found = formats(quantize_model(full(), NVFP4Config(recipe=recipe)))
        assert {f for n, f in found.items() if n.startswith("backbone.")} == {recipe.upper()}
        assert {f for n, f in found.items() if not n.startswith("backbone.")} == {None}


def test_super_in_the_mix_of_the_release():
    """All 40,960 projections of the routed experts in NVFP4, and the whole model, MTP included, in less than 80 GB."""
    with torch.device("meta"):
        model = NemotronHForCausalLM(preset("super")).to(torch.bfloat16)
    layers = resolve_recipe(model, "release").quantized_layers
    counts = Counter(entry["quant_algo"] for entry in layers.values())
    assert counts == {"NVFP4": 40 * 512 * 2, "FP8": 40 * 2 + 40 * 2}
    install_empty(model, NVFP4Config(recipe="release"))
    stored: Counter[str] = Counter()
    for name, tensor in model.state_dict().items():
        stored["mtp" if name.startswith("mtp.") else "rest"] += tensor.nbytes
    # Half a byte for a weight in NVFP4 and 1/16 for its block's scale.
    assert stored["rest"] > 40 * 512 * 2 * 2688 * 1024 * (1 / 2 + 1 / 16)
    assert sum(stored.values()) < 80e9


@pytest.mark.parametrize("recipe", ["release", "nvfp4", "fp8"])
def test_round_trip(recipe, saved, full, ids, tmp_path, same_tensors):
    """In memory, reopened, reopened from shards and quantised while loading: the same tensors and the same logits."""
    model = quantize_model(full(), NVFP4Config(recipe=recipe))
    again, info = NemotronHForCausalLM.from_pretrained(saved[recipe], dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    full().save_pretrained(tmp_path / "full")
    config = NVFP4Config(recipe=recipe)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16, quantization_config=config)
    assert config.recipe == recipe and config.quant_algo is None  # the caller's is left as it was
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    sharded = NemotronHForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    for other in (again, loaded, sharded):
        same_tensors(bytes_of(other), bytes_of(model))
        assert all_logits(other, ids).equal(all_logits(model, ids))
        assert other.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def bytes_of(model):
    return {n: t.view(torch.uint8) if t.dtype.itemsize == 1 else t for n, t in model.state_dict().items()}


def test_backbone_alone(saved, ids):
    """Without head and MTP the same checkpoint opens, and is saved under the same names."""
    whole = NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.float32)
    backbone = NemotronHModel.from_pretrained(saved["release"], dtype=torch.float32)
    with torch.no_grad():
        assert backbone(ids).last_hidden_state.equal(whole.model(ids).last_hidden_state)


def test_classifier(saved, ids):
    """A fresh head over a quantised backbone: initialised, in full precision, trainable."""
    torch.manual_seed(0)
    model, info = NemotronHForSequenceClassification.from_pretrained(
        saved["nvfp4"], dtype=torch.float32, num_labels=3, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"} and not info["mismatched_keys"]
    assert formats(model)["backbone.layers.0.mixer.in_proj"] == "NVFP4"
    model(ids, labels=torch.tensor([0, 2])).loss.backward()
    assert model.score.weight.grad.any()


def test_offloaded(saved, ids, tmp_path):
    """Layers that wait on disk, packed, give the same logits."""
    whole = NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.float32)
    places = dict.fromkeys(("model.embeddings", "model.norm_f", "lm_head", "mtp"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i in (1, 4) else "cpu" for i in range(6)}
    model = NemotronHForCausalLM.from_pretrained(
        saved["release"], dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    assert model.model.layers[1].mixer.experts.up_proj.is_meta
    with pytest.raises(ValueError, match=r"wait on disk cannot be calibrated, such as model.layers.1.mixer"):
        calibrate(model, [ids])
    with torch.no_grad():
        assert model(ids).logits.equal(whole(ids).logits)


def test_backbone_saved(saved, tmp_path, same_tensors):
    NemotronHModel.from_pretrained(saved["nvfp4"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, saved["nvfp4"]))
    kept = {n: t for n, t in expected.items() if n.startswith("backbone.")}
    assert found.keys() == kept.keys()
    same_tensors(
        *({n: t.view(torch.uint8) if t.dtype.itemsize == 1 else t for n, t in s.items()} for s in (found, kept))
    )


def test_close_to_full_precision(full, saved, ids, relative):
    """Both FP8 and the release's mix are closer than NVFP4 throughout."""
    exact = all_logits(full().float(), ids)
    errors = [
        relative(all_logits(NemotronHForCausalLM.from_pretrained(saved[r], dtype=torch.float32), ids), exact)
        for r in ("fp8", "release", "nvfp4")
    ]
    assert 0 < max(errors[:2]) < errors[2] < 1


def test_patterns_on_a_model(full, tmp_path):
    config = NVFP4Config(quant_algo="NVFP4", ignore=["lm_head", "mtp*", "*.mixer.[qk]_proj", "backbone.layers.1"])
    model = quantize_model(full(), config)
    model.save_pretrained(tmp_path)
    again = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert formats(again) == formats(model)
    kept = {n for n, f in formats(again).items() if f is None and n.startswith("backbone.")}
    first = {f"backbone.layers.1.mixer.{n}" for n in ("fc1_latent_proj", "fc2_latent_proj", "experts")}
    first |= {f"backbone.layers.1.mixer.shared_experts.{n}_proj" for n in ("up", "down")}
    assert kept == {"backbone.layers.2.mixer.q_proj", "backbone.layers.2.mixer.k_proj"} | first


def test_bias(full, ids, relative):
    """Biases stay in full precision and are added."""
    model = full(mlp_bias=True, attention_bias=True).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_()
    before = all_logits(model, ids)
    quantize_model(model, NVFP4Config(recipe="fp8"))
    assert relative(all_logits(model, ids), before) < 0.2
    assert model.model.layers[2].mixer.q_proj.bias.dtype == torch.float32


def test_changing_the_dtype_leaves_packed_tensors(saved, same_tensors):
    model = NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.float32)
    before = {
        n: t.clone()
        for n, t in bytes_of(model).items()
        if n.startswith("model.") and ("mixer.experts" in n or "in_proj" in n)
    }
    assert {t.dtype for t in before.values()} == {torch.uint8, torch.float32}
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == model.model.layers[1].mixer.gate.weight.dtype == torch.bfloat16
    after = bytes_of(model)
    same_tensors({n: after[n] for n in before}, before)


def test_cache_scales(saved, rewritten, tmp_path):
    """Scales of an FP8 cache are loaded beside weights in full precision, keep their dtype, and are saved again."""
    names = {f"backbone.layers.2.mixer.{x}_proj.{x}_scale": torch.tensor(0.1 + i) for i, x in enumerate("kv")}
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    folder = rewritten("release", lambda t: t.update(names), lambda c: c.update(kv_cache_scheme=scheme))
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32).to(torch.bfloat16)
    assert model.model.layers[2].mixer.v_proj.v_scale == torch.tensor(1.1)
    model.save_pretrained(tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert all(found[n].equal(t) for n, t in names.items())
    described = json.loads((tmp_path / "again" / "hf_quant_config.json").read_text())
    assert described["quantization"]["kv_cache_quant_algo"] == "FP8"
    model.dequantize()
    assert not any("_scale" in name for name in model.state_dict())


@pytest.mark.parametrize("value", [torch.nan, 0.0, -1.0])
def test_damaged_cache_scale(rewritten, value):
    names = {f"backbone.layers.2.mixer.{x}_proj.{x}_scale": torch.tensor(0.1) for x in "kv"}
    bad = "backbone.layers.2.mixer.v_proj.v_scale"
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    folder = rewritten(
        "release", lambda t: t.update(names | {bad: torch.tensor(value)}), lambda c: c.update(kv_cache_scheme=scheme)
    )
    with pytest.raises(ValueError, match=f"{bad}. It is damaged"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_generates(saved, ids):
    model = NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.float32)
    out = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        greedy = model(out[:, :-1]).logits[:, ids.shape[1] - 1 :].argmax(-1)
    assert greedy.equal(out[:, ids.shape[1] :])


IN_PROJ = "backbone.layers.0.mixer.in_proj"
EXPERT = "backbone.layers.1.mixer.experts.3.down_proj"
EMBEDDINGS = "backbone.embeddings.weight"


def put(name, value):
    """Overwrite a tensor's values, of whatever dtype."""
    return lambda tensors: tensors.update(
        {name: torch.full_like(tensors[name].float(), value).to(tensors[name].dtype)}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}.weight_scale_2"), f"lacks {EXPERT}.weight_scale_2"),
        (lambda t: t.pop(f"{EXPERT}.input_scale"), f"lacks {EXPERT}.input_scale"),
        (lambda t: t.pop(f"{IN_PROJ}.weight_scale"), f"lacks {IN_PROJ}.weight_scale"),
        (lambda t: t.pop(f"{EXPERT}.weight"), f"lacks {EXPERT}.weight,"),
        (
            lambda t: t.update({"backbone.layers.2.mixer.q_proj.weight_scale": torch.tensor(1.0)}),
            "in full precision: backbone.layers.2.mixer.q_proj.weight_scale",
        ),
        (
            lambda t: t.update({"backbone.layers.2.mixer.k_proj.k_scale": torch.tensor(1.0)}),
            "in full precision: backbone.layers.2.mixer.k_proj.k_scale",
        ),
        (
            lambda t: t.update({"backbone.embeddings.weight_scale": torch.tensor(1.0)}),
            "in full precision: backbone.embeddings.weight_scale",
        ),
        (
            lambda t: t.update({"mtp.layers.0.eh_proj.weight_scale": torch.tensor(1.0)}),
            "in full precision: mtp.layers.0.eh_proj.weight_scale",
        ),
        (
            lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].to(torch.float8_e4m3fn)}),
            rf"in full precision: {EMBEDDINGS} \(F8_E4M3\)",
        ),
        (put(f"{EXPERT}.weight_scale_2", torch.nan), f"{EXPERT}.weight_scale_2. It is damaged"),
        (put(f"{EXPERT}.weight_scale_2", 0.0), f"{EXPERT}.weight_scale_2. It is damaged"),
        (put(f"{EXPERT}.weight_scale_2", -1.0), f"{EXPERT}.weight_scale_2. It is damaged"),
        (put(f"{EXPERT}.input_scale", torch.inf), f"{EXPERT}.input_scale. It is damaged"),
        (put(f"{EXPERT}.weight_scale", torch.nan), f"{EXPERT}.weight_scale. It is damaged"),
        (put(f"{EXPERT}.weight_scale", 0.0), f"{EXPERT}.weight_scale. It is damaged"),
        (put(f"{EXPERT}.weight_scale", -1.0), f"{EXPERT}.weight_scale. It is damaged"),
        (put(f"{IN_PROJ}.weight_scale", 0.0), f"{IN_PROJ}.weight_scale. It is damaged"),
        (put(f"{IN_PROJ}.input_scale", torch.nan), f"{IN_PROJ}.input_scale. It is damaged"),
        (put(f"{IN_PROJ}.weight", torch.nan), f"{IN_PROJ}.weight. It is damaged"),
        (
            lambda t: t.update({f"{EXPERT}.weight": torch.zeros(16, 32, dtype=torch.bfloat16)}),
            f"{EXPERT}.weight is BF16, not U8",
        ),
        (
            lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:, :1].contiguous()}),
            rf"{EXPERT}.weight_scale has shape \(16, 1\), the configuration wants \(16, 2\)",
        ),
        (
            lambda t: t.update({n.replace("experts.3", "experts.6"): x.clone() for n, x in t.items() if EXPERT in n}),
            "in full precision: .*experts.6.down_proj",
        ),
    ],
)
def test_damaged_tensors(rewritten, change, message):
    with pytest.raises(ValueError, match=message):
        NemotronHForCausalLM.from_pretrained(rewritten("release", change))


def test_packed_tensors_do_not_start_afresh(rewritten):
    """`ignore_mismatched_sizes` would leave whatever is in memory as a scale."""
    folder = rewritten("fp8", lambda t: t.update({f"{IN_PROJ}.weight_scale": torch.ones(1)}))
    with pytest.raises(ValueError, match=rf"{IN_PROJ}.weight_scale has shape \(1,\).* Correct the configuration\.$"):
        NemotronHForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    model = NemotronHForCausalLM.from_pretrained(rewritten("fp8"), ignore_mismatched_sizes=True, vocab_size=70)
    assert model.lm_head.weight.shape[0] == 70


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
@pytest.mark.parametrize("config", [None, NVFP4Config(recipe="fp8")])
def test_without_a_configuration(rewritten, recipe, config):
    """Codes without their scales are other weights: they are not taken for full precision, nor quantised again."""
    folder = rewritten(recipe)
    described = json.loads((folder / "config.json").read_text())
    del described["quantization_config"]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"neither config.json nor hf_quant_config.json says .*{IN_PROJ}.weight"):
        NemotronHForCausalLM.from_pretrained(folder, quantization_config=config)


def test_damaged_files(saved, tmp_path):
    """A shard that is not there, and one that is cut off, by name."""
    NemotronHForCausalLM.from_pretrained(saved["nvfp4"]).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        NemotronHForCausalLM.from_pretrained(tmp_path)
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{shard.name}.* is not a whole safetensors file"):
        NemotronHForCausalLM.from_pretrained(tmp_path)


def test_a_part_is_not_saved(saved, tmp_path):
    model = NemotronHForCausalLM.from_pretrained(saved["release"])
    with pytest.raises(ValueError, match=r"part of a quantised model.*save that one"):
        model.model.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists() and model.config.quantization_config.quant_algo == "MIXED_PRECISION"


def test_hf_quant_config_alone(saved, tmp_path):
    """It describes the checkpoint; a configuration that the caller gives stays as it was."""
    shutil.copytree(saved["nvfp4"], tmp_path, dirs_exist_ok=True)
    described = json.loads((tmp_path / "config.json").read_text())
    del described["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = AutoConfig.from_pretrained(tmp_path)
    model = NemotronHForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.config.quantization_config.quant_algo == "NVFP4"
    assert getattr(config, "quantization_config", None) is None


def layer(name, algo="NVFP4"):
    return lambda c: c["quantized_layers"].update({name: {"quant_algo": algo}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (layer("backbone.layers.9.mixer.in_proj"), "backbone.layers.9.mixer.in_proj is not there"),
        (layer("backbone.layers.1.mixer.experts.77.up_proj"), "experts.77.up_proj is not there"),
        (layer("backbone.embeddings"), "backbone.embeddings is a Embedding, not a linear map"),
        (layer("backbone.layers.0.mixer.conv1d"), "conv1d is a NemotronHCausalConv1d"),
        (layer("backbone.layers.1.mixer.gate"), "gate is a NemotronHTopkRouter"),
        (layer(EXPERT, "FP8"), rf"in one format, but .*{EXPERT} is in FP8"),
        (lambda c: c["quantized_layers"].pop(EXPERT), f"in one format, but .*{EXPERT} is in full precision"),
        (layer("backbone.layers.2.mixer.q_proj"), "lacks backbone.layers.2.mixer.q_proj.weight_scale"),
        (lambda c: c["quantized_layers"].pop(IN_PROJ), f"leaves in full precision: {IN_PROJ}"),
        (layer(IN_PROJ, "INT8"), "unknown `quant_algo` 'INT8'"),
        (lambda c: c.update(quant_algo="FP4"), "`quant_algo` 'FP4'"),
        (
            lambda c: c.update(kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"}),
            "lacks backbone.layers.2.mixer.k_proj.k_scale",
        ),
    ],
)
def test_configuration_of_another_checkpoint(rewritten, change, message):
    with pytest.raises(ValueError, match=message):
        NemotronHForCausalLM.from_pretrained(rewritten("release", config=change))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_half_quantised(full, value):
    """A weight that cannot be quantised is named before any other is touched."""
    model = full()
    with torch.no_grad():
        model.model.layers[5].mixer.experts.down_proj[2, 0, 0] = value
    with pytest.raises(ValueError, match=r"backbone.layers.5.mixer.experts.*NaN or infinity"):
        quantize_model(model, NVFP4Config(recipe="release"))
    assert not any(isinstance(m, QuantizedLinear | QuantizedExperts) for m in model.modules())
    assert getattr(model, "hf_quantizer", None) is None


def test_what_cannot_be_quantised(full, saved):
    narrow = full(moe_intermediate_size=24)
    with pytest.raises(ValueError, match=r"backbone.layers.1.mixer.experts.* rows of 24, which NVFP4's blocks of 16"):
        quantize_model(narrow, NVFP4Config(recipe="nvfp4"))
    quantize_model(narrow, NVFP4Config(recipe="fp8"))
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(narrow, NVFP4Config(recipe="fp8"))
    with pytest.raises(ValueError, match="shares its weight with the embeddings"):
        quantize_model(full(tie_word_embeddings=True), NVFP4Config(quant_algo="FP8"))
    with pytest.raises(ValueError, match="'mps', which has no float8"):
        NemotronHForCausalLM.from_pretrained(saved["nvfp4"], device_map="mps")
    with pytest.raises(ValueError, match="'mps', which has no float8"):
        NemotronHForCausalLM.from_pretrained(saved["nvfp4"], device_map={"model": "cpu", "": "mps"})
    with pytest.raises(ValueError, match="no quantised layer"):
        simulate_activations(full())


def test_what_is_not_in_memory(full, tmp_path):
    """Weights that wait on disk cannot be quantised on the way: said before any is."""
    full().save_pretrained(tmp_path / "full")
    places = dict.fromkeys(("model.embeddings", "model.norm_f", "lm_head", "mtp"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(6)}
    with pytest.raises(ValueError, match=r"backbone.layers.1.mixer.*is not in memory and cannot be quantised"):
        NemotronHForCausalLM.from_pretrained(
            tmp_path / "full",
            device_map=places,
            offload_folder=tmp_path / "disk",
            quantization_config=NVFP4Config(recipe="nvfp4"),
        )


def test_dequantizing_to_another_dtype(saved, ids, tmp_path):
    """The whole model goes along, so that it runs, and is saved as it is."""
    model = NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.bfloat16)
    expected = all_logits(NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.float32), ids)
    model.dequantize(torch.float32)
    assert all_logits(model, ids).equal(expected)
    model.save_pretrained(tmp_path)
    assert all_logits(NemotronHForCausalLM.from_pretrained(tmp_path, dtype="auto"), ids).equal(expected)
    moved = NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.bfloat16).to(torch.float32)
    assert all_logits(moved.dequantize(), ids).equal(expected)


def test_configuration_of_a_model_in_memory(saved, ids, tmp_path):
    """It opens a checkpoint, and makes a fresh model, which is in full precision and says so when it is saved."""
    model = NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.float32)
    again = NemotronHForCausalLM.from_pretrained(saved["release"], config=model.config, dtype=torch.float32)
    assert all_logits(again, ids).equal(all_logits(model, ids))
    assert isinstance(model.config.quantization_config, NVFP4Config)  # the caller's is left as it was
    NemotronHForCausalLM(again.config).save_pretrained(tmp_path)
    assert formats(NemotronHForCausalLM.from_pretrained(tmp_path)) == dict.fromkeys(formats(model))
    assert isinstance(again.config.quantization_config, NVFP4Config)  # which the fresh model shared


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_damaged_hf_quant_config(rewritten, content):
    folder = rewritten("fp8")
    described = json.loads((folder / "config.json").read_text())
    del described["quantization_config"]
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "hf_quant_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"hf_quant_config.json (is not JSON|has no `quantization`)"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_state_dict_with_published_names(saved, make_model, same_tensors):
    """`load_state_dict` stacks packed experts with their scales, names those that are missing, and takes no values for codes."""
    stored = load_file(saved["fp8"] / "model.safetensors")
    other = make_model(PATTERN, seed=6, **MTP, **SIZES).to(torch.bfloat16)
    model = quantize_model(other, NVFP4Config(recipe="fp8"))
    model.load_state_dict(dict(stored))
    expected = NemotronHForCausalLM.from_pretrained(saved["fp8"], dtype=torch.bfloat16)
    same_tensors(bytes_of(model), bytes_of(expected))

    found = model.load_state_dict({n: t for n, t in stored.items() if n != f"{EXPERT}.input_scale"}, strict=False)
    assert found.missing_keys == [f"{EXPERT}.input_scale".replace("backbone", "model")] and not found.unexpected_keys
    with pytest.raises(RuntimeError, match=f"{EXPERT}.weight is torch.bfloat16, expected torch.float8_e4m3fn"):
        model.load_state_dict(stored | {f"{EXPERT}.weight": stored[f"{EXPERT}.weight"].to(torch.bfloat16)})
    same_tensors(bytes_of(model), bytes_of(expected))


def test_own_names_are_not_saved(saved, tmp_path):
    """Nobody could open them; nothing is written."""
    model = NemotronHForCausalLM.from_pretrained(saved["release"])
    with pytest.raises(ValueError, match="`save_original_format=False` stacks experts"):
        model.save_pretrained(tmp_path / "own", save_original_format=False)
    assert not (tmp_path / "own").exists()


def test_pickling(saved, ids):
    """torch.save of a whole model, not only of its state."""
    model = NemotronHForCausalLM.from_pretrained(saved["release"], dtype=torch.float32)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert all_logits(torch.load(file, weights_only=False), ids).equal(all_logits(model, ids))


def test_weights_of_zero(full, ids, tmp_path):
    """An expert that never learnt anything has amax 0: its scale must not be."""
    model = full()
    with torch.no_grad():
        model.model.layers[1].mixer.experts.up_proj[0] = 0
    quantize_model(model, NVFP4Config(recipe="nvfp4")).save_pretrained(tmp_path)
    again = NemotronHForCausalLM.from_pretrained(tmp_path)
    experts = again.model.layers[1].mixer.experts
    assert experts.up_proj_weight_scale_2[0] == 1
    assert not experts.dequantize("up_proj", torch.float32)[0].any()
    assert all_logits(again, ids).isfinite().all()


def test_products_of_quantised_operands(full, ids, relative):
    """FP8 by FP8, which torch multiplies on a CPU too, is what simulating the activations gives; gradients flow."""
    model = quantize_model(
        full(mamba_num_heads=8, n_groups=1, ssm_state_size=4).float(), NVFP4Config(recipe="release")
    )
    plain = all_logits(model, ids)
    simulate_activations(model)
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            module.simulate_activations = False  # whose inputs `quantize_activations` leaves alone
    simulated = all_logits(model, ids)
    quantize_activations(model, "FP8")
    assert relative(plain, simulated) > 1e-4
    assert relative(all_logits(model, ids), simulated) < 1e-5
    model(ids, labels=ids).loss.backward()
    assert model.model.embeddings.weight.grad.abs().sum() > 0
    quantize_activations(model, ())
    assert all_logits(model, ids).equal(plain)


@pytest.mark.parametrize(
    ("recipe", "formats", "message"),
    [
        ("release", ("FP4",), "Unknown format 'FP4': known are NVFP4, FP8"),
        ("release", ("NVFP4",), "no linear map in NVFP4"),
        (
            "fp8",
            ("FP8",),
            r"inputs of model.layers.0.mixer.in_proj cannot be quantised: a weight of shape \(100, 32\)",
        ),
        ("nvfp4", ("NVFP4",), "'cpu' does not multiply FP4 operands"),
    ],
)
def test_operands_that_cannot_be_multiplied(full, recipe, formats, message):
    """Refused before anything is changed."""
    model = quantize_model(full(), NVFP4Config(recipe=recipe))
    with pytest.raises(ValueError, match=message):
        quantize_activations(model, formats)
    assert not any(getattr(module, "quantize_activations", False) for module in model.modules())


@pytest.mark.parametrize("recipe", ["release", "fp8"])
def test_fetched_experts(full, recipe):
    """The chosen experts alone, renumbered, give what all of them give; so they may lie in another memory."""
    model = quantize_model(full().float(), NVFP4Config(recipe=recipe))
    experts = model.model.layers[1].mixer.experts
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 16, generator=generator), torch.rand(3, 2, generator=generator)
    index = torch.tensor([[5, 2], [2, 0], [5, 0]])
    scales = experts.up_proj_input_scale, experts.down_proj_input_scale
    for given in (None, scales):
        stored = experts.stored("up_proj"), experts.stored("down_proj")
        up, down, fetched, renumbered, chosen = _fetch(*stored, given, index)
        assert all(len(tensor) == 3 for tensor in (*up, *down)) and renumbered.tolist() == [[2, 1], [1, 0], [2, 0]]
        assert chosen.tolist() == [0, 2, 5]
        found = experts.weight_format.experts(x, renumbered, weights, up, down, fetched)
        experts.simulate_activations = given is not None
        assert found.equal(experts(x, index, weights))


def test_experts_in_cpu_memory(full):
    model = quantize_model(full(), NVFP4Config(recipe="release"))
    sets = [m for m in model.modules() if isinstance(m, QuantizedExperts)]
    bytes_each = sum(p.nbytes for p in sets[0].parameters())
    assert offload_experts(model, 0) == 0 and offload_experts(model, 1) == bytes_each
    assert offload_experts(model) == len(sets) * bytes_each
    for layers in (-1, len(sets) + 1):
        with pytest.raises(ValueError, match=rf"`layers` is {layers}: the model has {len(sets)} quantised sets"):
            offload_experts(model, layers)
    with pytest.raises(ValueError, match="no quantised experts that could be kept in CPU memory"):
        offload_experts(full())
