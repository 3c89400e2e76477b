"""ModelOpt's two JSON dialects: read, written, and refused where they say what is not known here."""

import pytest
from nemotron_super import NVFP4Config
from transformers.quantizers.auto import AutoQuantizationConfig

LAYERS = {"backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"}, "x": {"quant_algo": "NVFP4", "group_size": 16}}
CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    "config",
    [
        NVFP4Config(quant_algo="NVFP4", ignore=["lm_head", "*.conv1d"]),
        NVFP4Config(quant_algo="FP8"),
        NVFP4Config(quant_algo="MIXED_PRECISION", quantized_layers=LAYERS),
        NVFP4Config(quant_algo="MIXED_PRECISION", quantized_layers=LAYERS, kv_cache_scheme=CACHE, ignore=["mtp*"]),
        NVFP4Config(quant_algo="NVFP4", producer={"name": "modelopt", "version": "0.99"}),
    ],
)
def test_either_dialect_says_it_all(config):
    for described in (config.to_dict(), {"quant_method": "modelopt", **config.to_hf_quant_config()}):
        again = AutoQuantizationConfig.from_dict(described)
        assert isinstance(again, NVFP4Config)
        assert again.to_dict() == config.to_dict()
        assert again.to_hf_quant_config() == config.to_hf_quant_config()


def test_a_layer_map_in_groups_alone():
    described = NVFP4Config(quant_algo="MIXED_PRECISION", quantized_layers=LAYERS).to_dict()
    del described["quantized_layers"]
    assert NVFP4Config.from_dict(described).quantized_layers == LAYERS


@pytest.mark.parametrize(
    ("pattern", "hit", "missed"),
    [
        ("lm_head", ["lm_head"], ["lm_head_2", "backbone.lm_head"]),
        ("mtp*", ["mtp.layers.0.eh_proj"], ["backbone.layers.0.mtp"]),
        ("backbone.layers.1", ["backbone.layers.1.mixer.in_proj"], ["backbone.layers.10.mixer.in_proj"]),
        ("*.mixer.[qkv]_proj", ["backbone.layers.7.mixer.k_proj"], ["backbone.layers.7.mixer.o_proj"]),
        ("*.experts.*", ["a.experts.0.up_proj"], ["a.shared_experts.up_proj"]),
    ],
)
def test_patterns(pattern, hit, missed):
    config = NVFP4Config(quant_algo="NVFP4", ignore=[pattern])
    assert [config.format_of(name) for name in hit] == [None] * len(hit)
    assert [config.format_of(name) for name in missed] == ["NVFP4"] * len(missed)


def group(bits, group_size=None):
    return {
        "group_0": {"weights": {"num_bits": bits, "type": "float", "group_size": group_size}, "targets": ["Linear"]}
    }


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"recipe": "int4"}, "recipe 'int4': known are release, nvfp4, fp8"),
        ({}, "one of `recipe`, `quant_algo` and `quantization`"),
        ({"recipe": "fp8", "quant_algo": "FP8"}, "one of `recipe`"),
        (
            {"recipe": "nvfp4", "ignore": ["lm_head"]},
            "`recipe` 'nvfp4' says which modules .* leave out ignore, or give",
        ),
        ({"recipe": "fp8", "kv_cache_scheme": CACHE}, "leave out kv_cache_scheme"),
        (
            {"quantization": {"quant_algo": "FP8"}, "ignore": ["lm_head"]},
            "`quantization` says which modules .* ignore",
        ),
        ({"quant_algo": "FP8", "ignore": "lm_head"}, "must be a list, not the string 'lm_head'"),
        ({"quantization": {"quant_algo": "FP8", "exclude_modules": "mtp*"}}, "a list, not the string 'mtp\\*'"),
        ({"quant_algo": "FP8", "kv_cache_scheme": "FP8"}, "`kv_cache_scheme` is 'FP8', not a dictionary"),
        ({"quant_algo": "FP8", "config_groups": ["Linear"]}, r"`config_groups` is \['Linear'\], not a dictionary"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": ["a"]}, r"`quantized_layers` is \['a'\], not a dict"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": "FP8"}}, "a.b is 'FP8', not a dictionary"),
        ({"quant_algo": "MIXED_PRECISION", "config_groups": {"group_0": {}}}, "names no `targets`"),
        ({"quantization": ["FP8"]}, r"hf_quant_config.json is \['FP8'\], not a dictionary"),
        ({"quant_algo": "W4A8_AWQ"}, "`quant_algo` 'W4A8_AWQ': known are NVFP4, FP8, MIXED_PRECISION"),
        ({"quant_algo": "NVFP4", "config_groups": group(4, 32)}, "`config_groups` has `group_size` 32.* blocks of 16"),
        ({"quant_algo": "NVFP4", "config_groups": group(3)}, "known are 4-bit and 8-bit floats"),
        ({"quant_algo": "NVFP4", "kv_cache_scheme": {**CACHE, "num_bits": 4}}, "`kv_cache_scheme`.*8-bit floats"),
        ({"quant_algo": "NVFP4", "quantized_layers": LAYERS}, "`quantized_layers` belongs to MIXED_PRECISION"),
        ({"quant_algo": "MIXED_PRECISION"}, "needs `quantized_layers`"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": "INT8"}}},
            "a.b has the unknown `quant_algo` 'INT8'",
        ),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": "NVFP4", "group_size": 8}}},
            "a.b has `group_size` 8",
        ),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 128}}, "hf_quant_config.json has `group_size` 128"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}}, "`kv_cache_quant_algo` is 'NVFP4'"),
        ({"quantization": {"quant_algo": "FP8", "has_zero_point": True}}, "not known here: has_zero_point"),
        ({"quantization": {"quant_algo": "NVFP4_AWQ", "pre_quant_scale": True}}, "`quant_algo` 'NVFP4_AWQ'"),
        ({"quant_algo": "MXFP8", "config_groups": {"group_0": {"quant_algo": "MXFP8"}}}, "`quant_algo` 'MXFP8'"),
        ({"quant_algo": "NVFP4", "kv_cache_scheme": "NVFP4"}, "`kv_cache_scheme` is 'NVFP4'"),
        ({"quant_algo": "FP8", "smoothing": 1}, "`quantization_config` has keys that are not known here: smoothing"),
    ],
)
def test_what_is_refused(described, message):
    with pytest.raises(ValueError, match=message):
        NVFP4Config.from_dict({"quant_method": "modelopt", **described})
