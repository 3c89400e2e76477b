"""Published files are read as they are and written without loss; what cannot work is refused by name."""

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given
from hypothesis import strategies as st
from nemotron_super import NemotronHConfig, preset
from transformers import AutoConfig
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig as UpstreamConfig

PUBLISHED = {path.stem: path for path in Path(__file__).parent.glob("published/*.json")}
SHORT = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
LONG = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
LETTER = {**{name: letter for letter, name in SHORT.items()}, **{name: letter for letter, name in LONG.items()}}
SPELLINGS = ("as published", "pattern", "short names", "long names")


def respell(fields: dict, spelling: str) -> dict:
    """The same file with its layer lists in another spelling."""
    if spelling == "as published":
        return fields
    fields = dict(fields)
    for prefix in ("", "mtp_"):
        pattern = fields.pop(f"{prefix}hybrid_override_pattern", None)
        pattern = pattern or "".join(LETTER[name] for name in fields.pop(f"{prefix}layers_block_type", []))
        if pattern and spelling == "pattern":
            fields[f"{prefix}hybrid_override_pattern"] = pattern
        elif pattern:
            names = SHORT if spelling == "short names" else LONG
            fields[f"{prefix}layers_block_type"] = [names[letter] for letter in pattern]
    return fields


def read(folder: Path, fields: dict) -> NemotronHConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return NemotronHConfig.from_pretrained(folder)


def test_fixtures_are_there():
    assert PUBLISHED.keys() == {"super", "nano", "lightning", "ultra"}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file(name, spelling, tmp_path):
    """Every field arrives with its value, the layer lists whatever their spelling."""
    fields = json.loads(PUBLISHED[name].read_text())
    config = read(tmp_path, respell(fields, spelling))
    layers = fields.get("hybrid_override_pattern") or "".join(LETTER[n] for n in fields["layers_block_type"])
    assert config.hybrid_override_pattern == layers
    assert config.layers_block_type == [LONG[letter] for letter in layers]
    assert config.dtype == torch.bfloat16
    for field, value in fields.items():
        if "block_type" not in field and field not in ("torch_dtype", "dtype"):
            assert getattr(config, field) == value, field
    assert config.mtp_hybrid_override_pattern == ("*E" if fields.get("num_nextn_predict_layers") else None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_time_step_limit_is_open(name, tmp_path):
    """Absent means (0, inf): `time_step_min` and the others are for initialisation."""
    fields = json.loads(PUBLISHED[name].read_text())
    assert "time_step_limit" not in fields
    assert read(tmp_path, fields).time_step_limit == [0.0, math.inf]


@pytest.mark.parametrize("spelled", ["[0.0, Infinity]", '[0, {"__float__": "Infinity"}]', "null"])
def test_time_step_limit_spellings(spelled, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "nemotron_h", "time_step_limit": {spelled}}}')
    assert NemotronHConfig.from_pretrained(tmp_path).time_step_limit == [0.0, math.inf]


def test_time_step_limit_is_kept():
    assert NemotronHConfig(time_step_limit=(0.01, 0.5)).time_step_limit == [0.01, 0.5]
    assert NemotronHConfig(mamba_dt_limit=(0.0, 2)).time_step_limit == [0.0, 2.0]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trip(name, spelling, tmp_path):
    """Saved and read again, nothing changes; no field of the published file is lost, known or unknown."""
    fields = respell(json.loads(PUBLISHED[name].read_text()), spelling)
    fields["a_field_of_the_future"] = {"list": [1, 2.5, None], "text": "é"}
    config = read(tmp_path / "in", fields)
    config.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    saved = json.loads(text)
    assert "NaN" not in text
    for field, value in fields.items():
        if field == "torch_dtype":
            assert saved["dtype"] == value
        elif "block_type" in field:
            assert saved[field] == [LONG[LETTER[layer]] for layer in value]
        else:
            assert saved[field] == value, field
    again = NemotronHConfig.from_pretrained(tmp_path / "out")
    assert again.to_dict() == config.to_dict()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == text
    assert NemotronHConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# Far from every default.
UNUSUAL = {
    "hybrid_override_pattern": "-*EM",
    "time_step_limit": [0.25, 7.0],
    "time_step_min": 0.003,
    "time_step_max": 0.7,
    "time_step_floor": 2e-4,
    "use_conv_bias": False,
    "conv_kernel": 3,
    "chunk_size": 17,
    "n_group": 2,
    "topk_group": 2,
    "norm_topk_prob": False,
    "mtp_num_depths": 3,
    "mtp_loss_scaling_factor": 0.11,
    "mtp_hybrid_override_pattern": "-E",
    "num_nextn_predict_layers": 2,
    "mamba_ssm_cache_dtype": "bfloat16",
    "residual_in_fp32": True,
    "rescale_prenorm_residual": False,
    "eos_token_id": [2, 11],
    "pad_token_id": None,
    "layer_norm_epsilon": 3e-6,
    "tie_word_embeddings": True,
    "moe_latent_size": 24,
    "intermediate_size": 33,
    "rope_theta": 12345.0,
}


