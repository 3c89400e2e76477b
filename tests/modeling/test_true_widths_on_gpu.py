"""Some layers of Super at its true widths on a GPU: logits no further from float32 than torch's own in bfloat16."""

import pytest
import torch
from nemotron_super import NemotronHForCausalLM, preset
from nemotron_super.kernels_hub.registry import use_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the compiled kernels are compared"),
]
TOKENS, DECODED = 700, 4


@torch.no_grad()
def logits_of(model, ids, source):
    """(tokens, vocab) float32: of a prompt, and of single tokens and a few behind it, as drafts are read."""
    with use_kernels(source):
        out = model(ids[:, :TOKENS], use_cache=True)
        parts, cache = [out.logits], out.cache
        for part in ids[:, TOKENS:].split([1] * DECODED + [3, 3], dim=1):
            parts.append(model(part, cache=cache).logits)
    return torch.cat(parts, 1)[0].float()


def test_logits():
    torch.manual_seed(0)
    config = preset(
        "super", hybrid_override_pattern="MEM*E", vocab_size=4096, num_nextn_predict_layers=0, pad_token_id=0
    )
    with torch.device("cuda"):
        model = NemotronHForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 4096, (1, TOKENS + DECODED + 6), device="cuda")
    kernels, reference = (logits_of(model, ids, source) for source in ("auto", "torch"))
    exact = logits_of(model.float(), ids, "torch")
    # By position: a router's near tie changes few of them much, in either computation.
    ours, theirs = ((found - exact).norm(dim=1) / exact.norm(dim=1) for found in (kernels, reference))
    print(
        "relative error by position, median and mean:", *(f"{e.median():.4f} {e.mean():.4f}" for e in (ours, theirs))
    )
    assert theirs.median() < 0.1, "bfloat16 itself is close to float32"
    assert ours[:TOKENS].median() < 1.2 * theirs[:TOKENS].median()
    assert ours[:TOKENS].mean() < 1.5 * theirs[:TOKENS].mean()
    assert ours[TOKENS:].mean() < 2 * theirs[TOKENS:].mean()
