"""The trainer: both means of the loss, its logs, what stops it, and what survives a stop."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nemotron_super
import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin, merge_fsdp_weights
from nemotron_super import NemotronHForCausalLM
from nemotron_super.training.best_fit import BestFitRows, PadRows
from nemotron_super.training.documents import TokenDocument
from nemotron_super.training.flops import attended_pairs, multiplications
from nemotron_super.training.fsdp import prepare_fsdp
from nemotron_super.training.lora import add_lora
from nemotron_super.training.trainer import (
    NemotronTrainer,
    TrainingStoppedError,
    conversation_weights,
    keep_small_parameters_in_float32,
    last_complete_checkpoint,
)
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
SCRIPT = Path(__file__).with_name("train_small.py")


@pytest.fixture
def make_trainer(make_model, tmp_path):
    """`make_trainer(rows, model=None, batch=2, accumulation=1, lr=0.0, **options)`, with arguments for both classes."""

    def make(rows, model=None, batch=2, accumulation=1, lr=0.0, callbacks=(), arguments=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": batch, "report_to": [],
            "gradient_accumulation_steps": accumulation, "learning_rate": lr, "use_cpu": True, "disable_tqdm": True,
            "logging_steps": 1, "save_strategy": "no", "remove_unused_columns": False, "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        return NemotronTrainer(
            make_model("ME*", **MTP) if model is None else model,
            TrainingArguments(**{**defaults, **(arguments or {})}),
            train_dataset=rows,
            data_collator=PadRows(0),
            callbacks=list(callbacks),
            **options,
        )

    return make


def conversations(lengths, seed=0):
    """Conversations of which some tokens are masked."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(0, 61, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.4, -100)
        labels[-1] = ids[-1]
        made.append(TokenDocument(ids.tolist(), labels.tolist()))
    return made


LENGTHS = (12, 2, 3, 9, 5, 4, 11, 2)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("length", [12, 24], ids=["packed", "packed-more"])
@pytest.mark.parametrize("loss_over", ["tokens", "conversations"])
def test_both_means(make_model, make_trainer, loss_over, length, batch, accumulation):
    """The mean over the step's tokens, or over its conversations of their means, however they came to be in it."""
    model = make_model("ME*", **MTP).train()
    source = conversations(LENGTHS)
    sums, counts = [], []
    for document in source:
        ids, labels = torch.tensor([document.input_ids]), torch.tensor([document.labels])
        out = model(ids, labels=labels, num_items_in_batch=1, use_cache=False)
        sums.append((float(out.lm_loss.detach()), float(out.mtp_loss.detach())))
        counts.append(sum(label != -100 for label in document.labels[1:]))
    if loss_over == "tokens":
        lm, mtp = (sum(pair[part] for pair in sums) / sum(counts) for part in (0, 1))
    else:
        means = [[pair[part] / n for pair, n in zip(sums, counts, strict=True)] for part in (0, 1)]
        lm, mtp = (sum(values) / len(values) for values in means)
    rows = list(BestFitRows(source, length))
    rows_per_step = batch * accumulation
    assert len(rows) <= rows_per_step + 1
    if len(rows) != rows_per_step:  # all conversations must be in the one step
        batch, accumulation = (len(rows), 1) if accumulation == 1 else (1, len(rows))
    trainer = make_trainer(rows, model, batch, accumulation, loss_over=loss_over, balance_coefficient=0.0)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert logged["mtp_loss"] == pytest.approx(mtp, rel=1e-5)
    assert logged["loss"] == pytest.approx(lm + 0.3 * mtp, rel=1e-5)


def test_conversation_weights():
    labels = torch.tensor([[7, 7, -100, 7, -100, 7], [-100, 7, 7, 7, -100, 7]])
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 5, 5]])
    weights = conversation_weights(labels, seq_idx)
    expected = torch.tensor([[0, 1, 0, 1 / 2, 0, 1 / 2], [0, 1 / 3, 1 / 3, 1 / 3, 0, 1]])
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(conversation_weights(labels)[0], torch.tensor([0, 1 / 3, 0, 1 / 3, 0, 1 / 3]))
    assert conversation_weights(torch.full((1, 4), -100)).sum() == 0


