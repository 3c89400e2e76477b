"""Padding and packing change nothing: every document's logits, loss and gradients are those it has alone."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.modeling import mamba2, token_layout
from nemotron_super.modeling.cache import HybridCache
from transformers import DataCollatorWithFlattening, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytestmark = pytest.mark.usefixtures("exact_floats")

TIGHT = 1e-9
MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


def random_documents(lengths, seed=0, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (1, length), generator=generator) for length in lengths]


def gradients(model):
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return grads


def alone(model, documents):
    """Logits of each document, the sum of all losses, and its gradients."""
    logits, total = [], 0.0
    for document in documents:
        out = model(document, labels=document, num_items_in_batch=1, output_logits=True, use_cache=False)
        out.loss.backward()
        total += out.loss.item()
        logits.append(out.logits.detach()[0])
    return logits, total, gradients(model)


def assert_same_gradients(found, expected, relative):
    for name, grad in found.items():
        assert relative(grad, expected[name]) < 1e-8, name


def pad(documents, length, kind, seed=0):
    """Rows of `length` with each document left, right or scattered; padding holds random tokens, labels -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (len(documents), length), generator=generator)
    mask = torch.zeros(len(documents), length, dtype=torch.long)
    for row, document in enumerate(documents):
        size = document.shape[1]
        if kind == "holes":
            places = torch.randperm(length, generator=generator)[:size].sort().values
        else:
            places = torch.arange(size) + (length - size if kind == "left" else 0)
        ids[row, places], mask[row, places] = document[0], 1
    return ids, mask


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=3),
    extra=st.integers(0, 7),
    kind=st.sampled_from(["left", "right", "holes"]),
    attn=st.sampled_from(["eager", "sdpa"]),
    grad=st.booleans(),
    segment=st.sampled_from([8, 512]),
)
def test_padding_leaves_logits_alone(lengths, extra, kind, attn, grad, segment, make_model, relative):
    model = make_model("ME*M-", exact=True, attn=attn)
    documents = random_documents(lengths)
    ids, mask = pad(documents, max(lengths) + extra, kind)
    with torch.set_grad_enabled(grad), mock.patch.dict(mamba2._SEGMENT_TOKENS, {"cpu": segment}):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        for row, document in enumerate(documents):
            assert relative(logits[row][mask[row].bool()], model(document, use_cache=False).logits[0]) < TIGHT


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_leaves_loss_and_gradients_alone(kind, attn, training, make_model, relative):
    model = make_model("ME*M-", exact=True, attn=attn, **MTP).train(training)
    documents = random_documents([13, 1, 20, 8])
    _, expected, expected_grads = alone(model, documents)
    ids, mask = pad(documents, 23, kind)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=1, use_cache=False).loss
    loss.backward()
    assert abs(loss.item() / expected - 1) < TIGHT
    assert_same_gradients(gradients(model), expected_grads, relative)


def test_the_tokens_in_the_padding_do_not_matter(make_model, relative):
    """With holes as well, where neighbours of padding could otherwise learn from it."""
    model = make_model("ME*M-", exact=True, **MTP).train()
    documents = random_documents([9, 14])
    ids, mask = pad(documents, 20, "holes")
    labels = ids.masked_fill(mask == 0, -100)
    other = torch.where(mask == 1, ids, (ids + 17) % 61)
    first, second = (
        model(i, attention_mask=mask, labels=labels, output_logits=True, use_cache=False) for i in (ids, other)
    )
    # Not to the bit: experts get other numbers of rows, for which a matrix product may round otherwise.
    assert relative(first.logits[mask.bool()], second.logits[mask.bool()]) < 1e-14
    assert first.lm_loss.item() == pytest.approx(second.lm_loss.item(), rel=1e-12)
    assert first.mtp_loss.item() == pytest.approx(second.mtp_loss.item(), rel=1e-12)


def test_padding_along_with_position_ids(make_model, relative):
    model = make_model("ME*M-", exact=True)
    documents = random_documents([9, 14])
    for kind in ("left", "right", "holes"):
        ids, mask = pad(documents, 20, kind)
        position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate() makes them
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
            found = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits[mask.bool()]
        assert relative(found, expected) < TIGHT


