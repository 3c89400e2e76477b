"""The three published spellings of a layer list, and the one canonical list behind them.

===========================  =====================================================  ==========================
spelling                     example                                                found in
===========================  =====================================================  ==========================
pattern string               ``"ME*-"``                                             Super, Nano, Ultra
short names                  ``["mamba", "moe", "attention", "mlp"]``               3.5 Lightning
transformers' names          ``["linear_attention", "moe", "full_attention", "mlp"]``  transformers >= 5
===========================  =====================================================  ==========================

The canonical list uses transformers' names, because its caches and masks are chosen by them.
"""

from __future__ import annotations

from collections.abc import Sequence

LETTER_TO_LAYER = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
LAYER_TO_LETTER = {layer: letter for letter, layer in LETTER_TO_LAYER.items()}
SHORT_TO_LAYER = {"mamba": "linear_attention", "attention": "full_attention"}


def parse_layers(spelling: str | Sequence[str], field: str) -> list[str]:
    """Return the canonical list for any of the three spellings.

    Args:
        spelling: a pattern string such as ``"MEM*E"``, or a sequence of layer names.
        field: the configuration field the spelling came from, named in errors.

    Raises:
        ValueError: an unknown letter or name, an empty list, or something that is neither text nor a sequence of text.
    """
    if isinstance(spelling, str):
        names = [LETTER_TO_LAYER.get(letter, letter) for letter in spelling]
        allowed = "M (Mamba-2), E (mixture of experts), * (attention), - (MLP)"
    elif isinstance(spelling, Sequence) and all(isinstance(name, str) for name in spelling):
        names = [SHORT_TO_LAYER.get(name, name) for name in spelling]
        allowed = ", ".join([*LAYER_TO_LETTER, *SHORT_TO_LAYER])
    else:
        raise ValueError(f"`{field}` must be a pattern string or a list of layer names, got {spelling!r}.")
    for position, name in enumerate(names):
        if name not in LAYER_TO_LETTER:
            raise ValueError(f"`{field}` has an unknown layer {name!r} at position {position}. Use one of: {allowed}.")
    if not names:
        raise ValueError(f"`{field}` is empty: name at least one layer, for example 'ME*E'.")
    return names


def to_pattern(layers: Sequence[str]) -> str:
    """Return the pattern string of a canonical list: ``["linear_attention", "moe"]`` gives ``"ME"``."""
    return "".join(LAYER_TO_LETTER[layer] for layer in layers)
