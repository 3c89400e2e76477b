"""Keys and values in FP8: those of the simulation to the bit, half the memory, and everything a cache can do."""

import copy

import pytest
import torch
from nemotron_super import HybridCache, NVFP4Config, calibrate, quantize_model, simulate_activations
from nemotron_super.modeling.fp8_cache import FP8, Fp8CacheLayer, Fp8Format, cache_scales
from nemotron_super.modeling.quantized_layers import CacheScaledLinear
from nemotron_super.modeling.snapshot import load_snapshot, save_snapshot
from peft import LoraConfig, get_peft_model

SIZES = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 32, "intermediate_size": 48}
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
PATTERN = "*E*M-"
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tokens(rows, count, seed=0):
    return torch.randint(3, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(make_model):
    """With the scales of a cache, measured, beside projections in full precision."""
    model = quantize_model(make_model(PATTERN, seed=5, **MTP, **SIZES), NVFP4Config(recipe="release"))
    return calibrate(model, [tokens(2, 9, seed) for seed in range(2)])


def simulate_cache(model):
    """Round keys and values, and nothing else."""
    simulate_activations(model)
    for module in model.modules():
        if getattr(module, "simulate_activations", False) and not isinstance(module, CacheScaledLinear):
            module.simulate_activations = False
    return model


@torch.no_grad()
def feed(model, cache, ids, mask=None):
    return model(ids, attention_mask=mask, cache=cache, use_cache=True).logits


def in_calls(model, ids, sizes, cache=None):
    cache = HybridCache(model.config, kv_dtype=FP8) if cache is None else cache
    return torch.cat([feed(model, cache, part) for part in ids.split(sizes, 1)], 1), cache


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [[14], [1] * 14, [5, 1, 8], [13, 1]])
def test_equals_the_simulation(sizes, attn, model):
    """Call by call, from the first token on: what is stored is what the simulation computes with."""
    model.set_attn_implementation(attn)
    ids = tokens(2, 14)
    found, cache = in_calls(model, ids, sizes)
    simulated = HybridCache(model.config)
    expected, _ = in_calls(simulate_cache(copy.deepcopy(model)), ids, sizes, simulated)
    assert found.equal(expected)
    assert not found.equal(in_calls(model, ids, sizes, HybridCache(model.config))[0])
    for index in (0, 2):
        layer, plain, mixer = cache.layers[index], simulated.layers[index], model.model.layers[index].mixer
        assert layer.keys.dtype == layer.values.dtype == torch.float8_e4m3fn
        assert (layer.keys.float() * mixer.k_proj.k_scale).equal(plain.keys)
        assert (layer.values.float() * mixer.v_proj.v_scale).equal(plain.values)


@torch.no_grad()
def test_half_the_bytes(model):
    model = model.bfloat16()

    def held(cache):
        return sum(
            t.numel() * t.element_size() for i in (0, 2) for t in (cache.layers[i].keys, cache.layers[i].values)
        )

    wide, narrow = HybridCache(model.config), HybridCache(model.config, kv_dtype=FP8)
    for cache in (wide, narrow):
        feed(model, cache, tokens(2, 50))
    assert (
        2 * held(narrow) == held(wide) == 2 * 2 * 2 * 50 * 2 * 8 * 2
    )  # layers, k and v, rows, tokens, heads, width, bytes
    keys, values = narrow.layers[0].update(*(torch.zeros(2, 2, 1, 8, dtype=torch.bfloat16),) * 2)
    assert keys.dtype == values.dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["select", "repeat", "reorder", "offload", "copy", "reset"])
def test_rows_and_places(change, model):
    ids, more = tokens(3, 9), tokens(3, 4, 1)
    cache, rows = in_calls(model, ids, [6, 3])[1], torch.arange(3)
    if change == "select":
        rows = torch.tensor([2, 0])
        cache.batch_select_indices(rows)
    elif change == "repeat":
        rows = rows.repeat_interleave(2)
        cache.batch_repeat_interleave(2)
    elif change == "reorder":
        rows = torch.tensor([1, 1, 0])
        cache.reorder_cache(rows)
    elif change == "copy":
        used, cache = cache, copy.deepcopy(cache)
        feed(model, used, tokens(3, 2, 7))
    elif change == "offload":
        for layer in cache.layers:
            if isinstance(layer, Fp8CacheLayer):
                layer.offload()
                layer.prefetch()
    else:
        cache.reset()
        assert cache.get_seq_length() == 0
        feed(model, cache, ids)
    found = in_calls(model, more[rows], [1, 3], cache)[0]
    assert cache.layers[0].keys.dtype == FP8
    expected = in_calls(model, torch.cat([ids, more], 1)[rows], [6, 3, 1, 3])[0][:, -4:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rollback(model):
    """Tokens taken back leave no trace, for all rows together and row by row."""
    ids, draft, last = tokens(2, 7), tokens(2, 5, 1), tokens(2, 3, 2)
    cache = HybridCache(model.config, kv_dtype=FP8)
    cache.activate_past_recording()
    feed(model, cache, ids)
    cache.crop(0)
    feed(model, cache, draft)
    cache.crop(-3)
    assert cache.get_seq_length() == 9 and cache.layers[0].keys.shape[2] == 9
    found = feed(model, cache, last)
    expected = in_calls(model, torch.cat([ids, draft[:, :2], last], 1), [12])[0][:, -3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    cache.crop(torch.tensor([-3, -1]))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 9:] = 0
    found = feed(model, cache, draft[:, :2], torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1))
    for row, kept in ((0, 0), (1, 2)):
        text = torch.cat([ids[row], draft[row, :2], last[row, :kept], draft[row, :2]])[None]
        expected = in_calls(model, text, [text.shape[1]])[0][0, -2:]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"use_mtp": True}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"prefill_chunk_size": 4}]
)
def test_generate(options, model):
    """Chosen as any transformers model's quantised cache; every way of decoding gives the simulation's tokens."""
    ids = tokens(1, 9)
    found = model.generate(
        ids,
        cache_implementation="quantized",
        cache_config={"backend": "fp8"},
        return_dict_in_generate=True,
        **GREEDY,
        **options,
    )
    assert isinstance(found.cache.layers[0], Fp8CacheLayer) and found.cache.layers[0].keys.dtype == FP8
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    expected = simulate_cache(copy.deepcopy(model)).generate(ids, **GREEDY, **beams)
    assert found.sequences.equal(expected)