def pack(documents, how):
    """Keyword arguments for documents end to end in one row."""
    ids = torch.cat(documents, 1)
    sizes = [d.shape[1] for d in documents]
    if how == "position_ids":
        return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in sizes])[None]}
    if how == "cu_seq_lens":
        return {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, *sizes]).cumsum(0).int()}
    # Ids in no order: only that they differ counts.
    numbers = torch.tensor([(3, 1, 4, 0, 7)[i] for i in range(len(sizes))])
    return {"input_ids": ids, "seq_idx": numbers.repeat_interleave(torch.tensor(sizes))[None].int()}


HOW = ["position_ids", "cu_seq_lens", "seq_idx"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=5),
    how=st.sampled_from(HOW),
    attn=st.sampled_from(["eager", "sdpa"]),
    one_by_one=st.booleans(),
    grad=st.booleans(),
    use_cache=st.booleans(),
    segment=st.sampled_from([8, 512]),
)
def test_packed_logits(lengths, how, attn, one_by_one, grad, use_cache, segment, make_model, relative):
    model = make_model("ME*M-", exact=True, attn=attn, **MTP)
    documents = random_documents(lengths)
    budget = 0 if one_by_one else 1 << 26
    with (
        torch.set_grad_enabled(grad),
        mock.patch.dict(mamba2._SEGMENT_TOKENS, {"cpu": segment}),
        mock.patch.object(token_layout, "_MASK_BUDGET", budget),
    ):
        out = model(**pack(documents, how), use_cache=use_cache, output_mtp_logits=True)
        for k, document in enumerate(documents):
            here = slice(sum(lengths[:k]), sum(lengths[: k + 1]))
            one = model(document, use_cache=False, output_mtp_logits=True)
            assert relative(out.logits[0, here], one.logits[0]) < TIGHT
            # Near a document's end its MTP logits would draw on the next document, were it not kept out.
            for found, expected in zip(out.mtp_logits, one.mtp_logits, strict=True):
                assert relative(found[0, here], expected[0]) < TIGHT


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("training", [False, True])
def test_packed_loss_and_gradients(how, attn, training, make_model, relative):
    model = make_model("ME*M-", exact=True, attn=attn, **MTP).train(training)
    documents = random_documents([7, 1, 12, 2, 9])
    _, expected, expected_grads = alone(model, documents)
    arguments = pack(documents, how)
    loss = model(**arguments, labels=arguments["input_ids"], num_items_in_batch=1, use_cache=False).loss
    loss.backward()
    assert abs(loss.item() / expected - 1) < TIGHT
    assert_same_gradients(gradients(model), expected_grads, relative)


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_the_output_of_transformers_collator(options, make_model, relative):
    model = make_model("ME*M-", exact=True, **MTP).train()
    documents = random_documents([7, 3, 12])
    _, expected, expected_grads = alone(model, documents)
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": d[0]} for d in documents])
    loss = model(**batch, num_items_in_batch=1, use_cache=False).loss
    loss.backward()
    assert abs(loss.item() / expected - 1) < TIGHT
    assert_same_gradients(gradients(model), expected_grads, relative)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["seq_idx", "position_ids"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_rows_packed_differently(how, attn, one_by_one, make_model, relative, monkeypatch):
    model = make_model("ME*M-", exact=True, attn=attn, **MTP).train()
    rows = [random_documents(lengths, seed) for seed, lengths in enumerate([[7, 1, 12], [20], [3, 17]])]
    documents = [d for row in rows for d in row]
    logits, expected, expected_grads = alone(model, documents)
    parts = [pack(row, how) for row in rows]
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if one_by_one:
        monkeypatch.setattr(token_layout, "_MASK_BUDGET", 0)
    out = model(**batch, labels=batch["input_ids"], num_items_in_batch=1, use_cache=False)
    out.loss.backward()
    packed = model(**batch, use_cache=False).logits.detach()
    assert relative(packed.flatten(0, 1), torch.cat(logits)) < TIGHT
    assert abs(out.loss.item() / expected - 1) < TIGHT
    assert_same_gradients(gradients(model), expected_grads, relative)


@pytest.mark.parametrize("kind", ["left", "right"])
def test_packed_rows_with_padding(kind, make_model, relative):
    model = make_model("ME*M-", exact=True)
    rows = [random_documents(lengths, seed) for seed, lengths in enumerate([[7, 4, 5], [3, 6]])]
    packed = [pack(row, "seq_idx") for row in rows]
    length = 19
    ids, mask = pad([p["input_ids"] for p in packed], length, kind)
    seq_idx = torch.full((2, length), 9)
    for row, part in enumerate(packed):
        seq_idx[row, mask[row].bool()] = part["seq_idx"][0].long()
    for use_cache in (False, True):
        for segment in (8, 512):
            with torch.no_grad(), mock.patch.dict(mamba2._SEGMENT_TOKENS, {"cpu": segment}):
                logits = model(ids, attention_mask=mask, seq_idx=seq_idx, use_cache=use_cache).logits
                for row, part in enumerate(packed):
                    expected = model(**part, use_cache=False).logits[0]
                    assert relative(logits[row][mask[row].bool()], expected) < TIGHT


@pytest.mark.parametrize("how", ["position_ids", "seq_idx"])
def test_padding_between_packed_documents(how, make_model, relative):
    """Documents rounded up to a multiple of 8, as low-precision matrix products like them."""
    model = make_model("ME*M-", exact=True, **MTP).train()
    documents = random_documents([7, 8, 3])
    ids, mask = torch.zeros(1, 24, dtype=torch.long), torch.zeros(1, 24, dtype=torch.long)
    for k, document in enumerate(documents):
        size = document.shape[1]
        ids[0, 8 * k : 8 * k + size], mask[0, 8 * k : 8 * k + size] = document[0], 1
    positions = torch.arange(24)[None]
    boundaries = {"position_ids": positions % 8} if how == "position_ids" else {"seq_idx": positions // 8}
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=1, use_cache=False, **boundaries)
    out.loss.backward()
    found = gradients(model)
    logits, expected, expected_grads = alone(model, documents)
    packed = model(ids, attention_mask=mask, use_cache=False, **boundaries).logits
    assert relative(packed[mask.bool()], torch.cat(logits)) < TIGHT
    assert abs(out.loss.item() / expected - 1) < TIGHT
    assert_same_gradients(found, expected_grads, relative)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4), data=st.data(), how=st.sampled_from(HOW))
