"""The chat template, rendered by transformers, against conversations written out by hand."""

from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

MODEL_CARD = Path(__file__).parents[2] / "model_card"
TEMPLATE = (MODEL_CARD / "chat_template.jinja").read_text(encoding="utf-8")
NO_SYSTEM = "<|im_start|>system\n<|im_end|>\n"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a <city>.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name, e.g. Zürich"},
                "units": {"type": ["string", "null"], "enum": ["C", "F"], "default": "C"},
                "items": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}


def render(*messages, tools=None, **switches) -> str:
    switches.setdefault("add_generation_prompt", False)
    rendered = render_jinja_template([list(messages)], tools=tools, chat_template=TEMPLATE, **switches)
    return rendered[0][0]


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def tool(content):
    return {"role": "tool", "content": content}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_empty_system_turn_and_generation_prompts():
    assert render() == NO_SYSTEM
    assert render(user("Hi")) == NO_SYSTEM + turn("user", "Hi")
    start = NO_SYSTEM + turn("user", "Hi") + "<|im_start|>assistant\n"
    assert render(user("Hi"), add_generation_prompt=True) == start + "<think>\n"
    assert render(user("Hi"), add_generation_prompt=True, enable_thinking=True) == start + "<think>\n"
    assert render(user("Hi"), add_generation_prompt=True, enable_thinking=False) == start + "<think></think>"


def test_content_is_kept_as_written():
    text = "  <b>&amp; {{ x }}\n\n"
    assert render(system(text), user(text)) == turn("system", text) + turn("user", text)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    assert render(user(parts)) == NO_SYSTEM + turn("user", "abc")


def test_low_effort_marks_the_last_user_message_only():
    messages = [user("1"), assistant("2"), user("3"), assistant("4"), tool("5")]
    assert render(*messages, low_effort=True) == render(*messages).replace(
        turn("user", "3"), turn("user", "3\n\n{reasoning effort: low}")
    )
    assert render(*messages, low_effort=True) != render(*messages)
    assert render(*messages, low_effort=False) == render(*messages)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (assistant("A"), "<think></think>A"),
        (assistant(None), "<think></think>"),
        (assistant("A", reasoning_content="R"), "<think>\nR\n</think>\nA"),
        (assistant("A", reasoning_content="  \n"), "<think></think>A"),
        (assistant("A", reasoning_content=None), "<think></think>A"),
        (assistant("<think>\nR\n</think>\nA"), "<think>\nR\n</think>\nA"),
        (assistant("<think>R</think>A"), "<think>R</think>A"),
        (assistant("<think></think>A\n"), "<think></think>A"),
        (assistant("R\n</think>\nA"), "<think>\nR\n</think>\nA"),
    ],
)
def test_latest_answer_keeps_its_reasoning(message, expected):
    assert render(user("Q"), message) == NO_SYSTEM + turn("user", "Q") + turn("assistant", expected)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (assistant("A"), "<think></think>A"),
        (assistant("A", reasoning_content="R"), "<think></think>\nA"),
        (assistant("<think>\nR\n</think>\nA"), "<think></think>\nA"),
        (assistant("<think>R</think>A"), "<think></think>A"),
        (assistant("R\n</think>\nA"), "<think></think>\nA"),
        (assistant("<think>\nnever closed"), "<think></think>"),
        (
            assistant("A", reasoning_content="R", tool_calls=[call("f")]),
            "<think></think>A\n<tool_call>\n<function=f>\n</function>\n</tool_call>\n",
        ),
    ],
)
def test_history_loses_its_reasoning(message, expected):
    messages = [user("Q"), message, user("Q2")]
    before, after = NO_SYSTEM + turn("user", "Q"), turn("user", "Q2")
    assert render(*messages) == before + turn("assistant", expected) + after
    whole = render(user("Q"), message) + after
    assert render(*messages, truncate_history_thinking=False) == whole


def test_reasoning_between_tool_calls_is_not_history():
    step = assistant("", reasoning_content="R1", tool_calls=[call("f")])
    rendered = render(user("Q"), step, tool("1"), assistant("A", reasoning_content="R2"))
    assert "R1" in rendered and "R2" in rendered
    assert "R1" not in render(user("Q"), step, tool("1"), assistant("A"), user("Q2"))


def test_tool_calls_and_merged_results():
    calls = [call("weather", city="Zürich", lines="a\nb"), call("sum", values=[1, 2.5], of={"k": "<é>"}, n=3)]
    rendered = render(
        user("Q"),
        assistant("Let me look.", reasoning_content="R", tool_calls=calls),
        tool("18"),
        tool("21"),
        user("T"),
        truncate_history_thinking=False,
    )
    assert rendered == NO_SYSTEM + turn("user", "Q") + turn(
        "assistant",
        "<think>\nR\n</think>\nLet me look.\n"
        "<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n"
        "<parameter=lines>\na\nb\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=sum>\n<parameter=values>\n[1, 2.5]\n</parameter>\n"
        '<parameter=of>\n{"k": "<é>"}\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>\n',
    ) + turn(
        "user",
        "<tool_response>\n18\n</tool_response>\n<tool_response>\n21\n</tool_response>\n",
    ) + turn("user", "T")