def test_logs(make_model, make_trainer):
    """Parts of the loss, speed, utilisation, and for every router its balance."""
    trainer = make_trainer(
        list(BestFitRows(conversations(LENGTHS), 24)), batch=1, peak_tflops=1e-3, arguments={"max_steps": 2}
    )
    trainer.train()
    for logged in trainer.state.log_history[:2]:
        assert logged["loss"] == pytest.approx(logged["lm_loss"] + 0.3 * logged["mtp_loss"], rel=1e-5)
        assert logged["balance_loss"] == pytest.approx(1e-4, rel=0.5)
        assert logged["tokens_per_second"] > 0 and 0 < logged["mfu"] < 1
        for layer in ("layers.1", "mtp.layers.1"):
            assert logged[f"balance/{layer}/maximum_violation"] <= logged["maximum_violation"]
            assert 0 < logged[f"balance/{layer}/entropy"] <= 1
            assert logged[f"balance/{layer}/dead_experts"] in range(7)


def test_without_mtp_and_without_balance_loss(make_model, make_trainer):
    trainer = make_trainer(list(BestFitRows(conversations(LENGTHS), 24)), make_model("ME*"), balance_coefficient=0.0)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert not {"lm_loss", "mtp_loss", "balance_loss", "mfu"} & logged.keys() and logged["maximum_violation"] >= 0


def test_evaluation_does_not_move_routers(make_trainer):
    rows = list(BestFitRows(conversations(LENGTHS), 24))
    trainer = make_trainer(rows, router_bias_rate=0.5)
    bias = trainer.model.model.layers[1].mixer.gate.e_score_correction_bias
    before = bias.clone()
    trainer.evaluate(rows)
    assert bias.equal(before)
    trainer.train()
    assert not bias.equal(before)


