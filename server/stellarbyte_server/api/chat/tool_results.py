"""Matches the results of tools to the calls of the preceding message, by their ids."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stellarbyte_server.api.contract.errors import bad_request

_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")
_SHORT_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of messages, in templates

Message = dict[str, Any]


def with_results_in_order(messages: Sequence[Message], *, may_end_open: bool) -> list[Message]:
    """The messages, with results in the order of their calls, because templates may ignore ids.

    ApiError, naming the message, for a result without its call, a second result, and a call without a result before the
    next message, or at the end unless `may_end_open`.
    """
    ordered: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        if message["role"] == "tool":
            raise bad_request(
                "A message with the role tool must follow a message by the assistant with tool_calls.",
                f"messages[{position}]",
            )
        ordered.append(message)
        start = position + 1
        position = start
        while position < len(messages) and messages[position]["role"] == "tool" and message.get("tool_calls"):
            position += 1
        if message.get("tool_calls"):
            is_end = may_end_open and position == len(messages)
            ordered += _results(message, messages[start:position], start, is_end)
    return ordered


def _results(message: Message, results: Sequence[Message], start: int, may_be_open: bool) -> Iterator[Message]:
    """The results of a message's calls, in the order of the calls. `results` begin at messages[start]."""
    calls: dict[str, Message] = {}
    for i, call in enumerate(message["tool_calls"]):
        if call["id"] in calls:
            path = f"messages[{start - 1}].tool_calls[{i}].id"
            raise bad_request(f"Two calls of this message have the id {_shown(call['id'])}; ids must differ.", path)
        calls[call["id"]] = call
    by_id: dict[str, Message] = {}
    for i, result in enumerate(results, start):
        call_id = result["tool_call_id"]
        if call_id not in calls:
            why = "which is not a call of the preceding message"
        elif call_id in by_id:
            why = "which already has a result"
        else:
            by_id[call_id] = result
            continue
        raise bad_request(f"A tool's message answers the call {_shown(call_id)}, {why}.", f"messages[{i}].tool_call_id")
    missing = [call_id for call_id in calls if call_id not in by_id]
    if missing and not may_be_open:
        raise bad_request(
            f"The call {_shown(missing[0])} has no result: a message with the role tool and its tool_call_id must"
            " follow.",
            f"messages[{start - 1}]",
        )
    return (by_id[call_id] for call_id in calls if call_id in by_id)


def _shown(call_id: str) -> str:
    return f"{call_id!r:.80}"


def with_call_after_call(messages: Sequence[Message]) -> list[Message]:
    """The messages for a template with one call per message: each call is followed by its result."""
    shown: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        calls = message.get("tool_calls") or ()
        position += 1
        if len(calls) < 2:
            shown.append(message)
            continue
        results = {}
        while position < len(messages) and messages[position]["role"] == "tool":
            results[messages[position]["tool_call_id"]] = messages[position]
            position += 1
        for i, call in enumerate(calls):
            shown.append({**(_without_texts(message) if i else message), "tool_calls": [call]})
            if call["id"] in results:
                shown.append(results[call["id"]])
    return shown


def _without_texts(message: Message) -> Message:
    return {name: value for name, value in message.items() if name not in REASONING_FIELDS} | {"content": ""}


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages for a template that requires ids of nine letters and digits."""
    return [_with_short_ids(message) for message in messages]


def _with_short_ids(message: Message) -> Message:
    short: Message = dict(message)
    if "tool_call_id" in message:
        short["tool_call_id"] = _short_id(message["tool_call_id"])
    if message.get("tool_calls"):
        short["tool_calls"] = [_with_short_id(call) for call in message["tool_calls"]]
    return short


def _with_short_id(call: Mapping[str, Any]) -> Message:
    return {**call, "id": _short_id(call["id"])}


def _short_id(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    digest = hashlib.sha256(call_id.encode("utf-8", "replace")).digest()
    return "".join(_SHORT_ID_ALPHABET[byte % len(_SHORT_ID_ALPHABET)] for byte in digest[:9])