def test_round_trip_of_unusual_values(tmp_path):
    config = NemotronHConfig(**UNUSUAL)
    config.save_pretrained(tmp_path)
    again = NemotronHConfig.from_pretrained(tmp_path)
    for field, value in UNUSUAL.items():
        assert getattr(again, field) == value, field
    assert again.to_dict() == config.to_dict()


@given(
    st.text("ME*-", min_size=1, max_size=20),
    st.tuples(st.floats(0, 1), st.floats(1, math.inf)),
    st.integers(1, 10**6),
    st.one_of(st.none(), st.integers(1, 4096)),
)
def test_json_keeps_every_number(pattern, limit, width, latent):
    config = NemotronHConfig(
        hybrid_override_pattern=pattern, time_step_limit=limit, moe_intermediate_size=width, moe_latent_size=latent
    )
    # `json.loads` alone does not undo transformers' spelling of infinity; its own reader must.
    text = config.to_json_string(use_diff=False)
    again = NemotronHConfig.from_dict(NemotronHConfig._decode_special_floats(json.loads(text)))
    assert again.time_step_limit == list(limit)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_we_save(name, tmp_path):
    """transformers' own class finds the same model in our file."""
    config = read(tmp_path / "in", json.loads(PUBLISHED[name].read_text()))
    config.save_pretrained(tmp_path / "out")
    theirs = UpstreamConfig.from_pretrained(tmp_path / "out")
    assert type(theirs) is UpstreamConfig
    for field in UpstreamConfig().to_dict():
        if field not in (
            "transformers_version",
            "mtp_layers_block_type",
            "architectures",
            "use_mamba_kernels",
            "dtype",
        ):
            assert getattr(theirs, field) == getattr(config, field), field
    if config.num_nextn_predict_layers:
        assert theirs.mtp_layers_block_type == config.mtp_layers_block_type


def test_we_read_what_transformers_saves(tmp_path):
    theirs = UpstreamConfig(layers_block_type=["linear_attention", "mlp"], n_groups=4, time_step_limit=(0.0, 5.0))
    theirs.save_pretrained(tmp_path)
    ours = NemotronHConfig.from_pretrained(tmp_path)
    assert (ours.hybrid_override_pattern, ours.n_groups, ours.time_step_limit) == ("M-", 4, [0.0, 5.0])
    assert type(AutoConfig.from_pretrained(tmp_path)) is NemotronHConfig


def test_legacy_names():
    config = NemotronHConfig(
        mamba_n_groups=4, mamba_d_conv=3, mamba_expand=3, mamba_dt_min=0.01, mamba_dt_max=0.2, mamba_conv_bias=False,
        mamba_dt_init_floor=0.02, mamba_chunk_size=64,
    )  # fmt: skip
    assert (config.n_groups, config.conv_kernel, config.expand, config.chunk_size) == (4, 3, 3, 64)
    assert (config.time_step_min, config.time_step_max, config.time_step_floor) == (0.01, 0.2, 0.02)
    assert config.use_conv_bias is False and "mamba_d_conv" not in config.to_dict()


def test_key_value_heads_default_to_query_heads():
    assert NemotronHConfig(num_key_value_heads=None, num_attention_heads=6).num_key_value_heads == 6


def test_null_and_empty_spellings_count_as_absent():
    config = NemotronHConfig(
        layers_block_type=None, hybrid_override_pattern="ME", mtp_hybrid_override_pattern="", num_hidden_layers=None
    )
    assert config.hybrid_override_pattern == "ME" and config.mtp_layers_block_type is None


