"""Fixed-length training windows over a stream of documents, with the document boundaries kept.

The stream is one array of token ids in which every document begins with the same id. A window is a slice of it; `seq_idx`
says which positions belong together, so that no state, attention or target crosses from one document into the next.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class PackedWindows(Dataset):
    """Non-overlapping windows of a token stream, ready for `Trainer`.

    Args:
        stream: (tokens,) integer ids, documents end to end, each beginning with `first_id`.
        length: positions per window; an incomplete last window is dropped.
        first_id: the id that begins a document.
        offset: tokens skipped at the start, so that another epoch cuts elsewhere.

    Items are dicts of `input_ids`, `labels` (int64) and `seq_idx` (int32), each (length,). Where a document begins the label
    is -100: nothing predicts it, and `Trainer` must not count it.
    """

    def __init__(self, stream: np.ndarray, length: int, first_id: int = 1, offset: int = 0):
        if len(stream) - offset < length:
            raise ValueError(f"The stream has {len(stream) - offset} tokens, fewer than one window of {length}.")
        self.stream, self.length, self.first_id, self.offset = stream, length, first_id, offset

    def __len__(self) -> int:
        return (len(self.stream) - self.offset) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.offset + index * self.length
        ids = torch.from_numpy(self.stream[start : start + self.length].astype(np.int64))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(ids == self.first_id, -100),
            "seq_idx": (ids == self.first_id).cumsum(0, dtype=torch.int32),
        }


class ShiftingEpochs(Dataset):
    """Several epochs of `PackedWindows`, each cut at another offset, so that no boundary stays where it was.

    Args:
        stream, length, first_id: as in `PackedWindows`.
        epochs: how many.
        seed: of the order of the windows in each epoch.
    """

    def __init__(self, stream: np.ndarray, length: int, epochs: int, first_id: int = 1, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.epochs = [
            PackedWindows(stream, length, first_id, offset=int(generator.integers(length))) for _ in range(epochs)
        ]
        self.order = [
            (epoch, int(window))
            for epoch, windows in enumerate(self.epochs)
            for window in generator.permutation(len(windows))
        ]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, window = self.order[index]
        return self.epochs[epoch][window]
