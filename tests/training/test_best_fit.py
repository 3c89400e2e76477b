"""Packing: every document whole, once, in as few rows as fits; and what cannot be packed is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_super.training.best_fit import BestFitRows, PadRows
from nemotron_super.training.documents import DataError, TokenDocument
from torch.utils.data import DataLoader


def documents(sizes):
    """Documents whose tokens say which document and which place they are."""
    return [
        TokenDocument([1000 * (n + 1) + place for place in range(size)], name=f"document {n}")
        for n, size in enumerate(sizes)
    ]


def split(row):
    """The documents of a row, by `seq_idx`."""
    parts: dict[int, list[int]] = {}
    for token, index in zip(row["input_ids"], row["seq_idx"], strict=True):
        parts.setdefault(index, []).append(token)
    assert row["seq_idx"] == sorted(row["seq_idx"]) and list(parts) == list(range(len(parts)))
    return list(parts.values())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(2, 12), min_size=1, max_size=40), pool=st.integers(1, 50))
def test_every_document_once_and_whole(sizes, pool):
    source = documents(sizes)
    rows = list(packed := BestFitRows(source, 12, pool=pool))
    assert all(len(row["input_ids"]) <= 12 for row in rows)
    found = sorted(part for row in rows for part in split(row))
    assert found == sorted(document.input_ids for document in source)
    assert packed.used == pytest.approx(sum(sizes) / (12 * len(rows)))
    assert rows == list(packed), "every iteration gives the same rows"
    if pool >= len(sizes):
        # No two rows could have been one: the later one's documents would have fitted into the earlier one.
        fill = [len(row["input_ids"]) for row in rows]
        smallest = [min(map(len, split(row))) for row in rows]
        assert all(fill[a] + smallest[b] > 12 for a in range(len(rows)) for b in range(a + 1, len(rows)))


def test_the_first_label_of_a_document_is_no_target():
    """So the count that `Trainer` takes of the labels is the number of predictions."""
    (row,) = BestFitRows(documents([3, 4]), 8)
    assert row["labels"] == [-100, 1001, 1002, -100, 2001, 2002, 2003]
    assert sum(label != -100 for label in row["labels"][1:]) == 2 + 3


def test_it_packs_well_while_streaming():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 100, (3000,), generator=generator).tolist()
    rows = BestFitRows(documents(sizes), 128, pool=200)
    list(rows)
    assert rows.used > 0.97
    in_order = BestFitRows(documents(sizes), 128, pool=1)
    list(in_order)
    assert in_order.used < 0.6


def test_no_document_waits_for_ever():
    """The oldest opens the next row, however many better ones arrive."""
    source = documents([5, *[12] * 30])
    rows = list(BestFitRows(source, 12, pool=4))
    assert split(rows[0])[0] == source[0].input_ids


def test_repeated():
    """Pass after pass, every document once in each; without any document it ends instead of looking for ever."""
    source = documents([3, 4, 5])
    rows = iter(BestFitRows(source, 5, pool=1, repeat=True))
    assert [split(next(rows))[0] for _ in range(7)] == [source[n % 3].input_ids for n in range(7)]
    with pytest.raises(DataError, match="No document is left"):
        next(iter(BestFitRows([TokenDocument([])], 5, on_bad="drop", repeat=True)))


@pytest.mark.parametrize(
    ("too_long", "sizes"),
    [("split", [5, 5, 3, 4]), ("truncate", [5, 4]), ("drop", [4])],
)
def test_too_long(too_long, sizes):
    source = documents([13, 4])
    rows = BestFitRows(source, 5, too_long=too_long)
    parts = [part for row in rows for part in split(row)]
    assert sorted(map(len, parts)) == sorted(sizes)
    assert rows.dropped == ({"too long": 1} if too_long == "drop" else {})
    if too_long == "split":
        assert sorted(t for part in parts for t in part) == [t for document in source for t in document.input_ids]


def test_too_long_is_refused_by_name():
    with pytest.raises(
        DataError, match=r"document 1: 13 tokens, more than a row's 5: raise `length`, or set `too_long`"
    ):
        list(BestFitRows(documents([3, 13]), 5))


MASKED = TokenDocument([5, 6, 7], [-100, -100, -100], "masked")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (TokenDocument([], name="none"), "none: empty"),
        (TokenDocument([4], name="one"), "one: nothing to predict"),
        (MASKED, "masked: nothing to predict"),
        # A label on the first token is predicted from nothing.
        (TokenDocument([5, 6], [5, -100], "first"), "first: nothing to predict"),
    ],
)
def test_nothing_to_learn(bad, reason):
    source = [*documents([3]), bad]
    with pytest.raises(DataError, match=reason):
        list(BestFitRows(source, 5))
    rows = BestFitRows(source, 5, on_bad="drop")
    assert len(list(rows)) == 1 and sum(rows.dropped.values()) == 1


def test_labels_cut_off():
    long = TokenDocument([5] * 8, [-100] * 6 + [5, 5], "answer at the end")
    with pytest.raises(DataError, match="answer at the end: nothing to predict within 4 tokens"):
        list(BestFitRows([long], 4, too_long="truncate"))
    (row,) = BestFitRows([long], 4, too_long="split")
    assert row["labels"] == [-100, -100, 5, 5]


def test_nothing_at_all():
    with pytest.raises(DataError, match=r"No document is left to train on; left out: \{'empty': 1\}"):
        list(BestFitRows([TokenDocument([])], 4, on_bad="drop"))


@pytest.mark.parametrize("arguments", [{"length": 1}, {"length": 8, "pool": 0}])
def test_impossible_settings(arguments):
    with pytest.raises(DataError, match="a row needs two tokens"):
        BestFitRows([], **arguments)


def test_several_workers_are_refused():
    loader = DataLoader(BestFitRows(documents([3] * 9), 5), batch_size=None, num_workers=2)
    with pytest.raises(DataError, match="dataloader_num_workers"):
        list(loader)


def test_padding():
    rows = list(BestFitRows(documents([5, 3]), 5))
    batch = PadRows(pad_token_id=7)(rows)
    assert batch["input_ids"][1].tolist() == [2000, 2001, 2002, 7, 7]
    assert batch["labels"][1].tolist() == [-100, 2001, 2002, -100, -100]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert "attention_mask" not in PadRows(7)(rows[:1])
    assert PadRows(7, length=8)(rows)["seq_idx"].shape == (2, 8)


def test_packed_rows_train_as_single_documents(make_model):
    model = make_model("ME*", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E").train()
    generator = torch.Generator().manual_seed(0)
    source = [TokenDocument(torch.randint(0, 61, (n,), generator=generator).tolist()) for n in (7, 3, 9, 4, 2)]
    batch = PadRows(0)(list(BestFitRows(source, 12)))
    items = int((batch["labels"][:, 1:] != -100).sum())
    assert items == sum(len(document.input_ids) - 1 for document in source)
    packed = model(**batch, num_items_in_batch=items, use_cache=False)
    single = [
        model(ids := torch.tensor([document.input_ids]), labels=ids, num_items_in_batch=items, use_cache=False)
        for document in source
    ]
    torch.testing.assert_close(packed.loss, sum(out.loss for out in single), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed.mtp_loss, sum(out.mtp_loss for out in single), rtol=1e-5, atol=1e-6)
