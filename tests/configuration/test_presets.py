"""Presets are the published files, field by field, and the published layer counts."""

import json
from pathlib import Path

import pytest
from nemotron_super import PRESETS, NemotronHConfig, preset

PUBLISHED = Path(__file__).parent / "published"
# Mamba-2, mixture of experts, attention layers, as the model cards count them.
COUNTS = {"super": (40, 40, 8), "nano": (23, 23, 6), "lightning": (23, 23, 6), "ultra": (48, 48, 12)}
NOT_IN_PRESETS = {"architectures", "auto_map", "dtype", "norm_eps", "partial_rotary_factor", "rope_theta"}


@pytest.mark.parametrize("name", COUNTS)
def test_layer_counts(name):
    pattern = preset(name).hybrid_override_pattern
    assert (pattern.count("M"), pattern.count("E"), pattern.count("*")) == COUNTS[name]
    assert len(pattern) == sum(COUNTS[name])


def test_where_super_attends():
    layers = preset("super").layers_block_type
    assert [i for i, layer in enumerate(layers) if layer == "full_attention"] == [7, 16, 25, 36, 47, 58, 69, 78]


@pytest.mark.parametrize("name", COUNTS)
def test_preset_is_the_published_file(name):
    published = NemotronHConfig.from_pretrained(PUBLISHED / f"{name}.json").to_dict()
    ours = preset(name).to_dict()
    assert published.keys() - ours.keys() <= NOT_IN_PRESETS | {"use_mamba_kernels"}
    different = {field: (ours[field], published[field]) for field in ours.keys() & published.keys()
                 if ours[field] != published[field] and field not in NOT_IN_PRESETS | {"transformers_version"}}  # fmt: skip
    assert not different


def test_published_fixtures_hold_what_the_facts_say():
    """The numbers that a typo in both preset and fixture would hide: products that must come out."""
    for name in COUNTS:
        fields = json.loads((PUBLISHED / f"{name}.json").read_text())
        assert fields["num_hidden_layers"] == sum(COUNTS[name])
        assert fields["mamba_num_heads"] * fields["mamba_head_dim"] in (4096, 8192, 16384)
        assert fields["moe_shared_expert_intermediate_size"] == 2 * fields["moe_intermediate_size"]
        assert fields["vocab_size"] == 131072 and fields["num_key_value_heads"] == 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_do_not_share_state(name):
    before = json.dumps(PRESETS[name])
    config = preset(name)
    config.layers_block_type.append("mlp")
    config.time_step_limit[0] = 3.0
    assert json.dumps(PRESETS[name]) == before
    assert preset(name).num_hidden_layers == config.num_hidden_layers - 1 and preset(name).time_step_limit[0] == 0.0


def test_overrides():
    config = preset("super", hybrid_override_pattern="ME", num_experts_per_tok=4)
    assert (config.hybrid_override_pattern, config.num_experts_per_tok, config.hidden_size) == ("ME", 4, 4096)
    with pytest.raises(ValueError, match="`num_experts_per_tok`"):
        preset("nano", num_experts_per_tok=200)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"'mega'.*super, nano, lightning, ultra, tiny"):
        preset("mega")
