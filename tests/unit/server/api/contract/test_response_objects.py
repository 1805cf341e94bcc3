"""The document at /openapi.json says of responses and their events what is so."""

from typing import Any

import pytest

from stellarbyte_server.api.contract.openapi import make_document
from stellarbyte_server.api.contract.response_objects import Response
from stellarbyte_server.api.endpoints import OPERATIONS
from tests.support.documented_objects import conforms

MODEL = "a-model"
DOCUMENT = make_document(OPERATIONS, MODEL, allows_unknown_fields=False)
TOKEN = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": []}
PART = {"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}
ITEM = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [PART]}
CALL_ITEM = {
    "id": "fc_1",
    "type": "function_call",
    "status": "completed",
    "call_id": "call_1",
    "name": "weather",
    "arguments": "{}",
}
TOOL = {"type": "function", "name": "weather", "description": None, "parameters": {"type": "object"}, "strict": True}
CHOICE = {"type": "function", "name": "weather"}
PLACE = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1764000000,
    "completed_at": 1764000001,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "background": False,
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "model": MODEL,
    "output": [ITEM],
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": {
        "input_tokens": 2,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 3,
    },
    "user": None,
}

THOUGHT = {
    "id": "rs_1",
    "type": "reasoning",
    "status": "completed",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
}
ANSWERS: list[dict[str, Any]] = [
    RESPONSE,
    RESPONSE | {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}},
    RESPONSE | {"output": [CALL_ITEM], "tools": [TOOL], "tool_choice": CHOICE},
    RESPONSE | {"output": [THOUGHT, ITEM]},
    RESPONSE | {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [CHOICE]}},
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_responses_are_as_described(answer: dict[str, Any]) -> None:
    assert conforms(DOCUMENT, "Response", answer)
    Response.model_validate(answer)
    for name, field in Response.model_fields.items():
        without = {key: value for key, value in answer.items() if key != name}
        assert conforms(DOCUMENT, "Response", without) != field.is_required()
    assert not conforms(DOCUMENT, "Response", answer | {"more": None})


EVENTS: list[dict[str, Any]] = [
    {"type": "response.created", "response": RESPONSE | {"output": [], "usage": None, "status": "in_progress"}},
    {"type": "response.output_item.done", "output_index": 0, "item": ITEM},
    {"type": "response.output_item.added", "output_index": 1, "item": CALL_ITEM | {"status": "in_progress"}},
    {
        "type": "response.function_call_arguments.delta",
        "item_id": "fc_1",
        "output_index": 1,
        "delta": "{",
    },
    {
        "type": "response.function_call_arguments.done",
        "item_id": "fc_1",
        "output_index": 1,
        "name": "weather",
        "arguments": "{}",
    },
    PLACE | {"type": "response.content_part.added", "part": PART},
    PLACE | {"type": "response.output_text.delta", "delta": "h", "logprobs": [TOKEN]},
    PLACE | {"type": "response.output_text.done", "text": "hi", "logprobs": []},
    {"type": "response.output_item.done", "output_index": 0, "item": THOUGHT},
    PLACE | {"type": "response.content_part.done", "part": THOUGHT["content"][0]},
    PLACE | {"type": "response.reasoning_text.delta", "delta": "h"},
    PLACE | {"type": "response.reasoning_text.done", "text": "hm"},
    {"type": "response.incomplete", "response": RESPONSE | {"incomplete_details": {"reason": "max_output_tokens"}}},
    {
        "type": "response.failed",
        "response": RESPONSE | {"status": "failed", "error": {"code": "server_error", "message": "The engine failed."}},
    },
    {"type": "error", "code": "server_error", "message": "The engine failed.", "param": None},
]


@pytest.mark.parametrize("event", EVENTS)
def test_events_of_responses_are_as_described(event: dict[str, Any]) -> None:
    assert conforms(DOCUMENT, "ResponseEvent", event | {"sequence_number": 0})
    assert not conforms(DOCUMENT, "ResponseEvent", event)
    assert not conforms(DOCUMENT, "ResponseEvent", event | {"sequence_number": 0, "more": None})
