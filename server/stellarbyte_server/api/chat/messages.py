"""Converts messages, with tools, calls and results, to the form that a chat template reads."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from pydantic_core import from_json

from stellarbyte_server.api.chat.tool_prompt import with_tool_prompt
from stellarbyte_server.api.chat.tool_results import (
    REASONING_FIELDS,
    with_call_after_call,
    with_results_in_order,
    with_short_ids,
)
from stellarbyte_server.api.chat.tools import Toolbox, template_takes_tools, tool_format
from stellarbyte_server.api.contract.bodies.tools import FunctionCall, ToolCall
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.structured.offered_tools import INPUT
from stellarbyte_server.api.structured.tool_formats import ToolFormat


class ChatMessage(Protocol):
    """The fields read from a message of a request."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str | None: ...
    @property
    def refusal(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def tool_calls(self) -> Sequence[ToolCall] | None: ...
    @property
    def reasoning_content(self) -> str | None: ...
    @property
    def reasoning(self) -> str | None: ...
    @property
    def tool_call_id(self) -> str | None: ...
    @property
    def function_call(self) -> FunctionCall | None: ...


def messages_for_template(
    messages: Sequence[ChatMessage],
    toolbox: Toolbox | None,
    template_source: str | None = None,
    *,
    takes_system: bool = True,
    may_end_open: bool = False,
) -> list[dict[str, Any]]:
    """Messages in the form that the chat template reads; ApiError if results do not match their calls.

    Without a toolbox, `template_source` determines the format of earlier calls. `takes_system`: the template supports
    system messages. `may_end_open`: the last call may lack its result.
    """
    name = reasoning_field(template_source)
    known = [given | _reasoning(message, name) for given, message in zip(_known(messages), messages, strict=True)]
    known = with_results_in_order(known, may_end_open=may_end_open)
    if template_takes_tools(template_source) if toolbox is None else toolbox.takes_tools:
        return for_template_with_tools(known, tool_format(template_source) if toolbox is None else toolbox.format)
    offered = () if toolbox is None or toolbox.choice == "none" else toolbox.tools
    return with_tool_prompt(with_parsed_arguments(known), offered, takes_system=takes_system)


def _known(messages: Sequence[ChatMessage]) -> Iterator[dict[str, Any]]:
    """The fields that templates read. Deprecated function calls and their results become tool calls and results."""
    called: FunctionCall | None = None  # by the previous message
    for i, message in enumerate(messages):
        known = _known_fields(message)
        if message.role == "function":
            if called is None or called.name != message.name:
                raise bad_request(
                    "A message with the role function must follow the assistant's function_call of that name.",
                    f"messages[{i}]",
                )
            known |= {"role": "tool", "tool_call_id": f"function_{i - 1}"}
        called = message.function_call
        if called is not None:
            known["tool_calls"] = [_call(f"function_{i}", called.name, called.arguments)]
        yield known


def _known_fields(message: ChatMessage) -> dict[str, Any]:
    """Templates use the role system for developer messages."""
    content = message.refusal if message.content is None else message.content
    known: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": "" if content is None else content,
    }
    if message.name is not None:
        known["name"] = message.name
    if message.tool_calls:
        known["tool_calls"] = [_known_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        known["tool_call_id"] = message.tool_call_id
    return known


def _known_call(call: ToolCall) -> dict[str, Any]:
    """Custom tools are presented to models as functions with one parameter."""
    if call.custom is not None:
        return _call(call.id, call.custom.name, json.dumps({INPUT: call.custom.input}, ensure_ascii=False))
    assert call.function is not None, "checked with the body"
    return _call(call.id, call.function.name, call.function.arguments)


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def for_template_with_tools(messages: Sequence[dict[str, Any]], format: ToolFormat) -> list[dict[str, Any]]:
    """Messages for a template that supports tools, and writes calls in `format`."""
    shown = with_parsed_arguments(messages)
    if format.arguments == "tags":
        shown = [_with_objects(message) for message in shown]
    if format.in_channels:
        shown = [_with_one_thought(message) for message in shown]
    if format.separator is None:
        shown = with_call_after_call(shown)
    return with_short_ids(shown) if format.short_ids else shown


def reasoning_field(template_source: str | None) -> str | None:
    """The message field from which a template reads the assistant's reasoning; None: it reads none."""
    names = re.findall(rf"(?:\.|\[['\"])({'|'.join(REASONING_FIELDS)})\b(?!\.)", template_source or "")
    return next((name for name in REASONING_FIELDS if name in names), None)


def _reasoning(message: ChatMessage, name: str | None) -> dict[str, str]:
    """The message's reasoning as the field `name`, if the template reads one."""
    if name is None:
        return {}
    reasoning = message.reasoning_content or message.reasoning
    return {name: reasoning} if reasoning else {}


def _with_one_thought(message: dict[str, Any]) -> dict[str, Any]:
    """For templates that show one text before a call: the content follows the reasoning, as more of it."""
    name = next((name for name in REASONING_FIELDS if message.get(name)), None)
    if name is None or not (message.get("tool_calls") and message["content"]):
        return message
    return {**message, name: f"{message[name]}\n{message['content']}", "content": ""}


def with_parsed_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with the arguments of calls parsed from JSON where they are objects."""
    return [
        {**message, "tool_calls": list(_parsed_calls(message))} if message.get("tool_calls") else dict(message)
        for message in messages
    ]


def _parsed_calls(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for call in message["tool_calls"]:
        arguments = _parsed_arguments(call["function"]["arguments"])
        yield {**call, "function": {**call["function"], "arguments": arguments}}


def _parsed_arguments(text: str) -> dict[str, Any] | str:
    """A JSON object, or the text itself if it is not one: the answer's length may have truncated the call."""
    try:
        arguments = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        return text
    return arguments if isinstance(arguments, dict) else text


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """For templates that iterate over parameters: arguments that are a text become a single parameter."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        whole = {"arguments": arguments} if isinstance(arguments, str) else arguments
        calls.append({**call, "function": {**call["function"], "arguments": whole}})
    return {**message, "tool_calls": calls}
