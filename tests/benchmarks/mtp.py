"""What the MTP head of `nemotron-h-tiny` saves: acceptance by depth on held-out text, and time beside plain decoding.

    python -m nemotron_super.training.recipes.nemotron_h_tiny --output out --prepare-only
    python tests/benchmarks/mtp.py --data out/data --save

Prompts are beginnings of held-out documents; every depth and plain decoding take turns on the same prompt in one run, so
that a change of the machine's speed meets all of them. On a GPU both decode from a cache of fixed size, by recorded steps, which
calls before the first that is timed have recorded.

"speed-up" is that of the whole call of `generate`. "in the loop" compares tokens a second from the end of the first step on: without
the prompt, and without what is made ready once a call.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import nemotron_super
import numpy as np
import torch
import transformers
from against_transformers import hardware, results_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

TINY = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"
DEPTHS = (0, 1, 2, 3, 4, 5)


class Clock(BaseStreamer):
    """Notes when the first step behind the prompt is over, and how many tokens come after it; receives the statistics of drafts."""

    def __init__(self) -> None:
        self.parts, self.tokens, self.first, self.last = 0, 0, 0.0, 0.0

    def put(self, value) -> None:
        self.parts += 1
        if self.parts == 3:  # the prompt, the token behind it, and the tokens of the first step
            self.first = time.perf_counter()
        elif self.parts > 3:
            self.tokens += value.numel()

    def end(self) -> None:
        self.last = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with heldout.npy, as the tiny recipe prepares it"
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--save", action="store_true", help="add the run to results/")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype).to(device).eval()
    stream = np.load(options.data / "heldout.npy").astype(np.int64)
    starts = [s for s in np.flatnonzero(stream == 1) if (stream[s + 1 : s + options.prompt_length] > 2).all()]
    prompts = [torch.tensor(stream[None, s : s + options.prompt_length]) for s in starts[: options.prompts]]

    rows: dict[str, dict] = {}
    for sample in (False, True):
        seconds, loop, in_loop = (dict.fromkeys(DEPTHS, 0.0) for _ in range(3))
        steps, tokens = dict.fromkeys(DEPTHS, 0), dict.fromkeys(DEPTHS, 0)
        drafted, accepted = ({depth: np.zeros(7) for depth in DEPTHS} for _ in range(2))
        for number, prompt in enumerate(tqdm(prompts, desc="sampled" if sample else "greedy")):
            prompt = prompt.to(device)
            for depth in DEPTHS:
                fixed = {"eos_token_id": None, "pad_token_id": 0}
                if device == "cuda":
                    fixed |= {"cache_implementation": "static"}
                drafts = {"use_mtp": True, "num_assistant_tokens": depth} if depth else {}
                fixed |= {"do_sample": sample, "max_new_tokens": options.new_tokens, **drafts}
                for _ in range(3 if device == "cuda" and number == 0 else 1):
                    # A cache that is returned could not be used again, nor could what was recorded with it.
                    torch.manual_seed(number)
                    clock, start = Clock(), time.perf_counter()
                    model.generate(prompt, streamer=clock, **fixed)
                seconds[depth] += clock.last - start
                loop[depth] += clock.last - clock.first
                in_loop[depth] += clock.tokens
                if depth:
                    statistics = clock.mtp_statistics
                    steps[depth] += statistics.steps
                    tokens[depth] += statistics.tokens
                    drafted[depth] += statistics.drafted
                    accepted[depth] += statistics.accepted
        for depth in DEPTHS[1:]:
            rows[f"{'sampled' if sample else 'greedy'}, depth {depth}"] = {
                "tokens per step": round(tokens[depth] / steps[depth], 2),
                "acceptance by depth": [
                    round(a / d, 3) for a, d in zip(accepted[depth], drafted[depth], strict=True) if d
                ],
                "speed-up": round(seconds[0] / seconds[depth], 2),
                "in the loop": round(in_loop[depth] / loop[depth] / (in_loop[0] / loop[0]), 2),
            }
    print("| | tokens per step | acceptance by depth | speed-up | in the loop |\n|---|---|---|---|---|")
    for name, row in rows.items():
        acceptance = ", ".join(map(str, row["acceptance by depth"]))
        print(f"| {name} | {row['tokens per step']} | {acceptance} | {row['speed-up']} | {row['in the loop']} |")
    if options.save:
        record = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": f"python tests/benchmarks/mtp.py --data out/data --prompts {options.prompts} "
            f"--new-tokens {options.new_tokens} --save",
            "prompts": len(prompts),
            "prompt tokens": options.prompt_length,
            "new tokens": options.new_tokens,
            "runs": rows,
        }
        results_file("mtp", device).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
