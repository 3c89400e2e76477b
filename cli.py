"""The command `nemotron-super`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .training.run_config import ConfigError, LoraRunConfig, PretrainConfig, RunConfig, SftConfig, describe

TINY = Path(__file__).parent / "model_card" / "nemotron-h-tiny"


def generate(arguments: argparse.Namespace) -> None:
    """Continue a prompt, printing tokens as they come."""
    # Imported here, so that `nemotron-super --help` answers at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer, set_seed

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    set_seed(arguments.seed)
    settings = GenerationConfig.from_model_config(model.config)
    settings.max_new_tokens = arguments.max_new_tokens
    settings.do_sample = arguments.temperature > 0
    if settings.do_sample:
        settings.temperature, settings.top_p = arguments.temperature, 0.95
    if arguments.chat:
        messages = [{"role": "user", "content": arguments.prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(tokenizer.bos_token + arguments.prompt, return_tensors="pt", add_special_tokens=False)
        print(arguments.prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs.to(model.device), generation_config=settings, streamer=streamer)


def hand_over(arguments: argparse.Namespace) -> None:
    """transformers' own command, with this implementation in place of its `nemotron_h`."""
    import transformers
    from transformers.cli.transformers import app

    from .modeling.modeling_nemotron_h import NemotronHForCausalLM

    # `transformers serve` does not ask the Auto classes: it looks the architecture up by name.
    transformers.NemotronHForCausalLM = NemotronHForCausalLM
    app([arguments.command, *arguments.rest], prog_name="nemotron-super")


def train(arguments: argparse.Namespace) -> None:
    """Run what a YAML file describes; with several devices, start it by `accelerate launch -m nemotron_super.cli`."""
    from .training.documents import DataError
    from .training.run import run
    from .training.trainer import TrainingStoppedError

    try:
        config: RunConfig = arguments.kind.load(arguments.config)
        run(config)
    except (ConfigError, DataError, TrainingStoppedError) as error:
        raise SystemExit(f"nemotron-super {arguments.command}: {error}") from error
    print(f"Done: {Path(config.output) / 'REPORT.md'}")


def kernels(arguments: argparse.Namespace) -> None:
    """Print what serves each op on this machine, and why nothing better does."""
    import torch

    from .kernels_hub import registry

    try:
        device = None if arguments.device is None else torch.device(arguments.device)
    except RuntimeError as error:
        raise SystemExit(f"nemotron-super kernels: --device {arguments.device}: {error}") from error
    if device is not None and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SystemExit(f"nemotron-super kernels: --device {device}: torch sees {torch.cuda.device_count()} GPUs.")
    print(registry.report(device, getattr(torch, arguments.dtype)))


def parser() -> argparse.ArgumentParser:
    """Build the command's parser."""
    top = argparse.ArgumentParser(prog="nemotron-super", description="Nemotron 3 Super for transformers.")
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("generate", help="continue a prompt, streaming", description=generate.__doc__)
    one.add_argument("prompt")
    one.add_argument(
        "--model", default=str(TINY), help="folder or name of a checkpoint (default: the bundled tiny one)"
    )
    one.add_argument("--max-new-tokens", type=int, default=120)
    one.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token each time")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    one.add_argument("--chat", action="store_true", help="put the prompt through the chat template")
    one.set_defaults(run=generate)
    for name, what in (("serve", "serve a checkpoint over HTTP"), ("chat", "chat with a served model")):
        commands.add_parser(name, help=f"{what}, as `transformers {name}`", add_help=False)
    for name, kind in (("pretrain", PretrainConfig), ("sft", SftConfig), ("lora", LoraRunConfig)):
        doc = kind.__doc__ or ""
        one = commands.add_parser(
            name,
            help=doc[0].lower() + doc[1:].rstrip("."),
            description=doc,
            epilog=f"Keys of the file, with their defaults:\n{describe(kind)}".replace("%", "%%"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument("--config", required=True, type=Path, help="YAML file; recipes are in training/recipes/")
        one.set_defaults(run=train, kind=kind)
    two = commands.add_parser("kernels", help="what serves each op", description=kernels.__doc__)
    two.add_argument("--device", default=None, help="default: the GPU if there is one")
    two.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    two.set_defaults(run=kernels)
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `nemotron-super` command."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] in (["serve"], ["chat"]):  # their options are transformers'
        hand_over(argparse.Namespace(command=given[0], rest=given[1:]))
        return
    arguments = parser().parse_args(given)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
