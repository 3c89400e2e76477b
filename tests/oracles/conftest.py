"""Checkpoints that ModelOpt quantised: a small one in this folder, larger ones beside the repository."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "modelopt"
BESIDE = Path(__file__).parents[3] / "shared" / "oracles" / "modelopt"


@pytest.fixture(scope="session")
def find_oracle(tmp_path_factory):
    """`find_oracle(name)`: a folder with `bf16/`, `export/` and `reference.safetensors`. Do not write to it."""
    whole = {}

    def find(name: str) -> Path:
        if not (HERE / name).is_dir():
            if not (BESIDE / name).is_dir():
                pytest.skip(f"the oracle checkpoint is not here: {BESIDE / name} does not exist")
            return BESIDE / name
        if name not in whole:
            whole[name] = tmp_path_factory.mktemp("oracle") / name
            shutil.copytree(HERE / name, whole[name])
            complete(whole[name])
        return whole[name]

    return find


def complete(folder: Path) -> None:
    """Put the BF16 checkpoint together: what was quantised lies here, and the rest is the export's."""
    tensors = load_file(folder / "export" / "model.safetensors")
    packed = load_file(folder / "bf16_of_what_is_packed.safetensors")
    scales = ("_scale", "_scale_2")
    (folder / "bf16").mkdir()
    save_file(
        {n: t for n, t in tensors.items() if not n.endswith(scales)} | packed,
        folder / "bf16" / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "export" / "config.json").read_text())
    del config["quantization_config"]
    (folder / "bf16" / "config.json").write_text(json.dumps(config))
