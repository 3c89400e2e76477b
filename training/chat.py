"""Conversations as training documents: through the tokenizer's chat template, with a loss on what the assistant says only.

A conversation is a list of messages with `role` (system, user, assistant, tool), `content`, and for the assistant
`reasoning_content` and `tool_calls`; tools that may be called stand beside it, as in transformers' chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from .documents import DataError, DocumentStream, TokenDocument

ROLES = ("system", "user", "assistant", "tool")
Reasoning = Literal["keep", "history", "strip"]


def chat_documents(
    source: str | Path | Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    reasoning: Reasoning = "keep",
    column: str = "messages",
    tools_column: str = "tools",
) -> DocumentStream:
    """Conversations as documents.

    Args:
        source: see `documents.read_examples`; examples have `column`, and may have `tools_column`.
        reasoning: "keep" all traces; "history" drops those before the last user turn, as prompts do in use; "strip"
            drops all of them.

    Raises:
        DataError: a tokenizer whose chat template does not mark the assistant's part; while iterating, a conversation
            that is empty, has an unknown role, or that the template refuses.
    """
    if "{%- generation" not in (tokenizer.chat_template or "") and "{% generation" not in (
        tokenizer.chat_template or ""
    ):
        raise DataError(
            "The tokenizer's chat template does not mark the assistant's part with {% generation %}: the loss would not "
            "know where to be. Use model_card/chat_template.jinja."
        )
    if reasoning not in ("keep", "history", "strip"):
        raise DataError(f"`reasoning` is {reasoning!r}: choose 'keep', 'history' or 'strip'.")

    def encode(name: str, example: dict[str, Any]) -> TokenDocument:
        messages = _checked(name, example[column], reasoning)
        tools = example.get(tools_column) or None
        try:
            encoded: Any = tokenizer.apply_chat_template(
                messages,
                tools=json.loads(tools) if isinstance(tools, str) else _without_none(tools),
                truncate_history_thinking=reasoning != "keep",
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
        except (jinja2.TemplateError, json.JSONDecodeError) as error:
            raise DataError(f"{name}: {error}") from error
        ids, ours = encoded["input_ids"], encoded["assistant_masks"]
        return TokenDocument(ids, [i if own else -100 for i, own in zip(ids, ours, strict=True)], name)

    return DocumentStream(source, encode, (column,))


def _checked(name: str, messages: Any, reasoning: Reasoning) -> list[dict]:
    """The messages as the template wants them, or a `DataError` that says which is not."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{name}: expected a list of messages, found {messages!r:.80}.")
    checked = []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise DataError(f"{name}: message {place} has the role {role!r:.80}; known: {', '.join(ROLES)}.")
        # Tables fill what a message does not have with None.
        message = _without_none(dict(message))
        if message.get("tool_calls"):
            message["tool_calls"] = [_call(name, place, call) for call in message["tool_calls"]]
        if reasoning == "strip" and message["role"] == "assistant":
            message.pop("reasoning_content", None)
            if isinstance(message.get("content"), str):
                message["content"] = _without_thoughts(message["content"])
        checked.append(message)
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError(f"{name}: no message of the assistant, so nothing to learn.")
    return checked


def _call(name: str, place: int, call: Mapping) -> dict:
    """A tool call whose arguments are a mapping; many datasets hold them as JSON text."""
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise DataError(f"{name}: message {place}: arguments of {function.get('name')!r}: {error}.") from error
    return {**call, "function": function} if "function" in call else function


def _without_thoughts(content: str) -> str:
    if "</think>" in content:
        return content.rpartition("</think>")[2].lstrip()
    return "" if content.lstrip().startswith("<think>") else content


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value
