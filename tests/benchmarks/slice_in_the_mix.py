"""One eighth of Super (5 Mamba, 5 mixtures of experts, 1 attention, true widths) in BF16 and at the release's mix, in one run.

    python tests/benchmarks/slice_in_the_mix.py [--save]

Random weights; decoding behind 512 tokens at batch 1 and 8, prefill of 8192 tokens. For what is asked see the last column.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json

import torch
import transformers
from against_transformers import SHAPES, hardware, results_file
from nemotron_super import NemotronHConfig, preset
from super_on_one_gpu import build, gigabytes, seconds, step_seconds


def measure(config: NemotronHConfig, recipe: str | None, options: argparse.Namespace) -> dict[str, float | str]:
    """Milliseconds by what was done; a failure as text."""
    model, device = build(config, recipe, options.device), options.device
    cache = {"cache_implementation": options.cache} if options.cache != "dynamic" else {}
    found: dict[str, float | str] = {"weights, GB": gigabytes(model, device)}

    def ids(batch: int, length: int) -> torch.Tensor:
        return torch.randint(3, config.vocab_size, (batch, length), device=device)

    def note(name: str, work) -> None:
        try:
            found[name] = round(work() * 1e3, 3)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"

    with torch.inference_mode():
        for batch in (1, 8):
            prompt = ids(batch, options.prompt)
            note(
                f"decode batch {batch}, ms",
                lambda prompt=prompt: step_seconds(model, prompt, options.new_tokens, device, **cache),
            )
        prompt = ids(1, options.prefill)
        note(
            f"prefill {options.prefill}, ms",
            lambda: seconds(lambda: model(prompt, use_cache=True, logits_to_keep=1), device, repeats=5),
        )
    if device == "cuda":
        found["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Both models, side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=None, help="another model than the slice, such as tiny")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cache", default=None, choices=("static", "dynamic"), help="static on a GPU, else dynamic")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--save", action="store_true", help="write the run to results/")
    options = parser.parse_args(arguments)
    options.cache = options.cache or ("static" if options.device == "cuda" else "dynamic")
    transformers.logging.set_verbosity_error()
    config = preset(options.preset) if options.preset else NemotronHConfig(**SHAPES["cuda"])
    runs = {}
    for name, recipe in (("BF16", None), ("release", "release")):
        runs[name] = measure(config, recipe, options)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    asked = {
        "decode batch 1, ms": "release: at most 1.13",
        "decode batch 8, ms": "release: at most 60 % of BF16",
        "prefill 8192, ms": "release: at most 125 % of BF16",
    }
    print(f"{'':<24}{'BF16':>14}{'release':>14}   asked on an H100")
    for name in runs["BF16"]:
        print(f"{name:<24}{runs['BF16'][name]:>14}{runs['release'][name]:>14}   {asked.get(name, '')}")
    if options.save:
        record = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(options.device),
            "torch": torch.__version__,
            "command": "python tests/benchmarks/slice_in_the_mix.py --save",
            "cache": options.cache,
            "runs": runs,
        }
        results_file("slice_in_the_mix", options.device).write_text(json.dumps(record, indent=1) + "\n")
    return runs


if __name__ == "__main__":
    main()