def test_only_where_asked_for(model, tmp_path):
    """The scales alone change nothing; the generation config may ask, and is saved with the model."""
    ids = tokens(2, 9)
    plain = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert not any(isinstance(layer, Fp8CacheLayer) for layer in plain.cache.layers)
    model.generation_config.cache_implementation = "quantized"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    asked = again.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert isinstance(asked.cache.layers[0], Fp8CacheLayer)
    assert asked.cache.layers[0].format.k_scale.equal(model.model.layers[0].mixer.k_proj.k_scale)
    # Without a cache, or with one that was given, there is nothing to choose.
    given = HybridCache(model.config)
    assert again.generate(ids, use_cache=False, **GREEDY).equal(plain.sequences)
    assert model.generate(ids, cache=given, cache_implementation=None, **GREEDY).equal(plain.sequences)


def test_models_without_scales(make_model):
    """A scale of 1, which is said; a model in full precision may have such a cache too."""
    model = make_model("M*")
    ids = tokens(2, 11)
    found, cache = in_calls(model, ids, [8, 1, 2])
    assert cache.layers[1].format.k_scale == cache.layers[1].format.v_scale == 1
    plain = HybridCache(model.config)
    feed(model, plain, ids)
    assert cache.layers[1].keys.float().equal(plain.layers[1].keys.clamp(-448, 448).to(FP8).float())
    assert not found.equal(feed(model, HybridCache(model.config), ids))


def test_scales_behind_adapters(model):
    mixer = model.model.layers[0].mixer
    expected = {"k_scale": mixer.k_proj.k_scale, "v_scale": mixer.v_proj.v_scale}
    assert cache_scales(mixer.k_proj, mixer.v_proj) == expected
    adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj", "v_proj"]))
    mixer = adapted.get_base_model().get_submodule("model.layers.0.mixer")
    assert hasattr(mixer.k_proj, "lora_A") and cache_scales(mixer.k_proj, mixer.v_proj) == expected


def test_the_range_ends_and_does_not_wrap():
    one = Fp8Format.from_scales(torch.tensor(0.5), None, torch.device("cpu"))
    keys, values = one.unpack(*one.pack(torch.tensor([1e6, -1e6, 3.0]), torch.tensor([1e6, 0.0, -1e6])), torch.float32)
    assert keys.tolist() == [224.0, -224.0, 3.0] and values.tolist() == [448.0, 0.0, -448.0]


def test_snapshot(model, tmp_path):
    """Stored as it is, scales and all; a snapshot of another cache dtype is refused, either way."""
    ids, more = tokens(1, 20), tokens(1, 4, 1)
    for kv_dtype in (FP8, None):
        cache = HybridCache(model.config, kv_dtype=kv_dtype)
        feed(model, cache, ids)
        save_snapshot(cache, tmp_path / "a.safetensors", model)
        again = load_snapshot(tmp_path / "a.safetensors", model, kv_dtype=kv_dtype)
        assert again.layers[0].keys.dtype == (kv_dtype or torch.float32) and again.get_seq_length() == 20
        assert feed(model, again, more).equal(feed(model, cache, more))
        with pytest.raises(ValueError, match=r"kv_dtype=torch.float8_e4m3fn|kv_dtype=None"):
            load_snapshot(tmp_path / "a.safetensors", model, kv_dtype=None if kv_dtype else FP8)


def test_what_is_refused(model):
    with pytest.raises(ValueError, match=r"`kv_dtype` is torch\.float16"):
        HybridCache(model.config, kv_dtype=torch.float16)
    ids = tokens(1, 4)
    with pytest.raises(ValueError, match="backend 'quanto'"):
        model.generate(ids, cache_implementation="quantized", cache_config={"backend": "quanto"}, **GREEDY)
    with pytest.raises(ValueError, match="has nbits"):
        model.generate(ids, cache_implementation="quantized", cache_config={"nbits": 4}, **GREEDY)
    with pytest.raises(RuntimeError, match="no_grad"):
        model(ids, cache=HybridCache(model.config, kv_dtype=FP8))
