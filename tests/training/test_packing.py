"""Windows over a token stream: nothing lost, nothing twice, documents told apart."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nemotron_super.training.packing import PackedWindows, ShiftingEpochs

# Documents of 5, 1 and 6 tokens, each beginning with id 1.
STREAM = np.array([1, 7, 8, 9, 2, 1, 1, 3, 4, 5, 6, 2], dtype=np.uint16)


@given(length=st.integers(1, 12), offset=st.integers(0, 5))
def test_windows_are_consecutive(length, offset):
    if len(STREAM) - offset < length:
        with pytest.raises(ValueError, match=f"{len(STREAM) - offset} tokens"):
            PackedWindows(STREAM, length, offset=offset)
        return
    windows = PackedWindows(STREAM, length, offset=offset)
    ids = torch.cat([windows[i]["input_ids"] for i in range(len(windows))]).tolist()
    assert ids == STREAM[offset : offset + len(ids)].tolist() and len(STREAM) - offset - len(ids) < length


def test_an_item():
    item = PackedWindows(STREAM, 6)[1]
    assert item["input_ids"].tolist() == [1, 3, 4, 5, 6, 2]
    assert item["labels"].tolist() == [-100, 3, 4, 5, 6, 2]
    item = PackedWindows(STREAM, 8, offset=2)[0]
    assert item["input_ids"].tolist() == [8, 9, 2, 1, 1, 3, 4, 5]
    assert item["seq_idx"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert item["labels"].data_ptr() != item["input_ids"].data_ptr()


def test_epochs_cut_elsewhere_and_are_repeatable():
    stream = np.arange(1000, dtype=np.uint16)
    epochs = ShiftingEpochs(stream, 10, epochs=3, seed=1)
    starts = [int(epochs[i]["input_ids"][0]) for i in range(len(epochs))]
    assert len(set(starts)) == len(starts), "every window of every epoch once"
    assert len({start % 10 for start in starts}) == 3
    assert starts == [int(item["input_ids"][0]) for item in ShiftingEpochs(stream, 10, epochs=3, seed=1)]
    assert starts != [int(item["input_ids"][0]) for item in ShiftingEpochs(stream, 10, epochs=3, seed=2)]
