"""Keys and values in FP8: those of the simulation to the bit, half the memory, and everything a cache can do."""

import copy

import pytest
import torch
from nemotron_super import HybridCache, NVFP4Config, calibrate, quantize_model, simulate_activations
from nemotron_super.modeling import attention
from nemotron_super.modeling.fp8_cache import FP8, Fp8CacheLayer, Fp8Format, cache_scales
from nemotron_super.modeling.quantized_layers import CacheScaledLinear
from nemotron_super.modeling.snapshot import load_snapshot, save_snapshot
from nemotron_super.modeling.static_cache import StaticFp8Layer, StaticHybridCache
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig

SIZES = {"hidden_size": 32, "moe_latent_size": 16, "moe_intermediate_size": 32, "intermediate_size": 48}
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
PATTERN = "*E*M-"
STATIC = {"cache_implementation": "static", "cache_config": {"backend": "fp8"}}
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


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("change", ["select", "repeat", "reorder", "offload", "copy", "reset"])
def test_rows_and_places(change, fixed, model):
    ids, more = tokens(3, 9), tokens(3, 4, 1)
    empty = StaticHybridCache(model.config, 20, kv_dtype=FP8) if fixed else None
    cache, rows = in_calls(model, ids, [6, 3], empty)[1], torch.arange(3)
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


@pytest.mark.parametrize(
    "options", [{}, {"use_mtp": True}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"prefill_chunk_size": 4}]
)
def test_generate_with_a_fixed_size(options, model):
    """In the same cache, of fixed size: the tokens of the one that grows."""
    ids = tokens(1, 9)
    expected = model.generate(ids, cache_implementation="quantized", **GREEDY, **options)
    for _ in range(2):  # the second time in the cache of the first
        assert model.generate(ids, **STATIC, **GREEDY, **options).equal(expected)
    found = model.generate(ids, return_dict_in_generate=True, **STATIC, **GREEDY, **options)
    layer = found.cache.layers[0]
    assert found.sequences.equal(expected) and type(layer) is StaticFp8Layer
    assert layer.keys.dtype == layer.values.dtype == FP8 == found.cache.kv_dtype
    # It goes on, and is not given to those who ask for another.
    turn = torch.cat([found.sequences, tokens(1, 3, 4)], 1)
    if "num_beams" not in options:
        expected = model.generate(turn, cache_implementation="quantized", **GREEDY)
        assert model.generate(turn, cache=found.cache, **GREEDY).equal(expected)
    plain = model.generate(ids, cache_implementation="static", return_dict_in_generate=True, **GREEDY)
    assert type(plain.cache.layers[0]) is not StaticFp8Layer


@pytest.mark.parametrize("drafts", [{}, {"use_mtp": True, "num_assistant_tokens": 5}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_fixed_size(seed, drafts, model):
    """Padding, rows that go on from places of their own, and rows that end."""
    ids = tokens(3, 8, seed)
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [5]])).long()
    options = GREEDY | {"attention_mask": mask, "eos_token_id": list(range(10)), "max_new_tokens": 20}
    ids = ids.masked_fill(mask == 0, 0)
    expected = model.generate(ids, cache_implementation="quantized", **options)
    assert model.generate(ids, **STATIC, **options, **drafts).equal(expected)


@torch.no_grad()
def test_fixed_steps_attend_to_what_is_stored(model, monkeypatch):
    """FP8 goes in as it lies there, with the scales; nobody dequantises all slots."""
    seen = []

    def note(query, key, value, *args):
        seen.append((key, value, *args[3:]))
        return call(query, key, value, *args)

    call = attention.decode_attention
    monkeypatch.setattr(attention, "decode_attention", note)
    found = model.generate(tokens(1, 9), return_dict_in_generate=True, **STATIC, **GREEDY)
    layer, mixer = found.cache.layers[0], model.model.layers[0].mixer
    key, value, k_scale, v_scale = seen[0]
    assert key.dtype == value.dtype == FP8 and key.data_ptr() == layer.keys.data_ptr()
    assert k_scale.equal(mixer.k_proj.k_scale) and v_scale.equal(mixer.v_proj.v_scale)
    assert len(seen) == 11 * 2