def test_results_of_separate_steps_stay_in_separate_turns():
    step = assistant("", tool_calls=[call("f")])
    rendered = render(user("Q"), step, tool("1"), step, tool("2"))
    assert turn("user", "<tool_response>\n1\n</tool_response>\n") in rendered
    assert rendered.endswith(turn("user", "<tool_response>\n2\n</tool_response>\n"))
    assert "<think></think>\n<tool_call>\n<function=f>\n</function>\n</tool_call>\n<|im_end|>" in rendered


def test_tools_are_listed_as_xml_after_the_system_message():
    rendered = render(system("Be brief."), user("Q"), tools=[WEATHER, WEATHER["function"] | {"name": "other"}])
    declaration = (
        "<function>\n<name>weather</name>\n<description>Weather of a <city>.</description>\n<parameters>\n"
        "<parameter>\n<name>city</name>\n<type>string</type>\n"
        "<description>Its name, e.g. Zürich</description>\n</parameter>\n"
        '<parameter>\n<name>units</name>\n<type>["string", "null"]</type>\n'
        '<enum>["C", "F"]</enum>\n<default>C</default>\n</parameter>\n'
        '<parameter>\n<name>items</name>\n<type>array</type>\n<items>{"type": "integer"}</items>\n</parameter>\n'
        '<required>["city"]</required>\n</parameters>\n</function>'
    )
    assert rendered.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert f"<tools>\n{declaration}\n{declaration.replace('weather', 'other', 1)}\n</tools>" in rendered
    assert rendered.count("<|im_start|>system") == 1 and rendered.endswith(turn("user", "Q"))
    bare = render(user("Q"), tools=[{"type": "function", "function": {"name": "now"}}])
    assert bare.startswith("<|im_start|>system\n# Tools\n")
    assert "<function>\n<name>now</name>\n<parameters>\n</parameters>\n</function>" in bare


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "narrator", "content": "x"}], "unknown role narrator"),
        ([user("Q"), system("late")], "system message must come first.*position 1"),
        ([user([{"type": "image", "url": "u"}])], "image"),
        ([user({"text": "x"})], "role user"),
        (
            [assistant("", tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1}'}}])],
            "arguments of a call to f",
        ),
    ],
)
def test_what_it_cannot_render_is_refused(messages, complaint):
    with pytest.raises(TemplateError, match=complaint):
        render(*messages)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_CARD / "nemotron-h-tiny", local_files_only=True)


def test_shipped_tokenizer_carries_this_template(tokenizer):
    assert tokenizer.chat_template == TEMPLATE
    assert len(tokenizer) == 8192


def test_assistant_mask_covers_what_the_model_writes(tokenizer):
    messages = [
        user("Q"),
        assistant("", reasoning_content="R1", tool_calls=[call("f")]),
        tool("1"),
        assistant("A", reasoning_content="R2"),
        user("Q2"),
        assistant("B"),
        user("Q3"),
        assistant("C", reasoning_content="R3"),
    ]

    def written(**switches):
        encoded = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True, **switches
        )
        pieces: list[list[int]] = []
        previous = 0
        for token, chosen in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            if chosen and not previous:
                pieces.append([])
            if chosen:
                pieces[-1].append(token)
            previous = chosen
        return [tokenizer.decode(piece) for piece in pieces]

    function = "<tool_call>\n<function=f>\n</function>\n</tool_call>\n"
    assert written() == [f"\n{function}<|im_end|>", "\nA<|im_end|>", "B<|im_end|>", "R3\n</think>\nC<|im_end|>"]
    assert written(truncate_history_thinking=False) == [
        f"R1\n</think>\n{function}<|im_end|>",
        "R2\n</think>\nA<|im_end|>",
        "B<|im_end|>",
        "R3\n</think>\nC<|im_end|>",
    ]


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_an_answer_continues_its_own_prompt(tokenizer, enable_thinking):
    """What was generated, given back as a message, tokenizes to the prompt and the generated ids."""
    prompt = tokenizer.apply_chat_template(
        [user("Q")], add_generation_prompt=True, enable_thinking=enable_thinking, return_dict=False
    )
    generated = "R\n</think>\nA" if enable_thinking else "A"
    ids = prompt + tokenizer(generated + "<|im_end|>").input_ids
    assert tokenizer.apply_chat_template([user("Q"), assistant(generated)], return_dict=False)[: len(ids)] == ids