def test_weight_decay_and_float32_parameters(make_model, make_trainer):
    model = make_model("ME*-", **MTP).bfloat16()
    small = keep_small_parameters_in_float32(model)
    assert {name.split("mixer.")[1] for name in small} == {"A_log", "D", "dt_bias", "gate.weight"}
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == set(small)
    rows = list(BestFitRows(conversations(LENGTHS), 24))
    trainer = make_trainer(rows, model, lr=1e-5, arguments={"weight_decay": 0.1})
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in small}
    trainer.train()
    assert all(not p.equal(before[name]) for name, p in model.named_parameters() if name in small)
    decayed, plain = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert {"model.norm_f.weight", "mtp.layers.0.enorm.weight"} <= {names[id(p)] for p in plain["params"]}
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Poison(TrainerCallback):
    """Makes a weight infinite before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.model.norm_f.weight.data[0] = float("inf")


def test_a_loss_that_is_not_finite(make_trainer, tmp_path):
    rows = list(BestFitRows(conversations(LENGTHS * 3), 24))
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(rows, batch=1, accumulation=2, callbacks=[Poison(3)], arguments=arguments)
    with pytest.raises(TrainingStoppedError, match=r"Step 3, micro-batch 1 of rank 0: the loss is (nan|inf)") as error:
        trainer.train()
    (saved,) = (tmp_path / "run").glob("bad_batch_step_3_rank_0.safetensors")
    assert str(saved) in str(error.value) and "checkpoint-2" in str(error.value)
    assert load_file(saved)["input_ids"][0].tolist() == rows[4]["input_ids"]
    assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-2"


@pytest.mark.parametrize("loss_over", ["tokens", "conversations"])
def test_all_labels_masked(make_trainer, loss_over):
    row = {"input_ids": [1, 2, 3], "labels": [-100] * 3, "seq_idx": [0] * 3}
    with pytest.raises(TrainingStoppedError, match="Step 1: no label of the whole batch is to be predicted"):
        make_trainer([row] * 4, loss_over=loss_over).train()


def test_arguments_that_do_not_fit(make_model, make_trainer):
    with pytest.raises(ValueError, match="`loss_over` is 'rows'"):
        make_trainer([], loss_over="rows")
    with pytest.raises(ValueError, match="`router_bias_rate` must be 0 under PEFT"):
        make_trainer([], add_lora(make_model("ME*", **MTP), r=2))


@pytest.mark.parametrize("size", ["get_cp_size", "get_sp_size"])
def test_context_parallelism_is_refused(make_trainer, monkeypatch, size):
    monkeypatch.setattr(NemotronTrainer, size, lambda self: 2)
    with pytest.raises(ValueError, match="Context parallelism is not supported: Mamba-2 states and MTP targets"):
        make_trainer([])


def test_peft(make_model, make_trainer):
    model = add_lora(make_model("ME*", **MTP), r=2)
    rows = list(BestFitRows(conversations(LENGTHS), 24))
    trainer = make_trainer(rows, model, lr=1e-2, router_bias_rate=0.0, arguments={"max_steps": 8})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and "balance/mtp.layers.1/entropy" in trainer.state.log_history[0]


def test_a_checkpoint_that_cannot_be_written(make_trainer, tmp_path, monkeypatch):
    """A full disk in the middle of a save: nothing half written stays, what was there before does."""
    rows = list(BestFitRows(conversations(LENGTHS * 3), 24))
    trainer = make_trainer(rows, batch=1, arguments={"max_steps": 3, "save_strategy": "steps", "save_steps": 1})
    write = type(trainer)._save_optimizer_and_scheduler

    def full(self, folder):
        if folder.endswith("-2"):
            raise OSError(28, "No space left on device")
        write(self, folder)

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", full)
    with pytest.raises(TrainingStoppedError, match=r"No space left.*checkpoint-1 is untouched") as error:
        trainer.train()
    assert "Step 2" in str(error.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (20, '{"global_st'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-10"


def test_multiplications(make_model):
    """Every linear map and expert counted once per token; what is not a matrix follows the formulas."""
    model = make_model("ME*-", **MTP)
    config = model.config
    matrices = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    depths = config.mtp_num_depths
    expected = sum(n * (depths if name.startswith("mtp") else 1) for name, n in matrices.items())
    expected += depths * matrices["lm_head"]
    moe = 6 * 24 + 2 * 2 * 12 * 10  # router, and two experts of two matrices
    scan = 64 * 4 + 2 * 32 * 8  # convolution of 64 channels, state in and out of 4 heads of 8 by 8
    found, per_pair = multiplications(config)
    assert found == expected + (1 + depths) * moe + scan
    assert per_pair == 2 * 32 * (1 + depths)
    assert multiplications(config, mtp=False)[0] < found


def test_attended_pairs():
    seq_idx = torch.tensor([[0, 0, 0, 1], [5, 5, 6, 7]])
    assert attended_pairs(seq_idx, 2, 4) == (6 + 1) + (3 + 1 + 1)
    assert attended_pairs(None, 2, 4) == 2 * 10


def run(output, *arguments, script=SCRIPT, processes=None, check=True):
    """Start a training process, or several under torchrun where a number of them is given; return what was not checked."""
    command = [sys.executable]
    if processes is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(script), str(output), *arguments], capture_output=True, text=True, timeout=240
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done if not check else None


def logged(output):
    return [entry for entry in json.loads((output / "log.json").read_text()) if "loss" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Fifty steps of four rows in one process, without a break."""
    output = tmp_path_factory.mktemp("whole")
    run(output, "--steps", "50", "--batch", "4")
    return output


@pytest.mark.slow
def test_two_processes_train_as_one(whole, tmp_path):
    """Same losses, parts and expert loads over 50 steps, with gradients summed over two ranks."""
    run(tmp_path, "--steps", "50", "--batch", "2", processes=2)
    one, two = logged(whole), logged(tmp_path)
    assert len(one) == len(two) == 50
    assert one[-1]["lm_loss"] < one[0]["lm_loss"] - 0.3, "something was learned"
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "lm_loss", "mtp_loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5 if key != "grad_norm" else 1e-4), (a["step"], key)
        # A token on the edge between two experts may fall to the other one.
        assert b["maximum_violation"] == pytest.approx(a["maximum_violation"], abs=0.1)