@torch.no_grad()
def test_scales_measured_again(model):
    """A cache that is used again takes them, where recorded steps look for them."""
    ids = tokens(1, 9)
    cache = StaticHybridCache(model.config, 64, kv_dtype=FP8)
    feed(model, cache, ids)
    places = [t.data_ptr() for t in cache.layers[0].scales]
    for module in model.modules():
        if isinstance(module, CacheScaledLinear):
            getattr(module, module.cache_scale).mul_(8)
    before = [t.clone() for t in cache.layers[0].scales]
    feed(model, cache, ids[:, :1])
    assert all(a.equal(b) for a, b in zip(cache.layers[0].scales, before, strict=True))
    cache.reset()
    assert feed(model, cache, ids).equal(feed(model, HybridCache(model.config, kv_dtype=FP8), ids))
    assert all(a.equal(8 * b) for a, b in zip(cache.layers[0].scales, before, strict=True))
    assert [t.data_ptr() for t in cache.layers[0].scales] == places


def test_tokens_taken_back_from_a_fixed_size(model):
    ids, draft, last = tokens(2, 7), tokens(2, 5, 1), tokens(2, 3, 2)
    cache = StaticHybridCache(model.config, 32, kv_dtype=FP8)
    cache.activate_past_recording()
    feed(model, cache, ids)
    cache.crop(0)
    feed(model, cache, draft)
    cache.crop(-3)
    found = feed(model, cache, last)
    expected = in_calls(model, torch.cat([ids, draft[:, :2], last], 1), [12])[0][:, -3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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


def test_snapshot_of_a_fixed_size(model, tmp_path):
    """Only what is filled, to be continued in a cache that grows."""
    found = model.generate(tokens(1, 9), return_dict_in_generate=True, use_mtp=True, **STATIC, **GREEDY)
    save_snapshot(found.cache, tmp_path / "a.safetensors", model)
    again = load_snapshot(tmp_path / "a.safetensors", model, kv_dtype=FP8)
    assert again.layers[0].keys.shape[2] == 20 and again.layers[0].keys.dtype == FP8
    assert again.layers[0].format.k_scale.equal(found.cache.layers[0].format.k_scale)
    more = tokens(1, 4, 1)
    torch.testing.assert_close(feed(model, again, more), feed(model, found.cache, more), rtol=1e-5, atol=1e-5)


def test_what_is_refused(model):
    with pytest.raises(ValueError, match=r"`kv_dtype` is torch\.float16"):
        HybridCache(model.config, kv_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"`kv_dtype` is torch\.float16"):
        StaticHybridCache(model.config, 9, kv_dtype=torch.float16)
    ids = tokens(1, 4)
    with pytest.raises(ValueError, match="backend 'quanto'"):
        model.generate(ids, cache_implementation="static", cache_config={"backend": "quanto"}, **GREEDY)
    with pytest.raises(ValueError, match="compile_config"):
        model.generate(ids, compile_config=CompileConfig(), **STATIC, **GREEDY)
    with pytest.raises(ValueError, match="backend 'quanto'"):
        model.generate(ids, cache_implementation="quantized", cache_config={"backend": "quanto"}, **GREEDY)
    with pytest.raises(ValueError, match="has nbits"):
        model.generate(ids, cache_implementation="quantized", cache_config={"nbits": 4}, **GREEDY)
    with pytest.raises(RuntimeError, match="no_grad"):
        model(ids, cache=HybridCache(model.config, kv_dtype=FP8))
    with pytest.raises(RuntimeError, match="no_grad"):
        model(ids, cache=StaticHybridCache(model.config, 9, kv_dtype=FP8))
