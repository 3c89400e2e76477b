"""Held-out figures against a plain computation, and the recipe from source text to checkpoint."""

import json
import math

import numpy as np
import pytest
import torch
from nemotron_super import NemotronHForCausalLM, preset
from nemotron_super.training.best_fit import BestFitRows, PadRows
from nemotron_super.training.corpus import CorpusSource, gather_corpus
from nemotron_super.training.documents import TokenDocument
from nemotron_super.training.evaluation import evaluate_windows
from nemotron_super.training.packing import PackedWindows
from nemotron_super.training.recipes import nemotron_h_tiny as recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

MTP = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


def test_against_a_document_at_a_time(make_model):
    model = make_model("ME*", exact=True, **MTP)
    stream = np.array([1, 7, 8, 9, 2, 1, 1, 3, 4, 5, 6, 2], dtype=np.uint16)
    found = evaluate_windows(model, PackedWindows(stream, 12), progress=False)
    nats, right, count = np.zeros(3), np.zeros(3), np.zeros(3)
    for document in ([1, 7, 8, 9, 2], [1], [1, 3, 4, 5, 6, 2]):
        ids = torch.tensor([document])
        with torch.no_grad():
            out = model(ids, output_mtp_logits=True, use_cache=False)
        for k, logits in enumerate((out.logits, *out.mtp_logits)):
            for t in range(len(document) - k - 1):
                p = logits[0, t].log_softmax(-1)
                nats[k] -= float(p[document[t + k + 1]])
                right[k] += int(p.argmax()) == document[t + k + 1]
                count[k] += 1
    assert found.tokens == count[0] == 9
    # The evaluation adds up in float32.
    np.testing.assert_allclose([found.loss, *found.mtp_loss], nats / count, rtol=1e-5)
    np.testing.assert_allclose([found.accuracy, *found.mtp_accuracy], right / count)
    assert found.bits_per_byte(4.0) == found.loss / math.log(2) / 4
    shares = found.expert_share["model.layers.1.mixer.gate"]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 1) < 1e-6
    assert not model.training and evaluate_windows(model.train(), PackedWindows(stream, 12), progress=False) == found
    assert model.training


def test_padded_rows(make_model):
    """Rows of different lengths, padded, measure what their documents measure one by one."""
    model = make_model("ME*", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    generator = torch.Generator().manual_seed(0)
    source = [TokenDocument(torch.randint(0, 61, (n,), generator=generator).tolist()) for n in (9, 4, 7, 3, 5)]
    rows = list(BestFitRows(source, 9))
    found = evaluate_windows(model, rows, batch_size=len(rows), progress=False, collate_fn=PadRows(0))
    alone = [evaluate_windows(model, list(BestFitRows([d], 9)), 1, False, PadRows(0)) for d in source]
    assert found.tokens == sum(one.tokens for one in alone) == sum(len(d.input_ids) - 1 for d in source)
    assert found.loss == pytest.approx(sum(one.loss * one.tokens for one in alone) / found.tokens, rel=1e-5)


def test_the_recipe_from_text_to_checkpoint(tmp_path, monkeypatch):
    """All of it, small: corpus, tokenizer, training, evaluation, curves, and a checkpoint that opens again."""
    (tmp_path / "text").mkdir()
    for i in range(220):
        lines = (f"def function_{i}_{j}(value={i * j}):\n    return table[{j}] + {i}\n" for j in range(12))
        (tmp_path / "text" / f"{i}.txt").write_text("".join(lines))
    sources = (CorpusSource("text", tmp_path / "text", ".txt", "CC0-1.0", ()),)
    monkeypatch.setattr(recipe, "load_corpus", lambda: gather_corpus(sources))
    train_tokenizer = recipe.train_tokenizer
    monkeypatch.setattr(recipe, "train_tokenizer", lambda texts, **kw: train_tokenizer(texts, vocab_size=400, **kw))
    small = {"vocab_size": 400, "hidden_size": 32, "hybrid_override_pattern": "ME*", "n_routed_experts": 4}
    config = preset("tiny").to_dict() | small
    for spelling in ("layers_block_type", "num_hidden_layers"):
        config.pop(spelling)
    monkeypatch.setattr(recipe, "preset", lambda name: type(preset("tiny"))(**config))
    monkeypatch.setattr(recipe, "LENGTH", 64)

    recipe.main(["--output", str(tmp_path / "out"), "--steps", "4", "--windows-per-step", "2"])
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["steps"] == 4 and evaluation["tokens_seen"] == 4 * 2 * 64 and evaluation["bits_per_byte"] > 0
    for picture in ("loss", "mtp_accuracy", "expert_load"):
        assert (tmp_path / "out" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is NemotronHForCausalLM and model.dtype == torch.bfloat16 and model.config.use_cache
    assert len(tokenizer) == model.config.vocab_size == 400
    assert model.generation_config.eos_token_id == [2, 11]

    before = (tmp_path / "out" / "data" / "train.npy").stat().st_mtime_ns
    recipe.main(["--output", str(tmp_path / "again"), "--data", str(tmp_path / "out" / "data"), "--prepare-only"])
    assert (tmp_path / "out" / "data" / "train.npy").stat().st_mtime_ns == before
    assert not (tmp_path / "again" / "evaluation.json").exists()
