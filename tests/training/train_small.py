"""A small training run as a process of its own, to be started several times over, killed, and resumed.

`python train_small.py OUTPUT --steps 20 [--batch 4] [--accumulation 1] [--kill-at 13]` writes what was logged to
OUTPUT/log.json and the final weights to OUTPUT/final. It resumes from OUTPUT's last complete checkpoint if there is one.
`--distributed '{"fsdp_size": 2, "ep_size": 2}'` shards the model by transformers' own plans; such a run writes no checkpoints.
`--deepspeed '{"zero_optimization": {"stage": 3}, ...}'` leaves it to DeepSpeed, `--fsdp '{"version": 2, ...}'` to accelerate's FSDP2.
Everything runs on the CPU, with gloo, unless `--cuda` is given.
"""

import argparse
import json
import os
import resource
import signal
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from nemotron_super import NemotronHConfig, NemotronHForCausalLM
from nemotron_super.modeling.block import NemotronHBlock
from nemotron_super.modeling.mtp import NemotronHMTPBlock
from nemotron_super.training.best_fit import BestFitRows, PadRows
from nemotron_super.training.documents import TokenDocument
from nemotron_super.training.fsdp import load_on_first_rank
from nemotron_super.training.lora import add_lora, allow_out_proj
from nemotron_super.training.trainer import NemotronTrainer, last_complete_checkpoint
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

SMALL = {
    "vocab_size": 61, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "moe_latent_size": 12, "moe_intermediate_size": 10, "intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 16, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    "hybrid_override_pattern": "ME*E", "mtp_hybrid_override_pattern": "*E", "initializer_range": 0.2,
}  # fmt: skip


def make_rows(documents: int = 600, length: int = 24) -> list[dict]:
    """Arithmetic progressions of random length and step, packed."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(documents):
        size, start, step = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 20), (0, 50), (1, 9)))  # fmt: skip
        made.append(TokenDocument([(start + step * place) % 61 for place in range(size)]))
    return list(BestFitRows(made, length))


class KillAt(TrainerCallback):
    """SIGKILL, which nothing can catch, once a step is done."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class FullDiskAfter(TrainerCallback):
    """From a step on, no file can grow beyond 20,000 bytes: the system itself refuses, in the middle of a write."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def make_model(options: argparse.Namespace, arguments: TrainingArguments) -> NemotronHForCausalLM:
    """A new model; where it is sharded while it is loaded, the same one from a file."""
    set_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**SMALL))
    if options.distributed is options.deepspeed is options.fsdp is None:
        return model
    first = PartialState().is_main_process
    if first:
        model.save_pretrained(options.output / "initial")
    PartialState().wait_for_everyone()
    if options.fsdp is not None:
        loaded = load_on_first_rank(options.output / "initial", arguments, torch.float32)
        read = loaded.lm_head.weight.equal(model.lm_head.weight)
        assert read == (first or not options.fsdp.get("cpu_ram_efficient_loading"))
        return loaded
    sharding = None if options.distributed is None else DistributedConfig(**options.distributed)
    return NemotronHForCausalLM.from_pretrained(options.output / "initial", distributed_config=sharding)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--full-after", type=int)
    parser.add_argument("--loss-over", default="tokens")
    parser.add_argument("--distributed", type=json.loads, help="fields of a DistributedConfig")
    parser.add_argument("--deepspeed", type=json.loads, help="DeepSpeed's configuration")
    parser.add_argument("--fsdp", type=json.loads, help="TrainingArguments' `fsdp_config`")
    parser.add_argument("--adapters", action="store_true", help="train adapters only, on experts too")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        str(options.output), max_steps=options.steps, per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation, learning_rate=3e-3, weight_decay=0.1, logging_steps=1, save_steps=5,
        save_strategy="steps" if options.distributed is None else "no", report_to=[], use_cpu=not options.cuda, disable_tqdm=True,
        seed=0, remove_unused_columns=False, ddp_find_unused_parameters=False, deepspeed=options.deepspeed,
        fsdp=options.fsdp is not None, fsdp_config=options.fsdp, bf16=options.bf16,
        activation_checkpointing=options.checkpointing,
    )  # fmt: skip
    if options.fsdp is not None and not options.cuda:
        # accelerate puts its FSDP2 to work on accelerators alone, and on CPU processes does without it, unsaid. All of
        # it runs on gloo and the CPU, though: only the question what kind of processes these are is answered otherwise.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    model = make_model(options, arguments)
    if options.adapters:
        set_seed(1)
        model = add_lora(model, r=2, exclude=["lm_head"])
    trainer = NemotronTrainer(
        model,
        arguments,
        train_dataset=make_rows(),
        data_collator=PadRows(0),
        loss_over=options.loss_over,
        router_bias_rate=0.0 if options.adapters else 1e-2,
        balance_coefficient=1e-2,
        callbacks=[
            *([KillAt(options.kill_at)] if options.kill_at else []),
            *([FullDiskAfter(options.full_after)] if options.full_after else []),
        ],
    )
    checkpoint = last_complete_checkpoint(options.output)
    with allow_out_proj():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if options.fsdp is not None:
        blocks = [m for m in trainer.model.modules() if isinstance(m, NemotronHBlock | NemotronHMTPBlock)]
        assert len(blocks) == 6 and all(isinstance(block, FSDPModule) for block in blocks)
    trainer.save_model(str(options.output / "final"))  # gathers what is sharded
    if trainer.args.process_index == 0:
        (options.output / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
    # gloo's threads race with the end of the interpreter, and with that of their group: seen to abort, and to wait for ever.
    os._exit(0)
