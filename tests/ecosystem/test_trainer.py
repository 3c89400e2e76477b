"""transformers' `Trainer`: checkpointing, autocast, accumulation, packing, padding, saving, resuming and evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from nemotron_super.modeling.latent_moe import NemotronHTopkRouter
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import load_sharded_checkpoint

CHECKPOINTING = {
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


def rows(count: int, first: int = 0) -> list[dict[str, list[int]]]:
    """Arithmetic progressions of token ids, 6 to 12 long: easy to learn, every length different from its neighbours."""
    return [
        {"input_ids": [5 + (7 * row + 3 * position) % 40 for position in range(6 + 5 * row % 7)]}
        for row in range(first, first + count)
    ]


class Recorder(Trainer):
    """Keeps the parts of every training loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts: list[tuple[float, float, float]] = []

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if outputs.mtp_loss is not None:
            self.parts.append(tuple(float(t.detach()) for t in (outputs.loss, outputs.lm_loss, outputs.mtp_loss)))
        return (loss, outputs) if return_outputs else loss


@pytest.fixture
def pad(tokenizer):
    """transformers' collator for language models, padding on the right."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


@pytest.fixture
def make_trainer(tiny_model, pad, tmp_path):
    """`make_trainer(model=None, collator=None, data=None, **training_arguments)`; pads by default."""

    def make(model=None, collator=None, data=None, **arguments) -> Recorder:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return Recorder(
            model=tiny_model() if model is None else model,
            args=TrainingArguments(**{**defaults, **arguments}),
            train_dataset=rows(24) if data is None else data,
            eval_dataset=rows(10, first=100),
            data_collator=pad if collator is None else collator,
        )

    return make


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def plain_losses(make_trainer):
    """Losses of ten ordinary steps."""
    trainer = make_trainer()
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        (CHECKPOINTING["reentrant"], 1e-5),
        (CHECKPOINTING["non-reentrant"], 1e-5),
        ({"bf16": True}, 0.03),
        ({"bf16": True, **CHECKPOINTING["reentrant"]}, 0.03),
        ({"bf16": True, **CHECKPOINTING["non-reentrant"]}, 0.03),
    ],
    ids=["reentrant", "non-reentrant", "bf16", "bf16-reentrant", "bf16-non-reentrant"],
)
def test_training(make_trainer, plain_losses, arguments, tolerance):
    """The loss falls, and checkpointing and autocast take the same way down as an ordinary run."""
    trainer = make_trainer(**arguments)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.7 * found[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain_losses), rtol=tolerance, atol=tolerance)
    biases = [m.e_score_correction_bias for m in trainer.model.modules() if isinstance(m, NemotronHTopkRouter)]
    assert len(biases) == 2 and all(bias.dtype == torch.float32 for bias in biases)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inputs", ["whole", "padded", "packed"])
def test_checkpointing_gradients(tiny_model, ids, reentrant, inputs):
    """Gradients with checkpointing are those without, in the backbone and in the MTP layers."""
    labels = ids.clone()
    extra = {}
    if inputs == "padded":
        extra["attention_mask"] = torch.ones_like(ids)
        extra["attention_mask"][0, :3] = 0
        labels[0, :3] = -100
    elif inputs == "packed":
        extra["seq_idx"] = (torch.arange(ids.shape[1]) > 4).int().expand_as(ids)

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            assert model.model.layers[0].gradient_checkpointing and model.mtp.layers[0].gradient_checkpointing
        output = model(ids, labels=labels, **extra)
        assert output.mtp_loss is not None
        assert not (checkpointing and output.cache is not None)
        output.loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected, found = gradients(False), gradients(True)
    assert all(grad.any() for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6)


def test_loss_parts(make_trainer, model):
    """`lm_loss` and `mtp_loss` are on the outputs, and make up the loss."""
    trainer = make_trainer(max_steps=2)
    trainer.train()
    assert len(trainer.parts) == 2
    scale = model.config.mtp_loss_scaling_factor
    for (loss, lm, mtp), logged in zip(trainer.parts, losses(trainer), strict=True):
        assert mtp > 1
        assert loss == pytest.approx(lm + scale * mtp, rel=1e-6)
        assert logged == pytest.approx(loss, rel=1e-6)


def test_without_mtp(make_trainer, tiny_model):
    trainer = make_trainer(tiny_model(num_nextn_predict_layers=0))
    trainer.train()
    assert trainer.parts == []
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]


@pytest.mark.parametrize("rows_per_batch", [4, 2, 1])
def test_gradient_accumulation(make_trainer, rows_per_batch):
    """Rows of different lengths, in one batch or in several: the same loss, its two parts included, and same weights."""
    steps = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    whole = make_trainer(per_device_train_batch_size=8, **steps)
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.train()
    pieces = make_trainer(
        per_device_train_batch_size=rows_per_batch, gradient_accumulation_steps=8 // rows_per_batch, **steps
    )
    pieces.train()
    assert len(pieces.parts) == 8 // rows_per_batch
    summed = [sum(part) for part in zip(*pieces.parts, strict=True)]
    assert summed == pytest.approx(list(whole.parts[0]), abs=1e-5)
    assert losses(pieces) == pytest.approx(losses(whole), abs=1e-5)
    expected = dict(whole.model.named_parameters())
    for name, p in pieces.model.named_parameters():
        assert not p.equal(start[name]), name
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True},
        {"return_position_ids": False, "return_seq_idx": True},
    ],
    ids=["position_ids", "seq_idx", "cu_seq_lens", "seq_idx-only"],
)
def test_flattening_collator(make_trainer, plain_losses, options):
    """Rows packed end to end train exactly as rows padded side by side, MTP targets included."""
    trainer = make_trainer(collator=DataCollatorWithFlattening(**options))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] > 24
    trainer.train()
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(plain_losses), rtol=1e-4, atol=1e-4)


def test_more_padding(make_trainer, plain_losses, pad):
    """Longer padding than needed makes no difference."""

    def pad_more(features):
        batch = pad(features)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {key: torch.nn.functional.pad(value, (0, 5), value=fills[key]) for key, value in batch.items()}

    trainer = make_trainer(collator=pad_more)
    trainer.train()
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(plain_losses), rtol=1e-4, atol=1e-4)


def test_save_and_resume(make_trainer, tiny_model, tmp_path):
    """A run cut in the middle and resumed ends with the weights of a run without a break, bit for bit."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(**options)
    whole.train()
    saved = tmp_path / "run" / "checkpoint-3"
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = set(file.keys())
        dtypes = {file.get_tensor(name).dtype for name in names if name.endswith("e_score_correction_bias")}
    assert {"backbone.layers.1.mixer.experts.7.up_proj.weight", "mtp.layers.0.eh_proj.weight"} <= names
    assert dtypes == {torch.float32}

    resumed = make_trainer(tiny_model(seed=9), **options)  # other weights, which the checkpoint must replace
    resumed.train(resume_from_checkpoint=str(saved))
    assert resumed.state.global_step == 6
    assert losses(resumed) == losses(whole)
    expected = whole.model.state_dict()
    found = resumed.model.state_dict()
    assert not [name for name in expected if not found[name].equal(expected[name])]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6").state_dict()
    assert not [name for name in expected if not again[name].equal(expected[name])]


