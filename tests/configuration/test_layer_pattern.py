"""The three spellings of a layer list name the same list, and what is none of them is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nemotron_super import NemotronHConfig
from nemotron_super.configuration.layer_pattern import parse_layers, to_pattern

# Written out here, not taken from the module.
SHORT = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
LONG = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
patterns = st.text("ME*-", min_size=1, max_size=120)


@given(patterns)
def test_spellings_agree(pattern):
    canonical = [LONG[letter] for letter in pattern]
    assert parse_layers(pattern, "field") == canonical
    assert parse_layers([SHORT[letter] for letter in pattern], "field") == canonical
    assert parse_layers(canonical, "field") == canonical
    assert parse_layers(tuple(canonical), "field") == canonical
    assert to_pattern(canonical) == pattern


@given(st.lists(st.sampled_from([*SHORT.values(), *LONG.values()]), min_size=1, max_size=60))
def test_mixed_names(names):
    """A list may mix short and long names; parsing twice changes nothing."""
    canonical = parse_layers(names, "field")
    assert len(canonical) == len(names) and set(canonical) <= set(LONG.values())
    assert parse_layers(canonical, "field") == canonical
    assert parse_layers(to_pattern(canonical), "field") == canonical


@given(patterns, st.characters(exclude_characters="ME*-"), st.data())
def test_unknown_letter_is_named(pattern, letter, data):
    at = data.draw(st.integers(0, len(pattern)))
    with pytest.raises(ValueError) as caught:
        parse_layers(pattern[:at] + letter + pattern[at:], "hybrid_override_pattern")
    message = str(caught.value)
    assert repr(letter) in message and f"position {at}" in message and "`hybrid_override_pattern`" in message
    assert "M (Mamba-2)" in message


@pytest.mark.parametrize(
    "spelling, said",
    [
        (["mamba", "mixture"], "unknown layer 'mixture' at position 1"),
        (["M"], "unknown layer 'M'"),
        ("", "is empty"),
        ([], "is empty"),
        (["mamba", 3], "must be a pattern string or a list of layer names"),
        (7, "must be a pattern string or a list of layer names"),
        (b"ME", "must be a pattern string or a list of layer names"),
    ],
)
def test_what_is_no_spelling(spelling, said):
    with pytest.raises(ValueError, match="`the_field`") as caught:
        parse_layers(spelling, "the_field")
    assert said in str(caught.value)


@given(patterns, st.text("E*-", min_size=1, max_size=4))
def test_configuration_in_every_spelling(pattern, mtp):
    made = [
        NemotronHConfig(
            num_nextn_predict_layers=1,
            **{layers: spell(pattern), mtp_layers: spell(mtp)},
            **{"num_hidden_layers": len(pattern)} if count else {},
        )
        for count, layers, mtp_layers, spell in (
            (False, "hybrid_override_pattern", "mtp_hybrid_override_pattern", str),
            (True, "hybrid_override_pattern", "mtp_hybrid_override_pattern", str),
            (True, "layers_block_type", "mtp_layers_block_type", lambda p: [SHORT[letter] for letter in p]),
            (False, "layers_block_type", "mtp_layers_block_type", lambda p: [LONG[letter] for letter in p]),
            (False, "layers_block_type", "mtp_layers_block_type", str),
        )
    ]
    for config in made:
        assert config.layers_block_type == config.layer_types == [LONG[letter] for letter in pattern]
        assert config.mtp_layers_block_type == [LONG[letter] for letter in mtp]
        assert config.hybrid_override_pattern == pattern and config.mtp_hybrid_override_pattern == mtp
        assert config.num_hidden_layers == len(pattern)
        assert config.to_dict() == made[0].to_dict()