@pytest.mark.slow
def test_conversation_means_over_two_processes(tmp_path):
    options = ("--steps", "5", "--loss-over", "conversations")
    run(tmp_path / "one", *options, "--batch", "4")
    run(tmp_path / "two", *options, "--batch", "1", "--accumulation", "2", processes=2)
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.slow
def test_killed_and_resumed(whole, tmp_path):
    """SIGKILL after a step drawn at random: the resumed run ends with the same bytes."""
    step = random.randrange(6, 50)
    print(f"killed after step {step}")
    assert run(tmp_path, "--steps", "50", "--kill-at", str(step), check=False).returncode == -9
    saved = (step - 1) // 5 * 5  # a step is saved after it has ended
    assert last_complete_checkpoint(tmp_path).name == f"checkpoint-{saved}"
    shutil.copytree(tmp_path / f"checkpoint-{saved}", tmp_path / f"checkpoint-{saved + 5}")
    (tmp_path / f"checkpoint-{saved + 5}" / "trainer_state.json").unlink()  # as if killed while saving
    run(tmp_path, "--steps", "50")
    same = ("loss", "lm_loss", "mtp_loss", "grad_norm", "learning_rate", "maximum_violation")
    assert [{k: e[k] for k in same} for e in logged(tmp_path)] == [{k: e[k] for k in same} for e in logged(whole)]
    final = Path("final") / "model.safetensors"
    assert (tmp_path / final).read_bytes() == (whole / final).read_bytes()


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path):
    """The system refuses to write on in the middle of the second checkpoint: the first stays, nothing half written does."""
    done = run(tmp_path, "--steps", "12", "--full-after", "7", check=False)
    assert done.returncode == 1
    assert "Step 10: the checkpoint could not be written" in done.stderr and "checkpoint-5 is untouched" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def same_course(one, two):
    """Both runs logged the same losses, and saved the same tensors in the published layout."""
    a, b = logged(one), logged(two)
    assert [entry["loss"] for entry in b] == pytest.approx([entry["loss"] for entry in a], rel=1e-5)
    assert [entry["mtp_loss"] for entry in b] == pytest.approx([entry["mtp_loss"] for entry in a], rel=1e-5)
    assert [entry["grad_norm"] for entry in b] == pytest.approx([entry["grad_norm"] for entry in a], rel=1e-4)
    for entry, other in zip(a, b, strict=True):
        # A token on the edge between two experts may fall to the other one.
        assert other["maximum_violation"] == pytest.approx(entry["maximum_violation"], abs=0.1)
    final = [load_file(folder / "final" / "model.safetensors") for folder in (one, two)]
    assert final[0].keys() == final[1].keys() and "backbone.layers.1.mixer.experts.5.up_proj.weight" in final[0]
    for name, tensor in final[0].items():
        torch.testing.assert_close(
            final[1][name], tensor, rtol=1e-3, atol=2e-3, msg=lambda text, name=name: name + text
        )


RECIPES = Path(nemotron_super.__file__).parent / "training" / "recipes"
FSDP = yaml.safe_load((RECIPES / "super_sft.yaml").read_text(encoding="utf-8"))["trainer"]["fsdp_config"]