def test_best_model_is_loaded_at_the_end(make_trainer, tmp_path):
    """`load_best_model_at_end` puts back the weights that it saved, not those of the last step."""
    trainer = make_trainer(
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, so that the best is not the last
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    expected = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    found = trainer.model.state_dict()
    assert not [name for name in expected if not found[name].equal(expected[name])]


def test_load_state_dict_takes_published_names(model, tiny_model, tmp_path, ids):
    """What `save_pretrained` wrote, whole or in shards that split a layer's experts, fits `load_state_dict`."""
    expected = model.state_dict()
    model.save_pretrained(tmp_path / "whole")
    published = load_file(tmp_path / "whole" / "model.safetensors")
    assert not published.keys() & {name for name in expected if name.startswith("model.")}
    again = tiny_model(seed=9)
    found = again.load_state_dict(published)  # strict
    assert not found.missing_keys and not found.unexpected_keys
    assert not [name for name, tensor in again.state_dict().items() if not tensor.equal(expected[name])]

    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 4
    again = tiny_model(seed=9)
    load_sharded_checkpoint(again, tmp_path / "shards", strict=False)
    assert not [name for name, tensor in again.state_dict().items() if not tensor.equal(expected[name])]

    lost = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    found = tiny_model(seed=9).load_state_dict(
        {name: t for name, t in published.items() if name != lost}, strict=False
    )
    assert found.missing_keys == [lost.replace("backbone", "model")] and not found.unexpected_keys
    with pytest.raises(RuntimeError, match=r"experts\.3\.up_proj\.weight has shape \(2, 2\), expected \(24, 16\)"):
        tiny_model().load_state_dict({**published, lost: torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.8\.up_proj"):
        tiny_model().load_state_dict({**published, lost.replace("experts.3", "experts.8"): torch.zeros(24, 16)})
    backbone = tiny_model(seed=9).model
    model.model.save_pretrained(tmp_path / "backbone")
    backbone.load_state_dict(load_file(tmp_path / "backbone" / "model.safetensors"))
    with torch.no_grad():
        assert backbone(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)


@pytest.mark.parametrize("arguments", [{"bf16": True}, {"bf16_full_eval": True}], ids=lambda a: next(iter(a)))
def test_router_bias_stays_float32(make_trainer, tiny_model, tmp_path, arguments):
    """A bfloat16 model keeps the bias in float32 while training, evaluating and saving; no cast reaches it."""
    tiny_model().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    router = model.model.layers[1].mixer.gate
    bias = torch.linspace(0.1234567, 0.7654321, router.num_experts)
    router.e_score_correction_bias.copy_(bias)
    trainer = make_trainer(model, max_steps=2, **arguments)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "end"))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert router.e_score_correction_bias.dtype == torch.float32 and router.e_score_correction_bias.equal(bias)
    with safe_open(tmp_path / "end" / "model.safetensors", "pt") as file:
        assert file.get_tensor("backbone.layers.1.mixer.gate.e_score_correction_bias").equal(bias)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_the_router_bias(model, cast):
    router = model.model.layers[1].mixer.gate
    bias = torch.linspace(0.1234567, 0.7654321, router.num_experts)
    router.e_score_correction_bias.copy_(bias)
    assert model.to(cast) is model
    assert router.weight.dtype == cast
    assert router.e_score_correction_bias.dtype == torch.float32 and router.e_score_correction_bias.equal(bias)
    assert model.to("meta").model.layers[1].mixer.gate.e_score_correction_bias.is_meta
    assert router.to(cast).e_score_correction_bias.dtype == torch.float32
    assert router.double().e_score_correction_bias.dtype == torch.float64


def test_evaluation_loss(make_trainer, pad):
    """`eval_loss` is the next-token loss alone, and evaluation works before and after training."""
    trainer = make_trainer(max_steps=2, per_device_eval_batch_size=10)
    before = trainer.evaluate()["eval_loss"]
    batch = pad(rows(10, first=100))
    model = trainer.model.eval()
    with torch.no_grad():
        assert before == pytest.approx(float(model(**batch).loss), rel=1e-5)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert before == pytest.approx(float(by_hand), rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("router_logits", [True, False])
def test_predictions(make_trainer, tiny_model, use_cache, router_logits):
    """Logits of every row, from batches of different lengths and a smaller last one; caches are left out."""
    model = tiny_model(output_router_logits=router_logits, use_cache=use_cache)
    trainer = make_trainer(model)
    data = rows(10, first=100)
    found = trainer.predict(data)
    longest = max(len(row["input_ids"]) for row in data)
    logits = found.predictions
    if router_logits:
        logits, (chosen,) = found.predictions
        assert chosen.shape[1] == 8 and chosen.shape[0] >= sum(len(row["input_ids"]) for row in data)
    assert logits.shape == (10, longest, 272)
    assert found.label_ids.shape == (10, longest)
    with torch.no_grad():
        for row in (0, 9):  # a full batch's and the last one's
            tokens = torch.tensor([data[row]["input_ids"]])
            expected = model(tokens).logits[0]
            place = (torch.from_numpy(found.label_ids[row]) != -100).nonzero()[:, 0]
            torch.testing.assert_close(torch.from_numpy(logits[row])[place], expected, rtol=1e-4, atol=1e-4)


def test_predictions_with_mtp(make_trainer, pad):
    """Scalar parts of the loss and a tuple of MTP logits pass through the evaluation loop as well."""
    trainer = make_trainer(collator=lambda features: {**pad(features), "output_mtp_logits": True})
    found = trainer.predict(rows(10, first=100))
    logits, lm_loss, mtp_loss, mtp_logits = found.predictions
    assert logits.shape == mtp_logits[0].shape == mtp_logits[1].shape
    assert lm_loss.shape == mtp_loss.shape == (3,)
    assert found.metrics["test_loss"] == pytest.approx(((lm_loss + 0.3 * mtp_loss) * [4, 4, 2]).sum() / 10, rel=1e-5)


def test_output_router_logits(make_trainer, tiny_model, ids):
    """Router logits come one tensor per expert layer of the backbone, and training with them is unchanged."""
    model = tiny_model(output_router_logits=True)
    output = model(ids, labels=ids)
    assert [logits.shape for logits in output.router_logits] == [(ids.numel(), 8)]
    assert model(ids, output_router_logits=False).router_logits is None
    with_them, without = make_trainer(model, max_steps=3), make_trainer(max_steps=3)
    with_them.train()
    without.train()
    assert losses(with_them) == losses(without)
