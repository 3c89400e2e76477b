"""Checkpoints that transformers saved and ModelOpt quantised: their BF16 halves give the recorded logits."""

from pathlib import Path

import pytest
import torch
from nemotron_super import NemotronHForCausalLM
from safetensors.torch import load_file

# Kept beside the repository, not in it.
ORACLES = Path(__file__).parents[3] / "shared" / "oracles" / "modelopt"


@pytest.mark.parametrize("name", ["nvfp4", "mixed", "fp8"])
def test_logits(name, relative):
    folder = ORACLES / name
    if not (folder / "bf16").is_dir():
        pytest.skip(f"the oracle checkpoints are not here: {folder} does not exist")
    reference = load_file(folder / "reference.safetensors")
    model, info = NemotronHForCausalLM.from_pretrained(folder / "bf16", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    assert relative(logits, reference["logits_bf16_weights"]) < 1e-5
    # Within reach of the tolerance only if the weights matter.
    assert reference["logits_bf16_weights"].std() > 1e-3
