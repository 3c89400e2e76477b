"""The router's correction bias: counted loads, the sign rule, and what it does to a router that collapses."""

import pytest
import torch
from nemotron_super.training import load_balancing
from nemotron_super.training.load_balancing import (
    LoadStatistics,
    RouterBiasCallback,
    RouterLoads,
    layer_name,
    sequence_balance_loss,
    update_correction_bias,
)
from transformers import Trainer, TrainingArguments


def make(make_model):
    return make_model("ME", n_routed_experts=6, num_experts_per_tok=2).train()


def test_loads_are_counted_until_closed(make_model):
    model = make(make_model)
    router = model.model.layers[1].mixer.gate
    loads = RouterLoads(model)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model(ids, output_router_logits=True, use_cache=False)
    scores = out.router_logits[0].sigmoid() + router.e_score_correction_bias
    expected = torch.bincount(scores.topk(2).indices.flatten(), minlength=6)
    (count,) = loads.counts.values()
    assert count.tolist() == expected.tolist() and count.sum() == 2 * 18
    model(ids, use_cache=False)
    assert count.tolist() == (2 * expected).tolist()
    assert loads.maximum_violation()["model.layers.1.mixer.gate"] == pytest.approx(float(expected.max()) / 6 - 1)
    assert loads.dead_experts() == {"model.layers.1.mixer.gate": int((expected == 0).sum())}
    loads.close()
    model(ids, use_cache=False)
    assert count.tolist() == (2 * expected).tolist()
    loads.reset()
    assert count.sum() == 0


