"""Writes tools, calls and results as text, for chat templates without support for tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stellarbyte_server.api.chat.tools import describe_tool
from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.api.structured.tool_formats import HERMES


def with_tool_prompt(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[OfferedTool], *, takes_system: bool = True
) -> list[dict[str, Any]]:
    """Messages with the roles system, user and assistant only. The arguments of `messages` must be parsed.

    The tools are described in the system message, or in the first user message if the template takes no system message.
    """
    shown: list[dict[str, Any]] = []
    results: list[str] = []  # since the last message by the assistant
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if results:
            shown.append({"role": "user", "content": "\n".join(results)})
        if results and message["role"] == "user":  # templates require user and assistant to alternate
            shown[-1]["content"] += f"\n{message['content']}"
        elif message.get("tool_calls"):
            texts = [message["content"], *(_call_text(call["function"]) for call in message["tool_calls"])]
            shown.append({"role": message["role"], "content": "\n".join(text for text in texts if text)})
        else:
            shown.append(dict(message))
        results = []
    if results:
        shown.append({"role": "user", "content": "\n".join(results)})
    if tools:
        _instruct(shown, _instructions(tools), takes_system)
    return shown


def _instruct(shown: list[dict[str, Any]], instructions: str, takes_system: bool) -> None:
    """Add instructions to the system message, or to the first user message if the template takes no system message."""
    if shown and shown[0]["role"] == "system":
        shown[0]["content"] += f"\n\n{instructions}"
    elif takes_system:
        shown.insert(0, {"role": "system", "content": instructions})
    elif shown and shown[0]["role"] == "user":
        shown[0]["content"] = f"{instructions}\n\n{shown[0]['content']}"
    else:
        shown.insert(0, {"role": "user", "content": instructions})


def _call_text(function: Mapping[str, Any]) -> str:
    call = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"{HERMES.trigger}\n{call}\n</tool_call>"


def _instructions(tools: Sequence[OfferedTool]) -> str:
    """Without an example, because small models copy its values into calls."""
    lines = "\n".join(json.dumps(describe_tool(tool), ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to help with the user's request. These are the functions, each as one line of JSON:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call one, write a JSON object with its name and its arguments, between the tags of a call:\n"
        '<tool_call>\n{"name": <function>, "arguments": <object>}\n</tool_call>\n'
        "Its result comes back in <tool_response> tags."
    )
