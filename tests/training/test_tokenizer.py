"""The tokenizer: exact size, the release's special ids, exact round trips, and encoding of a corpus for training."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nemotron_super.training.corpus import Corpus, Document
from nemotron_super.training.tokenizer import (
    RESERVED_TOKENS,
    encode_corpus,
    encode_plain_text,
    save_tokenizer,
    train_tokenizer,
    write_encoded_corpus,
)
from transformers import AutoTokenizer

SIZE = 480
TEXTS = [
    f"def function_{i}(self, value={i * 37}):\n        return self.table[{i}] + value\n\n\n# Café, naïve, 你好\n"
    "while the quick brown fox jumps over the lazy dog, nothing happens and everything remains as it was before\n"
    for i in range(60)
]
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, SIZE, TEMPLATE)


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {p.name for p in folder.iterdir()}
    # As in the shipped folder, where the tokenizer lies beside a model of this type.
    (folder / "config.json").write_text(json.dumps({"model_type": "nemotron_h"}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def test_size_and_ids_are_those_asked_for(reloaded):
    assert len(reloaded) == SIZE == len(set(reloaded.get_vocab().values()))
    expected = {0: "<unk>", 1: "<s>", 2: "</s>", 9: "<SPECIAL_9>", 10: "<|im_start|>", 11: "<|im_end|>"}
    expected |= {12 + i: marker for i, marker in enumerate(MARKERS)} | {18: "<SPECIAL_18>", 19: "<SPECIAL_19>"}
    assert {i: reloaded.convert_ids_to_tokens(i) for i in expected} == expected
    assert reloaded.convert_ids_to_tokens(20) not in RESERVED_TOKENS and len(RESERVED_TOKENS) == 20


def test_settings_survive_saving(reloaded):
    assert (reloaded.unk_token_id, reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id) == (0, 1, 2, 0)
    assert reloaded.padding_side == "left" and reloaded.model_max_length == 8192
    assert reloaded.chat_template == TEMPLATE
    config = json.loads((Path(reloaded.name_or_path) / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["add_bos_token"] is False
    assert reloaded("one").input_ids == reloaded("one", add_special_tokens=False).input_ids, "no bos by default"
    batch = reloaded(["a", "a value"], padding=True)
    assert batch.input_ids[0][0] == 0 and batch.attention_mask[0][0] == 0


def test_each_special_token_is_one_id_and_only_markers_stay_visible(reloaded):
    for index, token in enumerate(RESERVED_TOKENS):
        assert reloaded(f"a{token} b").input_ids.count(index) == 1
    assert reloaded("".join(RESERVED_TOKENS)).input_ids == list(range(20))
    assert reloaded.decode(range(20), skip_special_tokens=True) == "".join(MARKERS)
    assert reloaded.decode(range(20)) == "".join(RESERVED_TOKENS)


TEXT = st.lists(st.text() | st.sampled_from([*RESERVED_TOKENS, "    ", "\r\n", "\n\t\t", " .", "don't", "12345"]))


@given(TEXT.map("".join))
def test_any_text_comes_back(reloaded, text):
    assert reloaded.decode(reloaded(text).input_ids) == text
    (plain,) = encode_plain_text(reloaded, [text])
    assert reloaded.decode(plain) == text and min(plain, default=20) >= 20


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(TEXTS, SIZE, TEMPLATE)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_pieces(tokenizer):
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = ["if", " self", ".n", ":\n        ", "return", " ", "123", "456", "7", "\n", "x", "    ", "  y"]
    text = "".join(pieces)
    assert [text[a:b] for _, (a, b) in split(text)] == [*pieces[:-2], "     ", " y"]


def test_indentation_and_words_are_cheap(tokenizer):
    assert len(tokenizer("):\n        return self").input_ids) <= 3
    assert len(tokenizer(TEXTS[3]).input_ids) < len(TEXTS[3].encode()) / 3


@pytest.mark.parametrize("size", [275, 100_000])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match=str(size)):
        train_tokenizer(TEXTS[:2], size)


def test_corpus_is_encoded_as_bos_text_eos(tokenizer):
    documents = [Document("s", "a", "the quick <s> fox</s>"), Document("s", "b", "<think>\n<|im_end|>")]
    ids = encode_corpus(tokenizer, documents)
    assert ids.dtype == np.uint16 and ids.ndim == 1
    first, second = encode_plain_text(tokenizer, [d.text for d in documents])
    assert ids.tolist() == [1, *first, 2, 1, *second, 2]
    assert (ids < 20).sum() == 4, "special tokens spelled in the text must not become special ids"
    assert tokenizer.decode(first) == documents[0].text
    assert encode_corpus(tokenizer, []).shape == (0,)


def test_written_counts_match_the_arrays(tokenizer, tmp_path):
    corpus = Corpus((Document("s", "a", "é" * 10), Document("s", "b", "value")), (Document("s", "c", "fox"),))
    counts = write_encoded_corpus(tokenizer, corpus, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "counts.json").read_text()) == counts
    assert counts["train"]["documents"] == 2 and counts["train"]["bytes"] == 25 and counts["heldout"]["bytes"] == 3
    for split in ("train", "heldout"):
        ids = np.load(tmp_path / "new" / f"{split}.npy")
        assert ids.dtype == np.uint16 and len(ids) == counts[split]["tokens"]
