"""How far decoding drifts when the SSM state is stored in 16 bits, rounded to nearest or stochastically.

    python tests/benchmarks/ssm_state_dtype.py --tokens 4096 --save

`nemotron-h-tiny` in float32 reads source text of the standard library token by token, once with a float32 state and once for each
way of storing it coarser; all else is the same. The drift of a position is the Kullback-Leibler divergence of its next-token
distribution from that with the float32 state, in nats. Prefill against decoding, both in float32, is the noise floor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sysconfig
from pathlib import Path
from unittest import mock

import nemotron_super
import torch
import transformers
from nemotron_super import HybridCache, NemotronHForCausalLM
from nemotron_super.kernels_hub.reference import selective_state_update
from nemotron_super.kernels_hub.reference.stochastic_round import stochastic_round
from nemotron_super.modeling import mamba2
from torch import Tensor
from transformers import AutoTokenizer

TINY = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"
RESULTS = Path(__file__).parent / "results" / "ssm_state_dtype.json"
WAYS = [(dtype, how) for dtype in ("bfloat16", "float16") for how in ("nearest", "stochastic")]


def source_text(tokenizer, rows: int, length: int) -> Tensor:
    """(rows, length) token ids from the standard library's largest modules, one a row."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda f: (-f.stat().st_size, f.name))
    texts = (tokenizer(f.read_text(encoding="utf-8")).input_ids for f in files)
    return torch.tensor([ids[:length] for ids in texts if len(ids) >= length][:rows])


@torch.no_grad()
def measure(tokens: int, rows: int, seed: int) -> list[dict]:
    """Drift, next-token loss and agreement of each way of storing the state, by quarter of the text."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = source_text(tokenizer, rows, tokens)
    model = NemotronHForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    mixers = [m for m in model.modules() if isinstance(m, mamba2.NemotronHMamba2Mixer)]
    caches = {way: HybridCache(model.config) for way in [None, *WAYS]}
    prefilled = model(ids, use_cache=False).logits.log_softmax(-1)
    sums = {way: torch.zeros(4, 3, dtype=torch.float64) for way in ["prefill", *caches]}
    torch.manual_seed(seed)

    def step(way: tuple[str, str] | None, position: int) -> Tensor:
        dtype = torch.float32 if way is None else getattr(torch, way[0])
        rounds = stochastic_round if way is not None and way[1] == "stochastic" else lambda x, dtype: x.to(dtype)
        for mixer in mixers:
            mixer.cache_dtype = dtype
        with (
            mock.patch.object(selective_state_update, "store_as", rounds),
            mock.patch.object(mamba2, "store_as", rounds),
        ):
            return model(ids[:, position, None], cache=caches[way], use_cache=True).logits[:, 0].log_softmax(-1)

    for position in range(tokens - 1):
        quarter, following = position * 4 // (tokens - 1), ids[:, position + 1, None]
        exact = step(None, position)
        found = {"prefill": prefilled[:, position], None: exact} | {way: step(way, position) for way in WAYS}
        for way, logits in found.items():
            drift = (exact.exp() * (exact - logits)).sum(-1).double().clamp(min=0).mean()
            loss = -logits.gather(1, following).double().mean()
            agrees = (logits.argmax(-1) == exact.argmax(-1)).double().mean()
            sums[way][quarter] += torch.stack([drift, loss, agrees])
        if position % 512 == 511:
            print(position + 1, {str(w): f"{s[quarter, 0].item():.3g}" for w, s in sums.items()}, flush=True)
    counts = torch.bincount(torch.arange(tokens - 1) * 4 // (tokens - 1)).unsqueeze(1)
    results = []
    for way, total in sums.items():
        state, how = way if isinstance(way, tuple) else ("float32", "whole text at once" if way else "")
        drift, loss, agrees = (total / counts).T.tolist()
        results.append({"state": state, "rounding": how, "drift": drift, "loss": loss, "same_top_token": agrees})
    return results


def main() -> None:
    """Measure, print a table, and with `--save` write it to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows = measure(options.tokens, options.rows, options.seed)
    print(
        f"| {'state':8} | {'rounding':18} | drift in the four quarters (nats) {'':13} | loss, last | same top token, last |"
    )
    for row in rows:
        drift = " ".join(f"{value:11.3e}" for value in row["drift"])
        print(
            f"| {row['state']:8} | {row['rounding']:18} | {drift} | {row['loss'][3]:10.4f} | {row['same_top_token'][3]:20.4f} |"
        )
    if options.save:
        run = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokens": options.tokens,
            "rows_of_text": options.rows,
            "seed": options.seed,
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
