"""transformers' Auto classes resolve to ours; importing the package is quick and needs no network."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import nemotron_super
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

HEADS = {
    AutoModel: nemotron_super.NemotronHModel,
    AutoModelForCausalLM: nemotron_super.NemotronHForCausalLM,
    AutoModelForSequenceClassification: nemotron_super.NemotronHForSequenceClassification,
    AutoModelForTokenClassification: nemotron_super.NemotronHForTokenClassification,
}


def run_python(code: str, *arguments: str) -> dict:
    """Run `code` in a fresh interpreter and return the JSON object it prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved causal language model."""
    path = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = nemotron_super.preset(
        "tiny",
        vocab_size=272,
        hidden_size=32,
        hybrid_override_pattern="ME*-",
        n_routed_experts=8,
        initializer_range=0.2,
    )
    nemotron_super.NemotronHForCausalLM(config).save_pretrained(path)
    return path


def test_auto_config(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is nemotron_super.NemotronHConfig
    assert config.hybrid_override_pattern == "ME*-"
    assert type(AutoConfig.for_model("nemotron_h")) is nemotron_super.NemotronHConfig


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_auto_model_from_folder(folder, auto):
    """Each Auto class gives our class, with the backbone that was saved and nothing in the checkpoint left over."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert type(model) is HEADS[auto]
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {key.split(".")[0] for key in info["missing_keys"]} <= {"score"}
    saved = nemotron_super.NemotronHForCausalLM.from_pretrained(folder).model.state_dict()
    loaded = getattr(model, "model", model).state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_auto_model_from_config(tiny_config, auto):
    assert type(auto.from_config(tiny_config())) is HEADS[auto]


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classification_head(folder, auto, ids, tmp_path):
    """Heads give one score a class, send gradients to every weight, and come back from disk as they were."""
    model = auto.from_pretrained(folder, num_labels=3).train()
    per_token = auto is AutoModelForTokenClassification
    labels = ids % 3 if per_token else ids[:, 0] % 3
    output = model(ids, labels=labels)
    assert output.logits.shape == ((*ids.shape, 3) if per_token else (2, 3))
    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]

    model.eval().save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is HEADS[auto] and again.config.num_labels == 3
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classifier_ignores_padding(folder, ids, side):
    """The score of a row is that of its last token, whichever side its padding is on."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    padding = torch.zeros_like(ids[:, :4])
    parts = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat(parts, dim=1)
    with torch.no_grad():
        expected = model(ids).logits
        found = model(padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


AFTER_UPSTREAM = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers import NemotronHConfig, NemotronHForCausalLM, NemotronHModel
before = type(AutoConfig.for_model("nemotron_h"))
assert before is NemotronHConfig, before
AutoModelForCausalLM.from_config(NemotronHConfig(
    vocab_size=32, hidden_size=32, layers_block_type=["mlp"], intermediate_size=8, num_attention_heads=2, head_dim=8))
import nemotron_super
found = {"AutoConfig": type(AutoConfig.from_pretrained(sys.argv[1])).__module__}
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
    found[auto.__name__] = type(auto.from_pretrained(sys.argv[1])).__module__
print(json.dumps(found))
"""


def test_registers_over_upstream(folder):
    """Ours is what the Auto classes give, even where transformers' own classes were imported and used before."""
    found = run_python(AFTER_UPSTREAM, str(folder))
    assert len(found) == 5
    assert all(module.startswith("nemotron_super.") for module in found.values()), found


# What the package's own modules import from elsewhere is imported first; the rest is the package's own time. Processor
# time, because another process may be busy.
IMPORT_TIME = """
import ast, importlib.util, json, pathlib, time
root = pathlib.Path(importlib.util.find_spec("nemotron_super").origin).parent
rooms = ("configuration", "kernels_hub", "modeling", "conversion")
sources = [root / "__init__.py", *(f for room in rooms for f in (root / room).rglob("*.py"))]
names = set()
for node in (node for source in sources for node in ast.parse(source.read_text()).body):
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("transformers"):
        names |= {(node.module, alias.name) for alias in node.names}
assert len(names) > 10, names
import torch
for module, name in sorted(names):
    exec(f"from {module} import {name}")
start = time.process_time()
import nemotron_super
print(json.dumps({"seconds": time.process_time() - start}))
"""


def test_import_time():
    """`import nemotron_super` adds under half a second to the transformers imports that it needs."""
    seconds = [run_python(IMPORT_TIME)["seconds"] for _ in range(3)]
    assert statistics.median(seconds) < 0.5, seconds


NO_NETWORK = """
import json, socket, sys
touched = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        touched.append(event)
        raise OSError("the network is closed")
sys.addaudithook(watch)
import nemotron_super
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
quiet = list(touched)
try:
    socket.create_connection(("localhost", 9), timeout=1)
except OSError:
    pass
print(json.dumps({"touched": quiet, "watching": len(touched) > len(quiet)}))
"""


def test_no_network(folder):
    """Importing, loading a folder and generating open no connection and look up no host."""
    found = run_python(NO_NETWORK, str(folder))
    assert found["watching"]  # the hook does see connections
    assert found["touched"] == []
