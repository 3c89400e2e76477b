"""The router's correction bias: counted loads, the sign rule, and what it does to a router that collapses."""

import pytest
import torch
from nemotron_super.training.load_balancing import RouterBiasCallback, RouterLoads, update_correction_bias
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
        return 1000

    def __getitem__(self, index):
        ids = torch.randint(0, 61, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def balance(make_model, tmp_path, callbacks):
    """Train a router that begins by sending everything to experts 0 and 1; return the violation at the end."""
    model = make(make_model)
    with torch.no_grad():
        bias = model.model.layers[1].mixer.gate.e_score_correction_bias
        bias.zero_()
        bias[:2] = 0.2
        model.model.layers[1].mixer.gate.weight.mul_(0.1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, per_device_train_batch_size=4, learning_rate=1e-4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks).train()
    loads = RouterLoads(model)
    with torch.no_grad():
        model(torch.stack([Rows()[i]["input_ids"] for i in range(64)]), use_cache=False)
    return loads.maximum_violation()["model.layers.1.mixer.gate"]


def test_a_collapsed_router_recovers(make_model, tmp_path):
    assert balance(make_model, tmp_path / "without", []) > 1.5
    assert balance(make_model, tmp_path / "with", [RouterBiasCallback(rate=5e-3)]) < 0.7
