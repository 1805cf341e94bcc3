"""Messages are converted to the form that a chat template reads, with tools, calls and results."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from pydantic_core import from_json

from stellarbyte_server.api.chat.tools import Toolbox, describe_tool, template_takes_tools
from stellarbyte_server.api.contract.bodies.tools import FunctionTool, ToolCall
from stellarbyte_server.api.structured.tool_calls import HERMES


class ChatMessage(Protocol):
    """What is read of a message of a request."""

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
    def tool_call_id(self) -> str | None: ...


def messages_for_template(
    messages: Sequence[ChatMessage], toolbox: Toolbox | None, template_source: str | None = None
) -> list[dict[str, Any]]:
    """Messages as the chat template knows them.

    `template_source` tells, where there is no toolbox, how earlier calls are shown.
    """
    known = [_known_fields(message) for message in messages]
    if template_takes_tools(template_source) if toolbox is None else toolbox.takes_tools:
        return with_parsed_arguments(known)
    offered = () if toolbox is None or toolbox.choice == "none" else toolbox.tools
    return with_tool_prompt(known, offered)


def _known_fields(message: ChatMessage) -> dict[str, Any]:
    """Templates call the developer's role system."""
    texts = (text for text in (message.content, message.refusal, "") if text is not None)
    content = next(texts)
    known: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.name is not None:
        known["name"] = message.name
    if message.tool_calls:
        known["tool_calls"] = [
            {"id": call.id, "type": "function", "function": call.function.model_dump(include={"name", "arguments"})}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        known["tool_call_id"] = message.tool_call_id
    return known


def with_parsed_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows tools: it wants arguments as objects, where they are, not as text."""
    return [
        {**message, "tool_calls": list(_parsed_calls(message))} if message.get("tool_calls") else dict(message)
        for message in messages
    ]


def _parsed_calls(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for call in message["tool_calls"]:
        arguments = _parsed_arguments(call["function"]["arguments"])
        yield {**call, "function": {**call["function"], "arguments": arguments}}


def _parsed_arguments(text: str) -> dict[str, Any] | str:
    """A JSON object, or the text itself: a call may have been cut off by its answer's length."""
    try:
        arguments = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        return text
    return arguments if isinstance(arguments, dict) else text


def with_tool_prompt(messages: Sequence[Mapping[str, Any]], tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    """Messages for a template that knows nothing of tools: all of it is text of messages it knows."""
    shown: list[dict[str, Any]] = []
    results: list[str] = []  # that follow each other: templates want the user and the assistant to take turns
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "tool":
            results.append(f"<tool_response>\n{content}\n</tool_response>")
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                shown.append({"role": "user", "content": "\n".join(results)})
                results = []
        elif message.get("tool_calls"):
            calls = [_call_text(call["function"]) for call in _parsed_calls(message)]
            shown.append({"role": role, "content": "\n".join([content, *calls] if content else calls)})
        else:
            shown.append(dict(message))
    if not tools:
        return shown
    instructions = _instructions(tools)
    if shown and shown[0]["role"] == "system":
        shown[0]["content"] += f"\n\n{instructions}"
    else:
        shown.insert(0, {"role": "system", "content": instructions})
    return shown


def _call_text(function: Mapping[str, Any]) -> str:
    call = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"{HERMES.trigger}{HERMES.begin}{call}{HERMES.end}"


def _instructions(tools: Sequence[FunctionTool]) -> str:
    lines = "\n".join(json.dumps(describe_tool(tool), ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to help with the user's request. These are the functions, each as one line of JSON:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call one, write its name and its arguments as JSON in this form:\n"
        '<tool_call>\n{"name": "the name", "arguments": {"a parameter": "its value"}}\n</tool_call>\n'
        "Its result comes back in <tool_response> tags."
    )