# What is wrong, and what the message must say: the field, and what to do.
REFUSED = [
    ({"hybrid_override_pattern": "MXE"}, ["`hybrid_override_pattern`", "'X'", "position 1", "E (mixture of experts)"]),
    ({"layers_block_type": ["mamba", "ssm"]}, ["`layers_block_type`", "'ssm'", "full_attention"]),
    ({"hybrid_override_pattern": ""}, ["`hybrid_override_pattern`", "empty"]),
    ({"layers_block_type": []}, ["`layers_block_type`", "empty"]),
    (
        {"hybrid_override_pattern": "ME", "layers_block_type": ["mamba", "mlp"]},
        ["`hybrid_override_pattern` ('ME')", "`layers_block_type` ('M-'", "make them equal"],
    ),
    (
        {"hybrid_override_pattern": "ME", "num_hidden_layers": 3},
        ["`num_hidden_layers` is 3", "2 layers", "leave `num_hidden_layers` out"],
    ),
    (
        {"mtp_hybrid_override_pattern": "*E", "mtp_layers_block_type": ["moe"], "num_nextn_predict_layers": 1},
        ["`mtp_hybrid_override_pattern`", "`mtp_layers_block_type`", "make them equal"],
    ),
    ({"mtp_hybrid_override_pattern": "*Q"}, ["`mtp_hybrid_override_pattern`", "'Q'"]),
    ({"num_nextn_predict_layers": 1}, ["`num_nextn_predict_layers` is 1", "`mtp_layers_block_type`", "'*E'"]),
    ({"num_nextn_predict_layers": -1}, ["`num_nextn_predict_layers` is -1", "use 0"]),
    (
        {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "M*"},
        ["`mtp_layers_block_type`", "Mamba-2", "attention, moe and mlp"],
    ),
    ({"mtp_num_depths": 0}, ["`mtp_num_depths` is 0", "above 0"]),
    ({"n_groups": 3}, ["`mamba_num_heads` (128)", "`n_groups` (3)", "divisible"]),
    ({"num_key_value_heads": 5}, ["`num_attention_heads` (32)", "`num_key_value_heads` (5)", "divisible"]),
    ({"num_experts_per_tok": 9}, ["`num_experts_per_tok` (9)", "`n_routed_experts` (8)", "lower"]),
    ({"n_group": 3}, ["`n_group` (3)", "`n_routed_experts` (8)"]),
    ({"n_group": 2, "topk_group": 3}, ["`topk_group` (3)", "`n_group`"]),
    ({"n_group": 4, "num_experts_per_tok": 3}, ["`num_experts_per_tok` (3)", "`topk_group`"]),
    ({"n_shared_experts": 2}, ["`n_shared_experts` is 2", "`moe_shared_expert_intermediate_size`"]),
    ({"moe_latent_size": 0}, ["`moe_latent_size` is 0", "None"]),
    ({"conv_kernel": 1}, ["`conv_kernel` is 1", "at least 2"]),
    ({"time_step_limit": (0.5, 0.1)}, ["`time_step_limit`", "low <= high"]),
    ({"time_step_limit": (0.0, math.nan)}, ["`time_step_limit`", "low <= high"]),
    ({"time_step_limit": (0.5,)}, ["`time_step_limit`", "(low, high)"]),
    ({"time_step_min": 0.0}, ["`time_step_min` (0.0)", "0 < time_step_min"]),
    ({"time_step_min": 0.2}, ["`time_step_max` (0.1)", "time_step_min <= time_step_max"]),
    ({"mamba_hidden_act": "gelu"}, ["`mamba_hidden_act`", "'silu'"]),
    ({"mamba_ssm_cache_dtype": "int8"}, ["`mamba_ssm_cache_dtype`", "'float32'"]),
    ({"sliding_window": 4096}, ["`sliding_window` is 4096", "None"]),
    *(
        ({field: value}, [f"`{field}` is {value!r}", "whole number above 0"])
        for field in (
            "vocab_size",
            "hidden_size",
            "chunk_size",
            "n_routed_experts",
            "moe_intermediate_size",
            "head_dim",
        )
        for value in (0, -4, True)
    ),
    ({"hidden_size": 64.0}, ["`hidden_size` is 64.0", "whole number"]),
    ({"hidden_size": "64"}, ["`hidden_size` is '64'", "whole number"]),
]


@pytest.mark.parametrize("fields, said", REFUSED, ids=lambda value: str(value)[:60] if isinstance(value, dict) else "")
def test_refused(fields, said, tmp_path):
    with pytest.raises(ValueError) as caught:
        NemotronHConfig(**fields)
    for part in said:
        assert part in str(caught.value), str(caught.value)
    # From a file just the same.
    with pytest.raises(ValueError) as caught:
        read(tmp_path, {"model_type": "nemotron_h", **fields})
    assert said[0].split("`")[1] in str(caught.value)


def test_a_broken_configuration_is_not_saved(tmp_path):
    config = preset("tiny")
    with pytest.raises(ValueError, match="`num_hidden_layers` is 3"):
        config.num_hidden_layers = 3
    config.n_groups = 3
    with pytest.raises(StrictDataclassClassValidationError, match="`mamba_num_heads`"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