def test_changing_one_document_changes_no_other(lengths, data, how, make_model):
    model = make_model("ME*M-", exact=True, **MTP).train()
    victim = data.draw(st.integers(0, len(lengths) - 1))
    documents = random_documents(lengths)
    arguments = pack(documents, how)
    poisoned = [(d + 23) % 61 if k == victim else d for k, d in enumerate(documents)]
    first = model(**arguments, output_mtp_logits=True, use_cache=False)
    second = model(**{**arguments, "input_ids": torch.cat(poisoned, 1)}, output_mtp_logits=True, use_cache=False)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[sum(lengths[:victim]) : sum(lengths[: victim + 1])] = False
    for a, b in zip([first.logits, *first.mtp_logits], [second.logits, *second.mtp_logits], strict=True):
        torch.testing.assert_close(a[0, others], b[0, others], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(a[0, ~others], b[0, ~others])


def test_a_gradient_stays_in_its_document(make_model):
    model = make_model("ME*M-", exact=True, **MTP).train()
    documents = random_documents([7, 9, 5])
    arguments = pack(documents, "seq_idx")
    embeds = model.model.embeddings(arguments.pop("input_ids")).detach().requires_grad_()
    out = model(inputs_embeds=embeds, **arguments, output_mtp_logits=True, use_cache=False)
    (grad,) = torch.autograd.grad(sum(t[0, 7:16].square().sum() for t in (out.logits, *out.mtp_logits)), embeds)
    inside = grad[0, 7:16].norm()
    # Not exactly zero: the scan's backward sums to zero there, up to rounding.
    assert grad[0, :7].norm() < 1e-12 * inside and grad[0, 16:].norm() < 1e-12 * inside
    assert grad[0, 7:16].any(-1).all()


@pytest.fixture(scope="module")
def long_model(make_model):
    # Shallow and mild: a long sequence through a wild deep model is chaotic even in float64.
    return make_model("ME*M", exact=True, scale=2.0)


@pytest.mark.parametrize("cut", [511, 512, 513])
def test_a_document_boundary_at_the_segment_cut(cut, long_model, relative):
    """Without gradients the Mamba layers go through 512 positions at a time."""
    documents = random_documents([cut, 512, 70])
    with torch.no_grad():
        logits = long_model(**pack(documents, "cu_seq_lens"), use_cache=True).logits[0]
        expected = [long_model(d, use_cache=False).logits[0] for d in documents]
    assert relative(logits, torch.cat(expected)) < TIGHT
    # The document after the cut is where a leak shows; and gradients turn segments off.
    in_one = long_model(documents[0], use_cache=False).logits[0]
    assert relative(logits[:cut], in_one) < TIGHT


@pytest.mark.parametrize("length", [2047, 2048, 2049, 2600])
def test_lengths_around_the_pass_of_position_wise_layers(length, long_model, relative):
    """Without gradients the MoE and MLP layers take 2048 tokens at a time; with gradients all of them."""
    (ids,) = random_documents([length])
    expected = long_model(ids, use_cache=False).logits.detach()
    with torch.no_grad():
        assert relative(long_model(ids, use_cache=False).logits, expected) < TIGHT


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_long_rows_with_padding(kind, long_model, relative):
    """Two rows make segments of 256; the short row ends just before, at and after a cut."""
    for size in (255, 256, 257):
        documents = random_documents([size, 600])
        ids, mask = pad(documents, 610, kind)
        with torch.no_grad():
            logits = long_model(ids, attention_mask=mask, use_cache=True).logits
            for row, document in enumerate(documents):
                expected = long_model(document, use_cache=False).logits[0]
                assert relative(logits[row][mask[row].bool()], expected) < TIGHT


@pytest.mark.parametrize("way", ["alone", "cached", "behind", "one token", "fixed", "two-way", "eager"])
def test_calls_that_transformers_is_not_asked_about(way, make_model):
    """What it would say of a call at the start is known: nothing, unless the model looks both ways."""
    model = make_model("M*E").model
    length, cache = 5, None if way == "alone" else HybridCache(model.config)
    if way == "fixed":
        cache = StaticCache(model.config, max_cache_len=9)
    if way == "eager":
        model.set_attn_implementation("eager")
    if way == "behind":
        model(torch.arange(3).unsqueeze(0), cache=cache, use_cache=True)
    if way == "two-way":
        model.config.is_causal = False
    ids = torch.arange(1 if way == "one token" else length).unsqueeze(0)
    asked = mock.Mock(side_effect=create_causal_mask)
    with mock.patch.object(token_layout, "create_causal_mask", asked):
        layout, embeds = model.prepare_inputs(ids, None, None, cache, None, None, None)
    assert asked.called == (way in ("behind", "fixed", "two-way", "eager"))
    expected = create_causal_mask(model.config, embeds, None, cache)
    if expected is None or layout.attention_mask is None:
        assert expected is layout.attention_mask is None
    else:
        assert torch.equal(layout.attention_mask, expected)


def causal_without_a_mask(module, query, key, value, attention_mask, scaling, **kwargs):
    """What flash attention computes when it is given neither a mask nor document lengths."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None


def test_packing_with_flash_attention(make_model, relative, monkeypatch):
    """Documents stay apart there too, where no mask can say so; and what cannot be kept apart is refused."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", causal_without_a_mask)
    model = make_model("ME*M-", exact=True, **MTP)
    documents = random_documents([7, 4, 5])
    logits, *_ = alone(model, documents)
    model.config._attn_implementation = "flash_attention_2"
    for how in HOW:
        out = model(**pack(documents, how), use_cache=False)
        assert relative(out.logits[0], torch.cat(logits)) < TIGHT
    packed = pack(documents, "seq_idx")
    with pytest.raises(ValueError, match=r"padding need.*sdpa"):
        model(**packed, attention_mask=(packed["input_ids"] >= 0).long(), use_cache=False)


@pytest.mark.parametrize("kind", ["left", "right"])
def test_padding_is_no_target_even_with_labels(kind, make_model, relative):
    """Labels that were not masked where the padding is, as `labels=input_ids` leaves them."""
    model = make_model("ME*M-", exact=True, **MTP).train()
    ids, mask = pad(random_documents([7, 4, 9]), 11, kind)
    arguments = {"input_ids": ids, "attention_mask": mask, "num_items_in_batch": 1, "use_cache": False}
    masked = model(labels=ids.masked_fill(mask == 0, -100), **arguments)
    careless = model(labels=ids, **arguments)
    assert relative(careless.loss, masked.loss) < TIGHT and relative(careless.mtp_loss, masked.mtp_loss) < TIGHT