@pytest.mark.slow
def test_fsdp_over_two_processes(whole, tmp_path):
    """accelerate's FSDP2, with checkpointing: the losses of one process; its shards go on to the same bytes, and are published."""
    options = ("--steps", "50", "--batch", "2", "--checkpointing", "--fsdp", json.dumps(FSDP))
    two, again = tmp_path / "two", tmp_path / "again"
    run(two, *options, processes=2)
    same_course(whole, two)
    shutil.copytree(two / "checkpoint-45", again / "checkpoint-45")
    run(again, *options, processes=2)
    same = ("loss", "lm_loss", "mtp_loss", "grad_norm", "learning_rate", "maximum_violation")
    assert [{k: e[k] for k in same} for e in logged(again)] == [{k: e[k] for k in same} for e in logged(two)]
    final = Path("final") / "model.safetensors"
    assert (again / final).read_bytes() == (two / final).read_bytes()

    shards = two / "checkpoint-50"
    assert not list(shards.glob("*.safetensors"))
    assert len(list((shards / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    merge_fsdp_weights(str(shards / "pytorch_model_fsdp_0"), str(tmp_path / "merged"))
    published = NemotronHForCausalLM.from_pretrained(two / "final")
    merged = NemotronHForCausalLM(published.config)
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    ids = torch.arange(40).view(2, 20)
    assert published.eval()(ids).logits.equal(merged.eval()(ids).logits)


@pytest.mark.slow
def test_fsdp_in_bfloat16(tmp_path):
    """Losses stay near those of float32 and are not rounded themselves; asked for the whole state, checkpoints are published."""
    run(tmp_path / "one", "--steps", "5")
    config = json.dumps({**FSDP, "state_dict_type": "FULL_STATE_DICT"})
    run(tmp_path / "two", "--steps", "5", "--batch", "2", "--bf16", "--fsdp", config, processes=2)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], rel=3e-3)
    assert [entry["loss"] for entry in two] != [entry["loss"] for entry in one]
    for entry in two:
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 0.3 * entry["mtp_loss"], rel=1e-5)
    checkpoint = tmp_path / "two" / "checkpoint-5"
    saved, final = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "two/final/model.safetensors")
    assert saved.keys() == final.keys() == load_file(tmp_path / "one/final/model.safetensors").keys()
    assert all(saved[name].equal(final[name]) for name in saved)
    model = NemotronHForCausalLM.from_pretrained(checkpoint)
    state = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_fsdp_with_adapters(tmp_path):
    """Adapters on linear maps and routed experts, over sharded frozen weights: those of one process, in PEFT's format."""
    options = ("--steps", "5", "--adapters")
    run(tmp_path / "one", *options, "--batch", "4")
    run(tmp_path / "two", *options, "--batch", "2", "--fsdp", json.dumps(FSDP), processes=2)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], rel=1e-5)
    a, b = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys() and any(".experts." in name and "shared" not in name for name in a)
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=2e-3, msg=lambda text, name=name: name + text)


def test_fsdp_without_mtp(make_model):
    """accelerate stops at a class of blocks that the model does not have."""
    for options, names in ({}, {"NemotronHBlock"}), (MTP, {"NemotronHBlock", "NemotronHMTPBlock"}):
        model = make_model("ME*", **options)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        prepare_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
        assert set(plugin.transformer_cls_names_to_wrap) == names
        plugin.set_auto_wrap_policy(model)


def test_fsdp_on_the_cpu_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match="`fsdp` is not supported on the CPU"):
        make_trainer([], arguments={"fsdp": True})


@pytest.mark.slow
def test_experts_split_over_two_processes(whole, tmp_path):
    """transformers' plan: each process holds half of the experts and of everything else, and sees rows of its own."""
    run(tmp_path, "--steps", "50", "--batch", "2", "--distributed", '{"fsdp_size": 2, "ep_size": 2}', processes=2)
    same_course(whole, tmp_path)


@pytest.mark.slow
def test_experts_split_on_a_shared_batch(tmp_path):
    run(tmp_path, script=SCRIPT.with_name("split_experts.py"), processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed(whole, tmp_path, monkeypatch, stage):
    """ZeRO, from DeepSpeed's own configuration: the same losses, and the published layout at the end."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = json.loads((RECIPES / "super_zero3.json").read_text())
    config["zero_optimization"]["stage"] = stage
    run(tmp_path, "--steps", "50", "--batch", "2", "--deepspeed", json.dumps(config), processes=2)
    same_course(whole, tmp_path)