def test_the_sign_rule(make_model):
    model = make(make_model)
    loads = RouterLoads(model)
    router = model.model.layers[1].mixer.gate
    before = router.e_score_correction_bias.clone()
    loads.counts["model.layers.1.mixer.gate"] = torch.tensor([4, 0, 2, 2, 1, 3])
    update_correction_bias(loads, rate=0.01)
    change = router.e_score_correction_bias - before
    torch.testing.assert_close(change, 0.01 * torch.tensor([-1.0, 1.0, 0.0, 0.0, 1.0, -1.0]), atol=1e-6, rtol=0)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2000

    def __getitem__(self, index):
        ids = torch.randint(0, 61, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def written_out(logits, index, rows, real):
    """The sequence-level loss, expert by expert and token by token."""
    experts, total = logits.shape[-1], 0.0
    logits, index = logits.view(rows, -1, experts), index.view(rows, -1, index.shape[-1])
    for row in range(rows):
        tokens = [t for t in range(logits.shape[1]) if real[row, t]]
        for expert in range(experts):
            chosen = sum(int((index[row, t] == expert).sum()) for t in tokens)
            share = sum(logits[row, t].sigmoid()[expert] / logits[row, t].sigmoid().sum() for t in tokens)
            total = total + experts / (index.shape[-1] * len(tokens)) * chosen * share / len(tokens)
    return total / rows


@pytest.mark.parametrize("padded", [False, True])
def test_sequence_balance_loss(padded):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3 * 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    index = logits.topk(2).indices
    real = torch.ones(3, 5, dtype=torch.bool)
    if padded:
        real[0, 3:], real[2, 1:] = False, False
    found = sequence_balance_loss(logits, index, 3, real if padded else None)
    expected = written_out(logits, index, 3, real)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))
    even = sequence_balance_loss(torch.zeros(6, 6), torch.arange(6).unsqueeze(1), 2)
    torch.testing.assert_close(even, torch.tensor(1.0))


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_the_balance_loss_adds_its_gradient(make_model, checkpointing):
    """The router's gradient is that of the loss plus the balance loss, padding left out, with checkpointing as well."""
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    router = (model := make(make_model)).model.layers[1].mixer.gate
    seen = []
    hook = router.register_forward_hook(lambda module, args, output: seen.append(output))
    loss = model(**inputs, use_cache=False).loss
    logits, _, index = seen[-1]
    hook.remove()
    balance_loss = 0.7 * sequence_balance_loss(logits, index, 2, mask.bool())
    (expected,) = torch.autograd.grad(loss + 0.5 * balance_loss, router.weight)

    loads = RouterLoads(model, coefficient=0.7, training_only=True)
    loads.gradient_scale = 0.5
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    # Embeddings that ask for a gradient keep reentrant checkpoints in the graph.
    found = model(**inputs, use_cache=False).loss
    found.backward()
    torch.testing.assert_close(found, loss, msg="the value of the loss stays what it was")
    torch.testing.assert_close(router.weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert loads.take_balance_loss() == pytest.approx(float(balance_loss.detach()), rel=1e-5)
    assert loads.take_balance_loss() == 0.0
    model.eval()(ids, use_cache=False)
    assert loads.take_balance_loss() == 0.0, "no balance loss outside training"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(make_model, side):
    model = make(make_model)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    loads = RouterLoads(model)
    model(ids, attention_mask=mask, use_cache=False)
    (count,) = loads.counts.values()
    padded = count.clone()
    loads.reset()
    real = ids[0, 4:] if side == "left" else ids[0, :5]
    model(real.unsqueeze(0), use_cache=False)
    model(ids[1:], use_cache=False)
    assert padded.tolist() == count.tolist() and count.sum() == 2 * 14


def test_one_collective_whatever_the_routers_saw(make_model, monkeypatch):
    """All routers' counts go over the ranks together, those that saw no token on this rank too."""
    model = make_model("MEE", n_routed_experts=6, num_experts_per_tok=2)
    loads = RouterLoads(model)
    name = "model.layers.1.mixer.gate"
    loads.counts[name] += torch.tensor([4, 0, 2, 2, 1, 3])
    reduced = []

    def all_reduce(tensor):
        reduced.append(tensor.clone())
        tensor += torch.arange(12)  # what another rank counted

    monkeypatch.setattr(load_balancing.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(load_balancing.dist, "all_reduce", all_reduce)
    update_correction_bias(loads, 0.0)
    (sent,) = reduced
    assert sent.tolist() == [4, 0, 2, 2, 1, 3, 0, 0, 0, 0, 0, 0]
    assert loads.counts[name].tolist() == [4, 1, 4, 5, 5, 8]
    assert loads.counts["model.layers.2.mixer.gate"].tolist() == [6, 7, 8, 9, 10, 11]


def test_statistics():
    even = LoadStatistics.of(torch.tensor([5, 5, 5, 5]))
    assert (even.maximum_violation, even.entropy, even.dead_experts) == pytest.approx((0, 1, 0))
    one = LoadStatistics.of(torch.tensor([12, 0, 0, 0]))
    assert (one.maximum_violation, one.entropy, one.dead_experts) == pytest.approx((3, 0, 3))
    two = LoadStatistics.of(torch.tensor([6, 6, 0, 0]))
    assert (two.maximum_violation, two.entropy, two.dead_experts) == pytest.approx((1, 0.5, 2))


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "_orig_mod."])
def test_layer_names(prefix):
    assert layer_name(prefix + "model.layers.13.mixer.gate") == "layers.13"
    assert layer_name(prefix + "mtp.layers.1.mixer.gate") == "mtp.layers.1"


def violation_at_the_end(make_model, tmp_path, callbacks):
    """Train a router that begins by sending everything to two of its experts; the violation at the end."""
    torch.manual_seed(0)
    model = make_model("E", n_routed_experts=8, num_experts_per_tok=2).train()
    router = model.model.layers[0].mixer.gate
    with torch.no_grad():
        router.e_score_correction_bias.zero_()
        router.e_score_correction_bias[:2] = 0.3
        router.weight.mul_(0.1)
    loads = RouterLoads(model)

    def violation():
        loads.reset()
        with torch.no_grad():
            model(torch.stack([Rows()[i]["input_ids"] for i in range(64)]), use_cache=False)
        return loads.maximum_violation()["model.layers.0.mixer.gate"]

    assert violation() == 3.0, "two of eight experts get every token"
    arguments = TrainingArguments(
        str(tmp_path), max_steps=500, per_device_train_batch_size=2, learning_rate=1e-4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=1, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks).train()
    return violation()


def test_a_collapsed_router_recovers(make_model, tmp_path):
    """At the release's rate and within 500 steps; without the update it stays collapsed."""
    assert violation_at_the_end(make_model, tmp_path / "without", []) > 2.5
    assert violation_at_the_end(make_model, tmp_path / "with", [RouterBiasCallback(1e-3, 1e-4)]) < 1.2
