"""The model in the repository: whole, small enough, trained, and what its card says."""

import hashlib
import json
import re
from pathlib import Path

import nemotron_super
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

FOLDER = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"
CARD = (FOLDER / "README.md").read_text()
EVALUATION = json.loads((FOLDER / "evaluation.json").read_text())

# Written for this test, so in no corpus.
TEXT = '''
def total_weight(parcels, limit=20):
    """Return the summed weight of the parcels, or raise ValueError if it is above the limit."""
    total = 0
    for parcel in parcels:
        total += parcel.weight
    if total > limit:
        raise ValueError("the parcels are too heavy")
    return total
'''


def said(pattern):
    """The numbers that a line of the card gives."""
    found = re.search(pattern, CARD)
    assert found, pattern
    return [text.replace(",", "") for text in found.groups()]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([[1, *AutoTokenizer.from_pretrained(FOLDER)(TEXT).input_ids]])


def test_what_it_is():
    config = AutoConfig.from_pretrained(FOLDER)
    assert set(config.layers_block_type) == {"linear_attention", "full_attention", "moe", "mlp"}
    assert config.n_routed_experts >= 32 and config.moe_latent_size and config.mtp_num_depths == 2
    assert 8192 <= config.vocab_size <= 16384 and len(AutoTokenizer.from_pretrained(FOLDER)) == config.vocab_size
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 40e6
    with safe_open(weights, "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert all(kind == ("F32" if name.endswith("correction_bias") else "BF16") for name, kind in kinds.items())


def test_it_is_trained(model, ids):
    """Far better than chance at the next token and at both MTP depths, on text it has not seen."""
    with torch.no_grad():
        out = model(ids, labels=ids, output_mtp_logits=True)
    assert out.lm_loss < 5.0, "an untrained model is at ln 8192 = 9.0"
    for k, logits in enumerate((out.logits, *out.mtp_logits)):
        targets = ids[0, k + 1 :]
        accuracy = (logits[0, : len(targets)].argmax(-1) == targets).float().mean()
        assert accuracy > 0.2, f"{k + 1} ahead"


def test_its_experts_are_all_used():
    assert not any(EVALUATION["dead_experts"].values()) and max(EVALUATION["maximum_violation"].values()) < 1.2


def test_it_writes_text():
    write = pipeline("text-generation", model=str(FOLDER), dtype=torch.float32)
    (found,) = write("import os\nimport sys\n\ndef main(", max_new_tokens=24, do_sample=False)
    assert "def " in found["generated_text"] and found["generated_text"].isprintable() is False


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_the_card_names_these_files(name):
    size, digest = said(rf"\| `{name}` \| ([\d,]+) \| `(\w+)` \|")
    content = (FOLDER / name).read_bytes()
    assert len(content) == int(size) and hashlib.sha256(content).hexdigest() == digest


def test_the_card_tells_the_evaluation():
    bits, nats = said(r"\| held-out loss \| ([\d.]+) bits per byte \(([\d.]+) nats per token\) \|")
    assert float(bits) == round(EVALUATION["bits_per_byte"], 3) and float(nats) == round(EVALUATION["loss"], 3)
    names = {"next token": EVALUATION["accuracy"]}
    names |= {f"MTP depth {k + 1}": accuracy for k, accuracy in enumerate(EVALUATION["mtp_accuracy"])}
    for name, accuracy in names.items():
        assert float(said(rf"\| accuracy, {name} \| ([\d.]+) \|")[0]) == round(accuracy, 3)
    tokens, epochs = said(r"\| tokens seen \| ([\d,]+) \(([\d.]+) epochs\) \|")
    assert int(tokens) == EVALUATION["tokens_seen"] and float(epochs) == round(EVALUATION["epochs"], 2)


def test_the_card_fixes_the_data():
    manifest = json.loads((FOLDER.parents[1] / "training" / "recipes" / "nemotron_h_tiny_corpus.json").read_text())
    for split in ("train", "heldout"):
        row = manifest[split]
        assert f"| {row['files']:,} | {row['bytes']:,} | `{row['sha256']}` |" in CARD
