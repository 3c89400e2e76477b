"""Input that cannot be right is refused with a ValueError that names the argument."""

import pytest
import torch
from nemotron_super import HybridCache

IDS = torch.arange(12).view(2, 6)
ONE = IDS[:1]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("ME*")


@pytest.fixture(scope="module")
def mtp_model(make_model):
    return make_model("ME*", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")


BAD = {
    "no input": ({}, "input_ids.*inputs_embeds"),
    "two inputs": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 24)}, "input_ids.*inputs_embeds"),
    "short mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, "attention_mask"),
    "long mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 7)}, "attention_mask"),
    "mask of another batch": ({"input_ids": IDS, "attention_mask": torch.ones(3, 6)}, "attention_mask"),
    "id too large": ({"input_ids": IDS + 50}, r"input_ids.*61"),
    "id below zero": ({"input_ids": IDS - 1}, r"input_ids.*-1"),
    "short labels": ({"input_ids": IDS, "labels": IDS[:, :5]}, "labels"),
    "labels of another batch": ({"input_ids": IDS, "labels": ONE}, "labels"),
    "labels and logits_to_keep": ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "logits_to_keep"),
    "labels and positions": (
        {"input_ids": IDS, "labels": IDS, "logits_to_keep": torch.tensor([0, 2])},
        "logits_to_keep",
    ),
    "lengths too short": ({"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 2, 5])}, "cu_seq_lens"),
    "lengths too long": ({"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 2, 7])}, "cu_seq_lens"),
    "lengths not from zero": ({"input_ids": ONE, "cu_seq_lens_q": torch.tensor([1, 2, 6])}, "cu_seq_lens"),
    "lengths that fall": ({"input_ids": ONE, "cu_seq_lens_q": [0, 4, 2, 6]}, "cu_seq_lens"),
    "no lengths": ({"input_ids": ONE, "cu_seq_lens_q": torch.tensor([], dtype=torch.int32)}, "cu_seq_lens"),
    "lengths for a batch": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 6, 12])}, "cu_seq_lens"),
    "short seq_idx": ({"input_ids": IDS, "seq_idx": torch.zeros(2, 5)}, "seq_idx"),
    "seq_idx of another batch": ({"input_ids": IDS, "seq_idx": torch.zeros(3, 6)}, "seq_idx"),
    "flat seq_idx": ({"input_ids": ONE, "seq_idx": torch.zeros(6)}, "seq_idx"),
    "MTP of a model without": ({"input_ids": IDS, "output_mtp_logits": True}, "output_mtp_logits"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("training", [False, True])
def test_refused(case, training, model):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        model.train(training)(**arguments)


PACKED = {
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2]])},
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 2, 6])},
}


@pytest.mark.parametrize("how", PACKED)
def test_packed_documents_on_a_filled_cache(how, model):
    cache = HybridCache(model.config)
    model.eval()(ONE, cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="cache"):
        model(ONE, cache=cache, **PACKED[how])


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("how", ["seq_idx", "cu_seq_lens", "position_ids"])
def test_a_packed_cache_is_not_continued(how, length, model, make_model):
    """Attention would see every document's keys while the Mamba-2 state holds the last document's only."""
    arguments = {**PACKED, "position_ids": {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])}}[how]
    out = model.eval()(ONE, use_cache=True, **arguments)
    with pytest.raises(ValueError, match="cache"):
        model(ONE[:, :length], cache=out.cache, use_cache=True)


def test_mask_must_cover_the_cache(model):
    cache = HybridCache(model.config)
    model.eval()(IDS, cache=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 7\)"):
        model(IDS[:, :1], attention_mask=torch.ones(2, 1), cache=cache)


def test_mtp_on_a_filled_cache(mtp_model):
    cache = HybridCache(mtp_model.config)
    mtp_model.eval()(IDS, cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="cache"):
        mtp_model(IDS, cache=cache, output_mtp_logits=True)


@pytest.mark.parametrize("depths", [0, -1])
def test_mtp_depths(depths, mtp_model):
    with pytest.raises(ValueError, match="mtp_num_depths"):
        mtp_model(IDS, output_mtp_logits=True, mtp_num_depths=depths)


def test_a_refused_call_leaves_the_cache_alone(model):
    cache = HybridCache(model.config)
    with torch.no_grad():
        model.eval()(IDS, cache=cache, use_cache=True)
        with pytest.raises(ValueError):
            model(IDS + 50, cache=cache, use_cache=True)
        assert cache.get_seq_length() == 6
        found = model(IDS[:, :1], cache=cache, use_cache=True).logits
        expected = model(torch.cat([IDS, IDS[:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_embeddings_instead_of_ids(model):
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        assert torch.equal(model(inputs_embeds=model.model.embeddings(IDS)).logits, expected)
        assert torch.equal(model(IDS, logits_to_keep=2).logits, expected[:, -2:])
        assert torch.equal(model(IDS, logits_to_keep=torch.tensor([1, 4])).logits, expected[:, [1, 4]])
