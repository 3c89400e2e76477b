"""Whole documents packed into rows of bounded length, each document into the space it fits best.

From a pool of waiting documents a row takes the one that has waited longest, then, again and again, the longest that still
fits (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"; theirs sorts the whole corpus, a pool lets it stream).
The result depends on the documents and their order alone, so that a resumed run can skip to where it was.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .documents import DataError, TokenDocument

TooLong = Literal["error", "split", "truncate", "drop"]


class BestFitRows(IterableDataset):
    """Rows of packed documents; every iteration reads the documents from the start.

    Args:
        documents: can be iterated over more than once, such as a `DocumentStream`.
        length: most tokens per row.
        too_long: what to do with a document longer than that: refuse it by name, split it into pieces that do not know of
            each other, keep its beginning, or leave it out.
        on_bad: whether a document without anything to predict (empty, or all labels masked) is refused by name or left out.
        pool: how many documents wait.
        repeat: begin again when the documents are through, for ever; a resumed run can then skip to where it was in any pass.

    Attributes:
        dropped: how many documents were left out, by reason, in the latest iteration.
        used: tokens of documents over tokens of full rows, so far in the latest iteration.

    Items are dicts of lists: `input_ids`, `labels`, `seq_idx` (which document of the row). The first label of a document is
    -100: nothing predicts it, and `Trainer` must not count it.

    Raises:
        DataError: documents that are refused; a stream that yields nothing.
    """

    def __init__(
        self,
        documents: Iterable[TokenDocument],
        length: int,
        too_long: TooLong = "error",
        on_bad: Literal["error", "drop"] = "error",
        pool: int = 1024,
        repeat: bool = False,
    ):
        if length < 2 or pool < 1:
            raise DataError(
                f"`length` is {length} and `pool` {pool}: a row needs two tokens, and a pool one document."
            )
        self.documents, self.length, self.too_long, self.on_bad, self.pool = documents, length, too_long, on_bad, pool
        self.repeat = repeat
        self.dropped: Counter[str] = Counter()
        self._tokens = self._rows = 0

    @property
    def used(self) -> float:
        return self._tokens / max(1, self._rows * self.length)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise DataError("Every worker would read every document: set `dataloader_num_workers` to 0 or 1.")
        self.dropped.clear()
        self._tokens = self._rows = 0
        waiting: list[tuple[int, int]] = []  # (length, arrival), sorted
        held: dict[int, TokenDocument] = {}  # by arrival, oldest first
        for arrival, document in enumerate(self._passes()):
            held[arrival] = document
            insort(waiting, (len(document.input_ids), arrival))
            if len(held) >= self.pool:
                yield self._next_row(waiting, held)
        while held:
            yield self._next_row(waiting, held)
        if not self._rows:
            raise DataError(f"No document is left to train on; left out: {dict(self.dropped) or 'none'}.")

    def _passes(self) -> Iterator[TokenDocument]:
        found = True
        while found:
            found = False
            for document in self._fitting():
                found = self.repeat
                yield document

    def _fitting(self) -> Iterator[TokenDocument]:
        """Documents, or their pieces, that fit a row and have something to predict."""
        for document in self.documents:
            size = len(document.input_ids)
            if size > self.length and self.too_long == "error":
                raise DataError(
                    f"{document.name}: {size} tokens, more than a row's {self.length}: raise `length`, or set `too_long` "
                    "to 'split', 'truncate' or 'drop'."
                )
            if size > self.length and self.too_long == "drop":
                self.dropped["too long"] += 1
                continue
            ends = range(0, size, self.length) if self.too_long == "split" else range(1 if size else 0)
            learns = False
            for start in ends:
                part = slice(start, start + self.length)
                piece = TokenDocument(document.input_ids[part], document.labels[part], document.name)
                if any(label != -100 for label in piece.labels[1:]):
                    learns = True
                    yield piece
            if not learns:
                reason = "empty" if size == 0 else "nothing to predict"
                if self.on_bad == "error":
                    within = f" within {self.length} tokens" if size > self.length else ""
                    raise DataError(f"{document.name}: {reason}{within}; fix it, or set `on_bad` to 'drop'.")
                self.dropped[reason] += 1

    def _next_row(self, waiting: list[tuple[int, int]], held: dict[int, TokenDocument]) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_idx": []}
        oldest = next(iter(held))
        entry = (len(held[oldest].input_ids), oldest)
        space, count = self.length, 0
        while entry is not None:
            waiting.remove(entry)
            document = held.pop(entry[1])
            row["input_ids"] += document.input_ids
            row["labels"] += [-100, *document.labels[1:]]
            row["seq_idx"] += [count] * entry[0]
            space, count = space - entry[0], count + 1
            # Of the longest that fit, the one that has waited longest.
            place = bisect_right(waiting, (space, float("inf")))
            longest = waiting[place - 1][0] if place else 0
            entry = waiting[bisect_right(waiting, (longest, -1))] if place else None
        self._tokens, self._rows = self._tokens + self.length - space, self._rows + 1
        return row


class PadRows:
    """Collates packed rows: pads on the right to the longest, with an `attention_mask` only where there is padding.

    Args:
        pad_token_id: what to pad `input_ids` with.
        length: pad to this length instead; fixed shapes spare recompilation.

    Returns a dict of (batch, seq) tensors: `input_ids`, `labels` (int64), `seq_idx` (int32), perhaps `attention_mask`.
    """

    def __init__(self, pad_token_id: int, length: int | None = None):
        self.pad_token_id, self.length = pad_token_id, length

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = self.length or max(len(row["input_ids"]) for row in rows)

        def stack(name: str, fill: int | None, dtype: torch.dtype) -> Tensor:
            # Padding belongs to the last document, which the attention mask keeps it out of.
            padded = [
                list(row[name]) + [row[name][-1] if fill is None else fill] * (length - len(row[name])) for row in rows
            ]
            return torch.tensor(padded, dtype=dtype)

        batch = {
            "input_ids": stack("input_ids", self.pad_token_id, torch.int64),
            "labels": stack("labels", -100, torch.int64),
            "seq_idx": stack("seq_idx", None, torch.int32),
        }
        if any(len(row["input_ids"]) < length for row in rows):
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(length) < lengths.unsqueeze(1)).long()
        return batch
