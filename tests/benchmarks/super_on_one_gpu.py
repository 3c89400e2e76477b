"""All 88 layers of Nemotron 3 Super and its MTP at the release's mix on one GPU, with random weights: memory and speed.

    python tests/benchmarks/super_on_one_gpu.py [--save]
    python tests/benchmarks/super_on_one_gpu.py --offload-experts 20          a GPU of less than 80 GB
    python tests/benchmarks/super_on_one_gpu.py --unread --context 1048576 --kv-dtype fp8 --no-mtp
    python tests/benchmarks/super_on_one_gpu.py --preset tiny --device cpu --context 64 --new-tokens 8

Weights are made where they will lie and packed as they will be used, module by module: no expert ever exists in BF16. Random
weights read as many bytes as real ones. What MTP drafts with them is never kept, so that of drafting the time of a step counts:
divide real tokens per step (see mtp.py) by it. With --unread a context is not read but made up, as random keys and values in the
cache: steps behind it take the same time and memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import resource
import sys
import time

import torch
import transformers
from against_transformers import hardware, results_file
from decoding import Statistics
from nemotron_super import NemotronHConfig, NemotronHForCausalLM, NVFP4Config, preset
from nemotron_super.conversion.quantizer import install_empty
from nemotron_super.modeling.captured_decoding import DecodeStep
from nemotron_super.modeling.quantized_layers import QuantizedExperts, QuantizedLinear
from nemotron_super.modeling.static_cache import StaticAttentionLayer, StaticHybridCache

E2M1_RMS, E4M3_RMS = 2.93, 95.0  # of codes that are all equally likely
ONE = 0x38  # 1.0 in float8_e4m3fn
SUBTRACTED = 8  # tokens of the short run that a long one is compared with


def build(config: NemotronHConfig, recipe: str | None, device: str, offload: int = 0) -> NemotronHForCausalLM:
    """A model with random weights, quantised by a recipe (None: BF16); experts of the last `offload` layers on the CPU."""
    with torch.device("meta"):
        model = NemotronHForCausalLM(config).to(torch.bfloat16)
    if recipe is not None:
        install_empty(model, NVFP4Config(recipe=recipe))
    sets = [name for name, module in model.named_modules() if isinstance(module, QuantizedExperts)]
    if not 0 <= offload <= len(sets):
        raise SystemExit(f"--offload-experts {offload}: the model has {len(sets)} quantised sets of experts.")
    away = set(sets[len(sets) - offload :])
    torch.manual_seed(0)
    for name, module in model.named_modules():
        module.to_empty(device="cpu" if name in away else device, recurse=False)
        output = name.endswith(("out_proj", "o_proj", "down_proj")) and config.rescale_prenorm_residual
        std = config.initializer_range / (math.sqrt(config.num_hidden_layers) if output else 1.0)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            fill(module, key, tensor.detach(), std)
            if name in away and device == "cuda":
                tensor.data = tensor.data.pin_memory()
    return model.eval().requires_grad_(False)


def fill(module: torch.nn.Module, key: str, tensor: torch.Tensor, std: float) -> None:
    """Numbers like those of a fresh model, whatever they are stored in."""
    if isinstance(module, QuantizedLinear | QuantizedExperts):
        nvfp4 = module.weight_format.name == "NVFP4"
        if key.endswith("input_scale"):
            tensor.fill_(1.0)
        elif tensor.dtype == torch.float32:
            tensor.fill_(std / (E2M1_RMS if nvfp4 else E4M3_RMS))
        elif key.endswith("weight_scale"):
            tensor.view(torch.uint8).fill_(ONE)
        elif tensor.element_size() == 1:
            codes = tensor.view(torch.uint8).random_()
            if not nvfp4:
                codes.masked_fill_(codes % 128 == 127, 0)  # NaN
        else:
            tensor.zero_()  # a bias
    elif key == "A_log":
        tensor.uniform_(1, 16).log_()
    elif key == "dt_bias":
        tensor.uniform_(math.log(1e-3), math.log(0.1)).exp_()
        tensor.copy_(tensor + torch.log(-torch.expm1(-tensor)))
    elif "bias" in key:
        tensor.zero_()
    elif tensor.dim() == 1:
        tensor.fill_(1.0)  # norms, D
    else:
        tensor.normal_(0.0, std)


def seconds(work, device: str, repeats: int = 3) -> float:
    """Median time of `work`, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def step_seconds(model, prompt: torch.Tensor, new_tokens: int, device: str, **options) -> float:
    """Time of one step of decoding behind a prompt, its reading subtracted."""
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    steps = {}

    def run(n: int) -> None:
        statistics = {"streamer": Statistics()} if "use_mtp" in options else {}
        model.generate(prompt, max_new_tokens=n, min_new_tokens=n, **fixed, **statistics)
        steps[n] = statistics["streamer"].mtp_statistics.steps / prompt.shape[0] if statistics else n

    many = SUBTRACTED + new_tokens
    took = {n: seconds(lambda n=n: run(n), device) for n in (many, SUBTRACTED)}
    return (took[many] - took[SUBTRACTED]) / (steps[many] - steps[SUBTRACTED])


