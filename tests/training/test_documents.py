"""Sources of documents and of conversations, and what is said about those that cannot be used."""

import json
from pathlib import Path

import datasets
import nemotron_super
import pytest
from nemotron_super.training.chat import chat_documents
from nemotron_super.training.documents import DataError, TokenDocument, read_examples, text_documents
from transformers import AutoTokenizer

TINY = Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def write_lines(path, examples):
    path.write_text("\n".join(json.dumps(example) for example in examples) + "\n\n")
    return path


TEXTS = [{"text": "first text"}, {"text": "second, longer text"}]


@pytest.mark.parametrize("kind", ["jsonl", "folder", "saved", "dataset", "streaming", "list"])
def test_sources(tmp_path, tokenizer, kind):
    made = datasets.Dataset.from_list(TEXTS)
    if kind == "jsonl":
        source = write_lines(tmp_path / "data.jsonl", TEXTS)
    elif kind == "folder":
        (tmp_path / "inner").mkdir()
        (tmp_path / "a.txt").write_text(TEXTS[0]["text"])
        write_lines(tmp_path / "inner" / "b.jsonl", TEXTS[1:])
        (tmp_path / "picture.png").write_bytes(b"\x89PNG")
        source = tmp_path
    elif kind == "saved":
        made.save_to_disk(tmp_path / "saved")
        source = str(tmp_path / "saved")
    else:
        source = {"dataset": made, "streaming": made.to_iterable_dataset(), "list": TEXTS}[kind]
    stream = text_documents(source, tokenizer)
    for _ in range(2):  # as often as wanted
        found = list(stream)
        assert [tokenizer.decode(document.input_ids[1:-1]) for document in found] == [e["text"] for e in TEXTS]
        assert all(d.input_ids[0] == 1 and d.input_ids[-1] == 2 and d.labels == d.input_ids for d in found)
        assert len({document.name for document in found}) == 2


def test_streaming_reads_as_it_goes(tokenizer):
    read = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield {"text": f"text {number}"}

    stream = iter(text_documents(endless(), tokenizer))
    next(stream), next(stream)
    assert len(read) == 2


def test_text_is_text(tokenizer):
    """What spells a special token does not become one; empty text gives an empty document, to be seen as such."""
    written = "<|im_start|>system </s><think>"
    (document,) = text_documents([{"text": written}], tokenizer)
    assert min(document.input_ids[1:-1]) >= 20 and tokenizer.decode(document.input_ids[1:-1]) == written
    (empty,) = text_documents([{"text": ""}], tokenizer)
    assert empty.input_ids == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', r"data.jsonl line 2: column 'text' is missing or empty; there are: txt"),
        ('{"text": "a"}\n{"text": \n', r"data.jsonl line 2: not valid JSON"),
        ("[1, 2]\n", r"data.jsonl line 1: a JSON list, expected an object"),
        ("\n", r"data.jsonl: nothing to train on"),
    ],
)
def test_bad_lines(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_examples(tmp_path / "data.jsonl", ("text",)))


def test_bad_sources(tmp_path, tokenizer):
    with pytest.raises(DataError, match="nowhere: no such file"):
        list(read_examples(tmp_path / "nowhere", ("text",)))
    (tmp_path / "a.bin").write_bytes(b"1")
    with pytest.raises(DataError, match=r"a\.bin: unknown kind of file; known: \.jsonl"):
        list(read_examples(tmp_path / "a.bin", ("text",)))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(TEXTS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="several splits"):
        list(read_examples(tmp_path / "splits", ("text",)))
    with pytest.raises(DataError, match="list row 0: column 'text' holds int, expected text"):
        list(text_documents([{"text": 3}], tokenizer))
    with pytest.raises(DataError, match="x: 1 labels for 2 tokens"):
        TokenDocument([1, 2], [1], "x")


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CHAT = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "reasoning_content": "R1", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "reasoning_content": "R2", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "<think>\nR3\n</think>\nA2"},
    ],
    "tools": TOOLS,
}
FUNCTION = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2]\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"


def learned(tokenizer, document):
    """The stretches of text with a loss on them."""
    pieces: list[list[int]] = []
    before = -100
    for token, label in zip(document.input_ids, document.labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            pieces.append([]) if before == -100 else None
            pieces[-1].append(token)
        before = label
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("keep", ["R1\n</think>\n" + FUNCTION, "R2\n</think>\nA1<|im_end|>", "R3\n</think>\nA2<|im_end|>"]),
        ("history", ["\n" + FUNCTION, "\nA1<|im_end|>", "R3\n</think>\nA2<|im_end|>"]),
        ("strip", ["\n" + FUNCTION, "A1<|im_end|>", "A2<|im_end|>"]),
    ],
)
def test_a_loss_on_the_assistant_only(tokenizer, reasoning, expected):
    (document,) = chat_documents([CHAT], tokenizer, reasoning)
    assert learned(tokenizer, document) == expected
    text = tokenizer.decode(document.input_ids)
    assert "<name>add</name>" in text and "<tool_response>\n3\n</tool_response>" in text
    assert ("R1" in text, "R3" in text) == (reasoning == "keep", reasoning != "strip")


def test_tables_fill_in_none(tokenizer, tmp_path):
    """A conversation that went through a table, with a None for every field a message does not have, is the same."""
    made = datasets.Dataset.from_list([{"messages": CHAT["messages"], "tools": json.dumps(TOOLS)}])
    assert made[0]["messages"][0]["tool_calls"] is None
    (found,), (expected,) = chat_documents(made, tokenizer), chat_documents([CHAT], tokenizer)
    assert found.input_ids == expected.input_ids and found.labels == expected.labels


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("Q"), {"role": "robot", "content": "A"}], "message 2 has the role 'robot'; known: system, user, assistant"),
        ([user("Q"), {"content": "A"}], "message 2 has the role None"),
        (["Q"], "message 1 has the role 'Q'"),
        ([], "expected a list of messages"),
        ([user("Q")], "no message of the assistant"),
        ([user("Q"), {"role": "assistant", "content": 3}], "content must be a string"),
        ([user("Q"), {"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}], "system message must come"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "message 1: arguments of 'f'",
        ),
    ],
)  # fmt: skip
def test_bad_conversations(tokenizer, messages, message):
    with pytest.raises(DataError, match=f"list row 0: .*{message}"):
        list(chat_documents([{"messages": messages}], tokenizer))


def test_bad_chat_settings(tokenizer):
    with pytest.raises(DataError, match="`reasoning` is 'all'"):
        chat_documents([CHAT], tokenizer, "all")
    with pytest.raises(DataError, match="list row 0: column 'messages' is missing or empty; there are: conversations"):
        list(chat_documents([{"conversations": []}], tokenizer))
    plain = AutoTokenizer.from_pretrained(TINY)
    plain.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not mark the assistant's part"):
        chat_documents([CHAT], plain)
