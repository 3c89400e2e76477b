"""The commands from file to report, on a model small enough to take a second."""

import json
from dataclasses import fields
from pathlib import Path

import nemotron_super
import pytest
import torch
import yaml
from nemotron_super import NemotronHForCausalLM, preset
from nemotron_super.cli import main
from nemotron_super.training.lora import load_lora
from nemotron_super.training.run import _processes, run
from nemotron_super.training.run_config import (
    ConfigError,
    LoraRunConfig,
    PretrainConfig,
    RunConfig,
    SftConfig,
    describe,
)
from nemotron_super.training.trainer import NemotronTrainer
from safetensors.torch import load_file
from transformers import AutoTokenizer

ROOT = Path(nemotron_super.__file__).parent
RECIPES = ROOT / "training" / "recipes"
KINDS = {"pretrain": PretrainConfig, "sft": SftConfig, "lora": LoraRunConfig}
MINIMAL = {"model": "m", "output": "o", "data": "d"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, texts and conversations."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    config = preset(
        "tiny", hidden_size=32, hybrid_override_pattern="ME*", num_attention_heads=4, head_dim=8, mamba_num_heads=4,
        mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=16, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, moe_latent_size=16,
    )  # fmt: skip
    NemotronHForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "model_card" / "nemotron-h-tiny").save_pretrained(folder / "model")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + {n}?"},
                {"role": "assistant", "content": str(2 * n)},
            ]
        }
        for n in range(60)
    ]
    texts = [{"text": f"def add_{n}(x):\n    return x + {n}\n"} for n in range(60)]
    for name, lines in (("chats", chats), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(place, output, data="chats", **options):
    return {
        "model": str(place / "model"), "output": str(output), "data": str(place / f"{data}.jsonl"), "length": 96, "steps": 8,
        "rows_per_step": 4, "rows_per_device": 2, "learning_rate": 1e-2, "warmup_steps": 2, "log_every": 1,
        "trainer": {"use_cpu": True, "disable_tqdm": True}, **options,
    }  # fmt: skip


def command(kind, content, folder):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    main([kind, "--config", str(folder / "run.yaml")])


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_from_file_to_report(place, tmp_path, kind):
    data = "texts" if kind == "pretrain" else "chats"
    content = settings(place, tmp_path / "out", data, heldout=str(place / f"{data}.jsonl"))
    command(kind, content, tmp_path)
    out = tmp_path / "out"
    written = {path.name for path in out.iterdir()}
    assert {"REPORT.md", "run.json", "log.json", "loss.png", "expert_load.png", "model.safetensors"} <= written
    assert not list(out.rglob("*.bin")) and ("adapter" in written) == (kind == "lora")
    log = [entry for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]
    assert [entry["step"] for entry in log] == list(range(1, 9)) and log[-1]["loss"] < log[0]["loss"]
    report = (out / "REPORT.md").read_text()
    assert "| held out | before | after |" in report and "![loss](loss.png)" in report
    assert all(f"| {one.name} |" in report for one in fields(KINDS[kind]))
    model = NemotronHForCausalLM.from_pretrained(out)
    assert "backbone.layers.1.mixer.experts.7.up_proj.weight" in load_file(out / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("def add", return_tensors="pt").input_ids
    logits = model(ids).logits
    assert not torch.equal(logits, NemotronHForCausalLM.from_pretrained(place / "model")(ids).logits)
    if kind == "lora":
        adapted = load_lora(NemotronHForCausalLM.from_pretrained(place / "model"), out / "adapter").eval()
        torch.testing.assert_close(adapted(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_the_learning_rate(place, tmp_path):
    """Warm-up, plateau, and a decay by 1 - sqrt to the share asked for."""
    content = settings(place, tmp_path, steps=10, warmup_steps=2, decay_share=0.4, minimum_rate_share=0.1)
    run(SftConfig.of(content))
    log = [entry for entry in json.loads((tmp_path / "log.json").read_text()) if "loss" in entry]
    decay = [1 - 0.9 * (step / 4) ** 0.5 for step in range(4)]
    assert [entry["learning_rate"] / 1e-2 for entry in log] == pytest.approx([0.1, 0.55, 1, 1, 1, 1, *decay])


@pytest.mark.parametrize("stream", [True, False])
def test_stopped_and_continued(place, tmp_path, monkeypatch, stream):
    """A run that ends early goes on from its last checkpoint, in the middle of the data, to the same weights."""
    content = settings(place, tmp_path / "whole", "texts", stream=stream, save_every=3)
    run(PretrainConfig.of(content))
    broken = PretrainConfig.of({**content, "output": str(tmp_path / "broken")})
    step = NemotronTrainer.training_step

    def fail(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NemotronTrainer, "training_step", fail)
        run(broken)
    assert run(broken)["resumed_from"] == "checkpoint-3"
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert not [name for name in a if not a[name].equal(b[name])]

    with pytest.raises(ConfigError, match=r"other settings: learning_rate was 0\.01, is 0\.5"):
        run(PretrainConfig.of({**content, "output": str(tmp_path / "broken"), "learning_rate": 0.5}))
    state = json.loads((tmp_path / "broken" / "run.json").read_text())
    (tmp_path / "broken" / "run.json").write_text(json.dumps({**state, "world_size": 8}))
    with pytest.raises(ConfigError, match="world_size was 8, is 1"):
        run(broken)


def test_a_full_disk_at_the_end(place, tmp_path, monkeypatch):
    """The trained weights are in the last checkpoint: with room made, the same command saves them."""
    content = settings(place, tmp_path / "out", save_every=5)

    save = NemotronTrainer.save_model

    def full(self, folder, _internal_call=False):
        if not _internal_call:  # not a checkpoint's, but the trained model's
            raise OSError(28, "No space left on device")
        save(self, folder, _internal_call)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"No space left.*checkpoint-8 holds it"):
        patch.setattr(NemotronTrainer, "save_model", full)
        command("sft", content, tmp_path)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    command("sft", content, tmp_path)
    run(SftConfig.of({**content, "output": str(tmp_path / "other")}))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert not [name for name in a if not a[name].equal(b[name])]


def test_a_new_model_has_the_pretraining_initialisation(place, tmp_path, monkeypatch):
    """N(0, 0.014), output projections smaller by the square root of the layers; bfloat16 but for the small parameters."""
    seen = {}

    def train(self, *args, **kwargs):
        seen["model"] = self.model
        raise KeyboardInterrupt

    monkeypatch.setattr(NemotronTrainer, "train", train)
    content = settings(place, tmp_path, "texts", model="preset:tiny", tokenizer=str(place / "model"), dtype="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        run(PretrainConfig.of({**content, "mtp_scale": 0.1, "mtp_depths": 1}))
    model = seen["model"]
    mixer = model.model.layers[0].mixer
    assert float(mixer.in_proj.weight.detach().float().std()) == pytest.approx(0.014, rel=0.05)
    assert float(mixer.out_proj.weight.detach().float().std()) == pytest.approx(0.014 / 4, rel=0.05)  # 16 layers
    assert mixer.in_proj.weight.dtype == torch.bfloat16 and mixer.A_log.dtype == torch.float32
    assert (model.config.mtp_loss_scaling_factor, model.config.mtp_num_depths) == (0.1, 1)


def test_two_stages(place, tmp_path):
    run(SftConfig.of(settings(place, tmp_path / "one", steps=2)))
    second = settings(place, tmp_path / "two", steps=2, loss_over="conversations", model=str(tmp_path / "one"))
    assert run(SftConfig.of(second))["steps"] == 2
    # Without held-out data the report shows the load of the last steps.
    assert "![expert load](expert_load.png)" in (tmp_path / "two" / "REPORT.md").read_text()
    assert (tmp_path / "two" / "expert_load.png").stat().st_size > 5000


def test_steps_are_counted_from_the_data(place, tmp_path):
    content = settings(place, tmp_path, epochs=2)
    del content["steps"]
    summary = run(SftConfig.of(content))
    assert summary["steps"] == -(-2 * summary["rows"] // 4)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes(recipe):
    size, kind = recipe.stem.split("_")
    config = KINDS[kind].load(recipe)
    assert config.rows_per_step % config.rows_per_device == 0
    assert bool(config.trainer.get("fsdp")) == bool(config.trainer.get("bf16")) == (size == "super")
    assert config.dtype == "float32", "FSDP shards parameters of one dtype"
    if size == "super":
        sft = SftConfig.load(RECIPES / "super_sft.yaml")
        assert config.trainer == sft.trainer, "what runs in test_trainer.py"
        assert config.rows_per_device * config.length <= 16384, "what fits: super_on_64_gpus.md"


def test_there_is_a_recipe_for_every_command_and_size():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {f"{s}_{k}" for s in ("tiny", "super") for k in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_help_documents_every_key(kind, capsys):
    with pytest.raises(SystemExit) as ended:
        main([kind, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {one.name} (" in shown and one.metadata["help"] in shown for one in fields(KINDS[kind]))
    assert "model (required)" in describe(KINDS[kind])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**MINIMAL, "learning_rte": 1}, "unknown key 'learning_rte' \\(did you mean 'learning_rate'\\?\\)"),
        ({**MINIMAL, "rank": 4}, "unknown key 'rank'"),
        ({"model": "m", "output": "o"}, "key 'data' is missing \\(what to train on"),
        ({**MINIMAL, "steps": 2.5}, "key 'steps' is 2.5, expected a whole number"),
        ({**MINIMAL, "steps": True}, "key 'steps' is True, expected a whole number"),
        ({**MINIMAL, "learning_rate": "fast"}, "key 'learning_rate' is 'fast', expected a number"),
        ({**MINIMAL, "too_long": "cut"}, "key 'too_long' is 'cut', expected one of 'error', 'split'"),
        ({**MINIMAL, "model": None}, "key 'model' is None, expected text"),
        ({**MINIMAL, "trainer": 3}, "key 'trainer' is 3, expected keys"),
        ({**MINIMAL, "rows_per_step": 0}, "key 'rows_per_step' is 0, expected at least 1"),
        ({**MINIMAL, "decay_share": 2}, "key 'decay_share' is 2.0, expected a share"),
        ({**MINIMAL, "stream": True}, "with `stream` the number of rows is not known: give `steps`"),
    ],
)
def test_bad_keys(content, message):
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.of(content)


def test_every_fault_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        RunConfig.of({"modle": "m", "output": 3})
    assert all(
        name in str(error.value) for name in ("'modle'", "'model' is missing", "'output' is 3", "'data' is missing")
    )


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        SftConfig.load(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected keys with values, found list"):
        SftConfig.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        SftConfig.load(tmp_path / "broken.yaml")


def test_numbers_without_a_dot():
    """YAML takes 1e-5 for text."""
    assert SftConfig.of({**MINIMAL, **yaml.safe_load("learning_rate: 1e-5")}).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"bf17": True}}, "`trainer` has keys that TrainingArguments does not know: bf17"),
        ({"trainer": {"weight_decay": 1.0}}, "`trainer` sets what keys of their own say: weight_decay"),
        ({"dtype": "bfloat16", "trainer": {"fsdp": True}}, "`dtype` is bfloat16 with FSDP"),
        (
            {"dtype": "bfloat16", "trainer": {"deepspeed": {"a": 1}, "fsdp": True}},
            "Several keys shard the model: fsdp",
        ),
        ({"dtype": "bfloat16", "distributed": {"fsdp_size": 2}}, "`dtype` is bfloat16 with distributed"),
        ({"distributed": {"esize": 2}}, "`distributed` has keys that DistributedConfig does not know: esize"),
        (
            {"distributed": {"ep_size": 2}, "save_every": 5},
            "`save_every` with `distributed`: transformers cannot resume",
        ),
        ({"distributed": {"ep_size": 2}, "model": "preset:tiny"}, "`distributed` shards a model as it is loaded"),
        ({"trainer": {"gradient_accumulation_steps": 2}}, "keys of their own say: gradient_accumulation_steps"),
        ({"rows_per_step": 3}, "`rows_per_step` is 3: it must be a multiple of the 2 rows"),
        ({"model": "preset:tiny"}, "`model` is preset:tiny, which has no tokenizer"),
        ({"data": "nowhere.jsonl"}, "no such file"),
    ],
)
def test_faults_end_the_command_with_one_line(place, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message) as ended:
        command("sft", settings(place, tmp_path / "out", **options), tmp_path)
    assert str(ended.value).startswith("nemotron-super sft: ") and "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"fsdp": True}}, "`merge` needs whole weights, and FSDP shards them"),
        ({"distributed": {"fsdp_size": 2}, "merge": False}, "shards experts before adapters could be put on them"),
    ],
)
def test_adapters_and_sharding(place, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(LoraRunConfig.of(settings(place, tmp_path, **options)))


def test_distributed_is_asked_of_transformers(place, tmp_path, monkeypatch):
    """The keys reach `from_pretrained`; processes that share their rows count once."""
    seen = {}

    def load(folder, dtype, distributed_config):
        seen.update(distributed_config.to_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(NemotronHForCausalLM, "from_pretrained", load)
    sizes = {"tp_size": 2, "fsdp_size": 4, "ep_size": 8}
    config = SftConfig.of(settings(place, tmp_path, distributed=sizes))
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "8")
        assert _processes(config) == 4
    with pytest.raises(KeyboardInterrupt):
        run(SftConfig.of(settings(place, tmp_path, distributed={"fsdp_size": 4, "ep_size": 4})))
    assert (seen["fsdp_size"], seen["ep_size"]) == (4, 4)


def test_a_folder_that_is_not_ours(place, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    with pytest.raises(ConfigError, match=r"holds checkpoints but no run\.json"):
        run(SftConfig.of(settings(place, tmp_path)))


def test_lora_leaves_the_correction_bias():
    with pytest.raises(ConfigError, match="must be 0: an adapter does not store"):
        LoraRunConfig.of({**MINIMAL, "router_bias_rate": 1e-3})