def gigabytes(model: torch.nn.Module, kind: str) -> float:
    """Of parameters and buffers on one kind of device."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()] if t.device.type == kind}
    return sum(t.nbytes for t in tensors.values()) / 1e9


def unread_step_seconds(
    model, context: int, steps: int, device: str, kv_dtype: torch.dtype | None
) -> tuple[float, float]:
    """Time of a step behind a context of random keys and values, and the gigabytes of these."""
    cache = StaticHybridCache(model.config, context, kv_dtype=kv_dtype)
    prompt = torch.randint(3, model.config.vocab_size, (1, 8), device=device)
    token = model(prompt, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
    stored = [
        t for layer in cache.layers if isinstance(layer, StaticAttentionLayer) for t in (layer.keys, layer.values)
    ]
    for tensor in stored:
        if tensor.element_size() == 1:
            tensor.view(torch.uint8).random_(0, 0x60)  # numbers of up to 16
        else:
            tensor.normal_()
    cache.slots.seen = context - 4 * steps - 1
    step = DecodeStep(model, cache, 1, None)
    took = seconds(lambda: [step(token) for _ in range(steps)], device, repeats=2)
    return took / steps, sum(t.nbytes for t in stored) / 1e9


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, float | int | str]:
    """Build, generate, and say what it took."""
    start = time.perf_counter()
    config = preset(options.preset, **({"num_nextn_predict_layers": 0} if options.no_mtp else {}))
    model = build(config, options.recipe, options.device, options.offload_experts)
    found: dict[str, float | int | str] = {
        "layers": config.num_hidden_layers,
        "quantised modules": sum(isinstance(m, QuantizedLinear | QuantizedExperts) for m in model.modules()),
        "build, s": time.perf_counter() - start,
        "weights, GB": gigabytes(model, options.device),
        "weights in CPU memory, GB": gigabytes(model, "cpu") if options.device != "cpu" else 0.0,
    }
    if options.unread:
        kv_dtype = torch.float8_e4m3fn if options.kv_dtype == "fp8" else None
        step, kept = unread_step_seconds(model, options.context, options.new_tokens, options.device, kv_dtype)
        found |= {"keys and values, GB": kept, "plain step, ms": step * 1e3, "plain, tokens/s": 1 / step}
        return rounded(found | memory(options.device))
    length = options.context - options.new_tokens - SUBTRACTED
    prompt = torch.randint(3, config.vocab_size, (options.batch, length), device=options.device)
    cache = {} if options.cache == "dynamic" else {"cache_implementation": options.cache}
    if options.prefill_chunk:
        cache["prefill_chunk_size"] = options.prefill_chunk
    if not options.prefill_chunk:
        took = seconds(lambda: model(prompt, use_cache=True, logits_to_keep=1), options.device)
        found["prefill, tokens/s"] = prompt.numel() / took
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = step_seconds(model, prompt, options.new_tokens, options.device, **cache)
    found["plain step, ms"], found["plain, tokens/s"] = step * 1e3, options.batch / step
    if model.mtp is not None and options.drafts:
        drafting = {"use_mtp": True, "num_assistant_tokens": options.drafts}
        step = step_seconds(model, prompt, options.new_tokens, options.device, **cache, **drafting)
        found[f"step with {options.drafts} drafts, ms"] = step * 1e3
        found["tokens/s if all drafts were kept"] = options.batch * (options.drafts + 1) / step
    return rounded(found | memory(options.device))


def memory(device: str) -> dict[str, float]:
    """The most that was held, in gigabytes."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        return {
            "peak while generating, GB": torch.cuda.max_memory_allocated() / 1e9,
            "memory of the GPU, GB": total / 1e9,
        }
    return {"peak of the process, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def rounded(found: dict[str, float | int | str]) -> dict[str, float | int | str]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="super")
    parser.add_argument("--recipe", default="release", choices=("release", "nvfp4", "fp8"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--context", type=int, default=8192, help="prompt and new tokens together")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--drafts", type=int, default=2, help="tokens that MTP drafts a step; 0 leaves MTP out")
    parser.add_argument("--no-mtp", action="store_true", help="a model without its MTP head")
    parser.add_argument("--unread", action="store_true", help="make the context up instead of reading it")
    parser.add_argument("--kv-dtype", default=None, choices=("fp8",), help="with --unread: keys and values in FP8")
    parser.add_argument("--cache", default=None, choices=("static", "dynamic"), help="static on a GPU, else dynamic")
    parser.add_argument("--prefill-chunk", type=int, default=0, help="read the prompt in pieces: takes less memory")
    parser.add_argument("--offload-experts", type=int, default=0, help="layers whose experts stay in CPU memory")
    parser.add_argument("--save", action="store_true", help="write the run to results/")
    options = parser.parse_args(arguments)
    if options.context <= options.new_tokens + SUBTRACTED:
        parser.error(f"--context {options.context} leaves no prompt beside {options.new_tokens} new tokens")
    # Experts that are fetched cannot be part of a recorded step.
    recorded = options.device == "cuda" and not options.offload_experts
    options.cache = options.cache or ("static" if recorded else "dynamic")
    return options


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, and save where asked to."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    found = measure(options)
    for name, value in found.items():
        print(f"{name:<36}{value:>12}")
    if options.save:
        record = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(options.device),
            "torch": torch.__version__,
            "command": "python tests/benchmarks/super_on_one_gpu.py " + " ".join(arguments or sys.argv[1:]),
            "options": {k: v for k, v in vars(options).items() if k != "save"},
            "found": found,
        }
        what = "super_on_one_gpu_unread" if options.unread else "super_on_one_gpu"
        results_file(what, options.device).write_text(json.dumps(record, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
