"""`nemotron-super serve` and `chat`: transformers' server and client on the model of the repository."""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nemotron_super
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving import utils as serving

TINY = str(Path(nemotron_super.__file__).parent / "model_card" / "nemotron-h-tiny")
COMMAND = [sys.executable, "-m", "nemotron_super.cli"]


@pytest.fixture(scope="module")
def server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen([*COMMAND, "serve", TINY, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for _ in range(240):
        try:
            urllib.request.urlopen(address + "/health", timeout=2)
            break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, process.stdout.read().decode()[-3000:]
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(timeout=30)


def ask(address, **body):
    body = {"model": TINY, "messages": [{"role": "user", "content": "def f("}], "temperature": 0, **body}
    request = urllib.request.Request(
        address + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=120).read().decode()


@pytest.fixture(scope="module")
def expected():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "def f("}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def text_of(message):
    """What the model wrote: after `<think>` it is all reasoning until that is closed, which this model never does."""
    return (message.get("reasoning_content") or "") + (message.get("content") or "")


def test_an_answer(server, expected):
    answer = json.loads(ask(server, max_tokens=24))
    assert text_of(answer["choices"][0]["message"]).strip() == expected.strip()
    assert answer["usage"]["completion_tokens"] == 24


def test_streaming(server, expected):
    lines = [line.removeprefix("data: ") for line in ask(server, max_tokens=24, stream=True).splitlines() if line]
    parts = [json.loads(line)["choices"] for line in lines if line.startswith("{")]
    texts = [text_of(part[0]["delta"]) for part in parts if part]
    assert sum(bool(text) for text in texts) > 5 and "".join(texts).strip() == expected.strip()


def test_a_stop_string(server, expected):
    word = expected.strip()[4:8]
    answer = json.loads(ask(server, max_tokens=24, stop=[word]))
    text = text_of(answer["choices"][0]["message"])
    assert word in text and len(text) < len(expected) and answer["choices"][0]["finish_reason"] == "stop"


def test_chat(server, tmp_path):
    command = [*COMMAND, "chat", TINY, server + "/v1", "max_new_tokens=8", "--save-folder", str(tmp_path)]
    done = subprocess.run(command, input="def f(\nn\n!exit\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 tokens" in done.stdout


def test_tool_calls_and_reasoning_are_parsed():
    """As written by the chat template's own history, so that what is read is what was asked for."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    question = [{"role": "user", "content": "Weather?"}]
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
        {"type": "function", "function": {"name": "time", "arguments": {}}},
    ]
    answer = {"role": "assistant", "reasoning_content": "Two calls.", "content": "One moment.", "tool_calls": calls}
    prefix = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*question, answer], tokenize=False)
    assert whole.startswith(prefix)
    ids = tokenizer(whole[len(prefix) :], add_special_tokens=False).input_ids
    assert tokenizer.parse_response(ids, prefix=prefix) == answer


@pytest.mark.parametrize("streamed", [False, True])
def test_the_server_parses_tool_calls(streamed):
    """Its own parser, on what the model would write: reasoning, text and calls arrive apart, numbers as numbers."""
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    tool = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": properties}}
    tools = [{"type": "function", "function": tool}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Weather?"}], tools=tools, add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    ).input_ids  # fmt: skip
    written = (
        "I think.\n</think>\nOne moment.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"
    )
    ids = torch.tensor(tokenizer(written, add_special_tokens=False).input_ids)
    if streamed:
        parser = serving.build_response_parser(tokenizer, model, prompt, tools=tools)
        events = [event for token in ids for event in parser.feed(tokenizer.decode(token))]
        chunks = serving.response_events_to_chunks([*parser.initial_events, *events, *parser.finalize()[1]])
        calls = [chunk for chunk in chunks if isinstance(chunk, serving.ToolCall)]
        reasoning = "".join(chunk for chunk in chunks if isinstance(chunk, serving.ReasoningText))
        content = "".join(chunk for chunk in chunks if type(chunk) is str)
    else:
        content, reasoning, calls = serving.parse_assistant_message(
            tokenizer, model, ids, input_ids=prompt, tools=tools
        )
    assert (content.strip(), reasoning.strip()) == ("One moment.", "I think.")
    assert calls == [serving.ToolCall("weather", '{"city": "Rome", "days": 3}')]


@pytest.mark.parametrize("drafts", [{}, {"use_mtp": True}], ids=str)
def test_the_server_counts_tokens(drafts):
    """Its streamer is given tokens one or several at a time, and says how many there were."""
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    ids = tokenizer("def f(", return_tensors="pt").input_ids

    async def written():
        queue: asyncio.Queue = asyncio.Queue()
        streamer = serving.DirectStreamer(tokenizer._tokenizer, asyncio.get_running_loop(), queue)
        found = model.generate(ids, streamer=streamer, max_new_tokens=12, do_sample=False, eos_token_id=None, **drafts)
        parts = [await queue.get()]
        while parts[-1] is not None:
            parts.append(await queue.get())
        assert "".join(parts[:-1]) == tokenizer.decode(found[0, ids.shape[1] :])
        return streamer.total_tokens

    assert asyncio.run(written()) == 12


def test_continuous_batching_is_refused():
    model = AutoModelForCausalLM.from_pretrained(TINY)
    with pytest.raises(ValueError, match=r"Continuous batching.*recurrent state"):
        model.generate_batch([[1, 2, 3]])
