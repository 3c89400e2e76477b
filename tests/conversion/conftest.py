"""A small checkpoint in the published layout, with values that no initialisation would give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


@pytest.fixture(scope="session")
def published(make_model, tmp_path_factory) -> Path:
    """A BF16 checkpoint with every layer type and MTP: a folder in the published layout. Do not write to it."""
    folder = tmp_path_factory.mktemp("published")
    make_model("ME*-ME", seed=3, **MTP).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def rewrite(published, tmp_path):
    """`rewrite(change=None, files=1, **config_fields)`: a changed copy of `published`, as a folder.

    `change(tensors)` edits the dictionary of tensors in place; `files` spreads them over so many shards.
    """

    def copy(change=None, files: int = 1, **fields) -> Path:
        folder = tmp_path / "rewritten"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config = json.loads((published / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        tensors = load_file(published / "model.safetensors")
        if change is not None:
            change(tensors)
        if files == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for i in range(files):
            file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
            part = {name: tensors[name] for name in sorted(tensors)[i::files]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return copy


@pytest.fixture(scope="session")
def same_tensors():
    """`same_tensors(a, b)`: assert that two dictionaries of tensors are equal bit for bit, names and dtypes included."""

    def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        assert found.keys() == expected.keys()
        different = [n for n in expected if found[n].dtype != expected[n].dtype or not found[n].equal(expected[n])]
        assert not different

    return check


@pytest.fixture(scope="session")
def by_published_name():
    """`by_published_name(model)`: the model's tensors as a published file names them, independently of the package."""

    def spell(model) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, tensor in model.state_dict().items():
            name = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
            if name.endswith((".experts.up_proj", ".experts.down_proj")):
                stack, projection = name.rsplit(".", 1)
                tensors.update({f"{stack}.{e}.{projection}.weight": expert for e, expert in enumerate(tensor)})
            else:
                tensors[name] = tensor
        return tensors

    return spell
