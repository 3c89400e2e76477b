"""Training documents from text files, JSON lines, and the `datasets` library, one at a time.

Every document carries a name (file and line, or row), so that whatever is wrong with it can be said with its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerFast

from .tokenizer import without_special_tokens

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


class DataError(ValueError):
    """Data that cannot be trained on. The message names its place and what to change."""


@dataclass
class TokenDocument:
    """What belongs together: one text or one conversation, tokenized.

    Attributes:
        input_ids: token ids.
        labels: one per token, -100 where there is nothing to predict; by default the ids themselves.
        name: where it came from.
    """

    input_ids: list[int]
    labels: list[int] = field(default_factory=list)
    name: str = ""

    def __post_init__(self) -> None:
        self.labels = self.labels or list(self.input_ids)
        if len(self.labels) != len(self.input_ids):
            raise DataError(f"{self.name}: {len(self.labels)} labels for {len(self.input_ids)} tokens.")


def read_examples(source: str | Path | Iterable[Mapping], columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """Stream (name, example) pairs, each example a dict that has `columns`.

    Args:
        source: a `.jsonl` file (one object a line), a text file (one document), a folder of such files, a folder that
            `datasets` saved, or a `datasets` object (streaming ones too).
        columns: what every example must have. A text file has the one column "text".

    Raises:
        DataError: nothing to read, a line that is no JSON object, or a column that is missing: named, with those there.
    """
    found = False
    for name, example in _examples(source):
        found = True
        missing = [column for column in columns if example.get(column) is None]
        if missing:
            raise DataError(f"{name}: column {missing[0]!r} is missing or empty; there are: {', '.join(example)}.")
        yield name, dict(example)
    if not found:
        raise DataError(f"{source}: nothing to train on.")


def _examples(source: str | Path | Iterable[Mapping]) -> Iterator[tuple[str, Mapping]]:
    if not isinstance(source, str | Path):
        label = type(source).__name__
        yield from ((f"{label} row {row}", example) for row, example in enumerate(source))
        return
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    if (path / "dataset_info.json").exists():
        for row, example in enumerate(datasets.load_from_disk(str(path))):
            yield f"{path} row {row}", example
    elif (path / "dataset_dict.json").exists():
        raise DataError(f"{path}: holds several splits; name the folder of one of them.")
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in (*TEXT_SUFFIXES, ".jsonl") and file.is_file():
                yield from _examples(file)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path} line {number}", _json_object(f"{path} line {number}", line)
    elif path.suffix in TEXT_SUFFIXES:
        yield str(path), {"text": path.read_text(encoding="utf-8")}
    else:
        raise DataError(f"{path}: unknown kind of file; known: .jsonl, {', '.join(TEXT_SUFFIXES)}.")


def _json_object(name: str, line: str) -> dict:
    try:
        example = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: not valid JSON ({error}).") from error
    if not isinstance(example, dict):
        raise DataError(f"{name}: a JSON {type(example).__name__}, expected an object with named columns.")
    return example


class DocumentStream:
    """Documents read and tokenized while they are iterated over, as often as wanted, each time in the same order.

    Args:
        source: see `read_examples`.
        encode: from a name and an example to a document.
        columns: what `encode` needs.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Mapping],
        encode: Callable[[str, dict], TokenDocument],
        columns: tuple[str, ...],
    ):
        self.source, self.encode, self.columns = source, encode, columns

    def __iter__(self) -> Iterator[TokenDocument]:
        for name, example in read_examples(self.source, self.columns):
            yield self.encode(name, example)


def text_documents(
    source: str | Path | Iterable[Mapping], tokenizer: PreTrainedTokenizerFast, column: str = "text"
) -> DocumentStream:
    """Plain text as documents: bos, text, eos. What spells a special token is read as text.

    Raises:
        DataError: a tokenizer without bos or eos; while iterating, what `read_examples` raises, or text that is no string.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None or end is None:
        raise DataError("The tokenizer has no bos or no eos token: documents need both around them.")
    plain = without_special_tokens(tokenizer)

    def encode(name: str, example: dict[str, Any]) -> TokenDocument:
        text = example[column]
        if not isinstance(text, str):
            raise DataError(f"{name}: column {column!r} holds {type(text).__name__}, expected text.")
        ids = plain.encode(text).ids
        # An empty document stays empty, so that it is seen for what it is.
        return TokenDocument([begin, *ids, end] if ids else [], name=name)

    return DocumentStream(source, encode, (column,))
