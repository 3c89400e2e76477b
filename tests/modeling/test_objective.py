"""The combined loss and its gradients against a plain computation: one document at a time, whole logits, no packing.

Float32, so a thousandth of a percent is what there is; random lengths put boundaries everywhere.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.kernels_hub.registry import linear_cross_entropy
from nemotron_super.modeling import objective

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("ME*", scale=2.0, **MTP).train()


def pack(lengths, seed):
    """One row of documents end to end: ids, labels with some masked, and document ids, each (1, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (1, sum(lengths)), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    return ids, labels, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)


def plain_terms(model, ids, labels, lengths):
    """Sums of next-token and of each depth's MTP cross entropies, every document by itself, from whole logits."""
    sums = [torch.zeros(()) for _ in range(1 + model.config.mtp_num_depths)]
    for tokens, wanted in zip(ids[0].split(lengths), labels[0].split(lengths), strict=True):
        out = model(tokens.unsqueeze(0), output_logits=True, output_mtp_logits=True, use_cache=False)
        for step, logits in enumerate((out.logits, *out.mtp_logits), start=1):
            if len(tokens) > step:
                sums[step - 1] = sums[step - 1] + F.cross_entropy(
                    logits[0, :-step], wanted[step:], ignore_index=-100, reduction="sum"
                )
    return sums


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 21), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_packed_and_chunked_against_plain(model, relative, lengths, seed):
    ids, labels, seq_idx = pack(lengths, seed)
    names, parameters = zip(*model.named_parameters(), strict=True)
    items = 17
    found = model(ids, labels=labels, seq_idx=seq_idx, num_items_in_batch=items, use_cache=False)
    assert found.logits is None
    next_token, *ahead = plain_terms(model, ids, labels, lengths)
    expected = (next_token + 0.3 * sum(ahead) / len(ahead)) / items
    if not expected.requires_grad:  # no document has a target
        assert found.loss == 0
        return
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    a = torch.autograd.grad(found.loss, parameters, allow_unused=True, materialize_grads=True)
    b = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    everything = torch.cat([t.flatten() for t in b]).norm()
    for name, one, other in zip(names, a, b, strict=True):
        # A parameter that hardly matters is measured against the whole gradient.
        assert (one - other).norm() <= 1e-5 * max(other.norm(), 1e-2 * everything), name
    assert relative(torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b])) < 1e-5


def test_accumulation_and_packing_do_not_change_the_loss(model):
    """Documents in one packed row, in several rows, or one by one: with the global count the losses add up alike."""
    lengths = [7, 3, 12]
    ids, labels, seq_idx = pack(lengths, 0)
    items = 19
    packed = model(ids, labels=labels, seq_idx=seq_idx, num_items_in_batch=items, use_cache=False)
    single = [
        model(a.unsqueeze(0), labels=b.unsqueeze(0), num_items_in_batch=torch.tensor(items), use_cache=False)
        for a, b in zip(ids[0].split(lengths), labels[0].split(lengths), strict=True)
    ]
    for name in ("loss", "lm_loss", "mtp_loss"):
        torch.testing.assert_close(packed[name], sum(out[name] for out in single), rtol=1e-5, atol=1e-6)


def test_logits_are_there_unless_training_on_labels(model):
    ids, labels, _ = pack([9], 0)
    assert model(ids, use_cache=False).logits.shape == (1, 9, 61)
    silent = model(ids, labels=labels, use_cache=False)
    asked = model(ids, labels=labels, output_logits=True, use_cache=False)
    assert silent.logits is None and asked.logits.shape == (1, 9, 61)
    torch.testing.assert_close(silent.loss, asked.loss)
    model.eval()
    try:
        evaluated = model(ids, labels=labels, use_cache=False)
        assert evaluated.logits.shape == (1, 9, 61)
        without = model(ids, labels=labels, output_logits=False, use_cache=False)
        assert without.logits is None
        torch.testing.assert_close(without.loss, evaluated.loss)
    finally:
        model.train()


@pytest.mark.parametrize("items", [None, 19])
def test_nothing_is_left_to_scale_the_gradient_of_the_head_by(model, monkeypatch, items):
    factors = []

    def watched(*args):
        loss, losses = linear_cross_entropy(*args)
        loss.register_hook(lambda grad: factors.append(grad.item()))
        return loss, losses

    monkeypatch.setattr(objective, "linear_cross_entropy", watched)
    ids, labels, _ = pack([12], 0)
    model(ids, labels=labels, num_items_in_batch=items, use_cache=False).loss.backward()
    model.zero_grad()
    assert factors == [1.0]


def test_loss_weights(model):
    """A weighted sum, over the sum of the weights, or over `num_items_in_batch` where it is given."""
    lengths = [8, 5]
    ids, labels, seq_idx = pack(lengths, 1)
    weights = torch.tensor([[2.0] * 8 + [0.5] * 5])
    documents = [
        plain_terms(model, a.unsqueeze(0), b.unsqueeze(0), [len(b)])
        for a, b in zip(ids[0].split(lengths), labels[0].split(lengths), strict=True)
    ]
    counts = [sum(b[1:] != -100) for b in labels[0].split(lengths)]
    total = 2.0 * documents[0][0] + 0.5 * documents[1][0]
    out = model(ids, labels=labels, seq_idx=seq_idx, loss_weights=weights, use_cache=False)
    torch.testing.assert_close(out.lm_loss, total / (2.0 * counts[0] + 0.5 * counts[1]), rtol=1e-5, atol=1e-6)
    out = model(ids, labels=labels, seq_idx=seq_idx, loss_weights=weights, num_items_in_batch=4, use_cache=False)
    torch.testing.assert_close(out.lm_loss, total / 4, rtol=1e-5, atol=1e-6)
    ahead = [2.0 * a + 0.5 * b for a, b in zip(documents[0][1:], documents[1][1:], strict=True)]
    torch.testing.assert_close(out.mtp_loss, sum(ahead) / len(ahead) / 4, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`loss_weights` has shape \(1, 3\)"):
        model(ids, labels=labels, loss_weights=weights[:, :3])


class Doubled(torch.nn.Linear):
    """A head that is more than its weight, as adapters and quantised heads are."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_that_is_more_than_its_weight(model):
    """Its forward is what counts, on every path, and its weight gets the same gradient as from whole logits."""
    model = copy.deepcopy(model)
    head = Doubled(24, 61, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    ids, labels, _ = pack([15], 2)
    out = model(ids, labels=labels, use_cache=False)
    whole = model(ids, labels=labels, output_logits=True, output_mtp_logits=True, use_cache=False)
    torch.testing.assert_close(out.loss, whole.loss)
    a, b = (torch.autograd.grad(o.loss, head.weight)[0] for o in (out, whole))
    torch.testing.assert_close(a, b)


def test_a_hook_on_the_head_is_called(model):
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    ids, labels, _ = pack([6], 0)
    model(ids, labels=labels, use_cache=False)
    handle.remove()
    assert seen


def test_autocast(model):
    """Under autocast the head multiplies in bfloat16, as it would for whole logits, and gradients are float32."""
    ids, labels, _ = pack([20], 3)
    grads = []
    for asked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=labels, output_logits=asked, use_cache=False).loss
        grads.append((loss, *torch.autograd.grad(loss, [model.lm_head.weight, model.model.norm_f.weight])))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
