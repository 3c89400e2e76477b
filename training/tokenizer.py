"""The byte-level BPE tokenizer of `nemotron-h-tiny`: trained on its corpus, with the release's special ids.

Ids 0 to 19 are the release's control tokens and reserved places, ids from 20 are ordinary. Every unicode string comes
back from encode and decode unchanged: there is no normalizer, no added space and no clean-up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import Corpus, Document

BOS_ID, EOS_ID = 1, 2
FIRST_ORDINARY_ID = 20
_CONTROL_TOKENS = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>"}
# Part of an answer's text: parsers of reasoning and of tool calls need them after `skip_special_tokens=True`.
_VISIBLE_TOKENS = {
    12: "<think>",
    13: "</think>",
    14: "<tool_call>",
    15: "</tool_call>",
    16: "<tool_response>",
    17: "</tool_response>",
}
RESERVED_TOKENS = tuple(
    _CONTROL_TOKENS.get(i) or _VISIBLE_TOKENS.get(i) or f"<SPECIAL_{i}>" for i in range(FIRST_ORDINARY_ID)
)

# How servers take an answer apart: reasoning, tool calls and text, in transformers' format for `parse_response`.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\n<function=(?P<name>\w[^>]*)>\n",
            "close_pattern": r"</function>\n</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>\w[^>]*)>\n(?P<value>.*?)\n</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|</s>)\s*", "content": "text"},
    },
}

# A piece is the widest text that one token may cover.
SPLIT_PATTERN = "|".join(
    (
        r"\p{N}{1,3}",  # digits in groups of at most three
        r"(?: |[^\s\p{L}\p{N}])?[\p{L}\p{M}]+",  # a word with the space, dot or bracket before it
        r" ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?",  # punctuation, with the line break and indentation that follow
        r"\s*?[\r\n]+[ \t]*",  # line breaks with the next line's indentation
        r"\s+(?!\S)",  # spaces, all but the one that belongs to the next word
        r"\s+",
    )
)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 8192,
    chat_template: str | None = None,
    model_max_length: int = 8192,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly `vocab_size` entries, `RESERVED_TOKENS` included.

    Raises:
        ValueError: the texts hold too few distinct pairs for that many entries, or the vocabulary is smaller than the
            reserved tokens and the 256 bytes.
    """
    smallest = FIRST_ORDINARY_ID + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (reserved tokens and bytes), got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(RESERVED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts yield {backend.get_vocab_size()} entries, not {vocab_size}: add text or lower vocab_size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_reserved_tokens(backend),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=model_max_length,
        padding_side="left",
        add_bos_token=False,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        response_template=RESPONSE_TEMPLATE if chat_template else None,
    )


def _with_reserved_tokens(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer with each reserved token's `special` flag as it should be (the trainer makes all special)."""
    fields = json.loads(backend.to_str())
    fields["added_tokens"] = []
    clean = Tokenizer.from_str(json.dumps(fields))
    clean.add_tokens(
        [AddedToken(t, special=i not in _VISIBLE_TOKENS, normalized=False) for i, t in enumerate(RESERVED_TOKENS)]
    )
    return clean


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path | str) -> None:
    """Write the three files that `AutoTokenizer.from_pretrained` needs: tokenizer, its configuration, chat template."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes its new name of the class, which servers that still run version 4 do not know.
    fields |= {"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer's backend as it reads plain text: no reserved id comes out, even where a text spells its token."""
    # `split_special_tokens` would still match the added tokens that are not special, such as `<think>`.
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields["added_tokens"], fields["post_processor"] = [], None
    return Tokenizer.from_str(json.dumps(fields))


def encode_plain_text(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts so that no reserved id can come out, even where a text spells a special token."""
    return [encoding.ids for encoding in without_special_tokens(tokenizer).encode_batch_fast(list(texts))]


def encode_corpus(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> np.ndarray:
    """Encode documents as one uint16 array, shape (tokens,): bos, the document's text, eos, then the next document.

    Raises:
        ValueError: the vocabulary does not fit 16 bits.
    """
    if len(tokenizer) > 2**16:
        raise ValueError(f"a vocabulary of {len(tokenizer)} entries does not fit uint16")
    encoded = encode_plain_text(tokenizer, [document.text for document in documents])
    pieces = [np.array([BOS_ID, *ids, EOS_ID], dtype=np.uint16) for ids in encoded]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)


def write_encoded_corpus(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, folder: Path | str) -> dict:
    """Write `train.npy`, `heldout.npy` and `counts.json`; return the counts.

    The counts are, by split, documents, tokens (bos and eos included) and UTF-8 bytes of text. Bits per byte is a
    split's summed loss in nats over its bytes, divided by ln 2.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in ("train", "heldout"):
        documents = getattr(corpus, split)
        ids = encode_corpus(tokenizer, documents)
        np.save(folder / f"{split}.npy", ids)
        size = sum(len(document.text.encode()) for document in documents)
        counts[split] = {"documents": len(documents), "tokens": len(ids), "bytes": size}
    (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts
