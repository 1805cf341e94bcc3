"""POST /v1/responses: OpenAI's newer form of a chat, text only and stateless. Runs as the chat it asks for."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.answer import AnswerPlan, count_tokens, note_adapter, read_deltas
from stellarbyte_server.api.answers.choices import Fragment
from stellarbyte_server.api.answers.sse import DeltaStreamResponse, encode_json
from stellarbyte_server.api.chat.plan import plan_chat
from stellarbyte_server.api.contract import response_objects
from stellarbyte_server.api.contract.bodies.responses import LOGPROBS, ResponsesBody
from stellarbyte_server.api.contract.errors import ApiError, bad_request, from_engine
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.generation import read_body
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.api.submission import submit
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.observe.record import TokenCount
from stellarbyte_server.protocol.request import RequestRejected

router = APIRouter()

# Fields of a chat under the names they have here.
_PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "context_overflow": "truncation",
    "response_format": "text.format",
}


@router.post("/v1/responses")
@Operation(
    access=Access.USER,
    summary="Answer a chat, in the form of OpenAI's Responses API",
    tag="Generation",
    bodies=(ResponsesBody,),
    answer=response_objects.Response,
    event=response_objects.ResponseEvent,
    ends_with_done=False,
    errors=GENERATION_REFUSED,
)
async def create_response(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, ResponsesBody)
    if body.previous_response_id is not None:
        raise bad_request(
            "No response is stored, so none can be gone on from; give the whole conversation as 'input'.",
            "previous_response_id",
        )
    if body.top_logprobs is not None and not body.with_logprobs:
        raise bad_request(f"The field 'top_logprobs' needs '{LOGPROBS}' in 'include'.", "top_logprobs")
    try:
        plan = await plan_chat(http, body.as_chat(), service)
    except ApiError as error:
        error.param = _PARAMS.get(error.param or "", error.param)
        raise
    plan = replace(plan, grammar_param=_PARAMS.get(plan.grammar_param or ""))
    tokens = count_tokens(http, plan.requests)
    writing = _Writing(body, plan, tokens)
    try:
        if body.stream:
            streams = await unless_client_leaves(http.receive, submit(http, service, *plan.requests))
            note_adapter(http, plan.requests[0], streams)
            return DeltaStreamResponse(streams, _events(streams[0], plan, writing), headers)
        await unless_client_leaves(http.receive, _read(http, service, plan, writing))
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error, plan.grammar_param) from None
    return Response(encode_json(writing.response()), media_type="application/json", headers=headers)


async def _read(http: Request, service: Service, plan: AnswerPlan, writing: "_Writing") -> None:
    (stream,) = await submit(http, service, *plan.requests)
    reader = plan.reader(0)
    try:
        note_adapter(http, plan.requests[0], [stream])
        async for _, delta in read_deltas([stream], writing.tokens, grammar_param=plan.grammar_param):
            writing.add(reader.read(delta))
    finally:
        stream.close()


async def _events(stream: DeltaStream, plan: AnswerPlan, writing: "_Writing") -> AsyncIterator[bytes]:
    reader = plan.reader(0)
    yield writing.begin()
    try:
        async for _, delta in read_deltas([stream], writing.tokens, grammar_param=plan.grammar_param):
            fragment = reader.read(delta)
            writing.add(fragment)
            if fragment.text or fragment.logprobs is not None:
                yield writing.delta(fragment)
    except ApiError as error:
        code = "server_error" if error.code is None else error.code
        yield writing.event("error", code=code, message=str(error), param=error.param)
        return
    yield writing.end()


class _Writing:
    """One response as far as it has come, and its events."""

    def __init__(self, body: ResponsesBody, plan: AnswerPlan, tokens: TokenCount) -> None:
        self.tokens = tokens
        self._body = body
        self._sampling = plan.requests[0].sampling
        self._overflow = plan.requests[0].context_overflow
        self._id = plan.requests[0].request_id
        self._created_at = int(time.time())
        self._num_events = 0
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None
        self._place = {"item_id": f"msg_{self._id}", "output_index": 0, "content_index": 0}

    def add(self, fragment: Fragment) -> None:
        self._texts.append(fragment.text)
        self._logprobs += _entries(fragment)
        self._finish_reason = fragment.finish_reason

    def response(self) -> dict[str, Any]:
        """The whole object as of now."""
        body, is_over = self._body, self._finish_reason is not None
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created_at,
            "status": self._status(),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._finish_reason == "length" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {} if body.metadata is None else body.metadata,
            "model": body.model,
            "output": [self._item()] if is_over else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self._sampling.temperature,
            "text": {"format": self._format()},
            "tool_choice": "none",
            "tools": [],
            "top_p": self._sampling.top_p,
            "truncation": "auto" if self._overflow == "slide" else "disabled",
            "usage": self._usage() if is_over else None,
        }

    def event(self, kind: str, **fields: Any) -> bytes:
        content = {"type": kind, "sequence_number": self._num_events} | fields
        self._num_events += 1
        return f"event: {kind}\n".encode() + b"data: " + encode_json(content) + b"\n\n"

    def begin(self) -> bytes:
        item = {"id": self._place["item_id"], "type": "message", "status": "in_progress", "role": "assistant"}
        return b"".join(
            [
                self.event("response.created", response=self.response()),
                self.event("response.in_progress", response=self.response()),
                self.event("response.output_item.added", output_index=0, item=item | {"content": []}),
                self.event("response.content_part.added", **self._place, part=_part("", [])),
            ]
        )

    def delta(self, fragment: Fragment) -> bytes:
        kind = "response.output_text.delta"
        return self.event(kind, **self._place, delta=fragment.text, logprobs=_entries(fragment))

    def end(self) -> bytes:
        text = "".join(self._texts)
        return b"".join(
            [
                self.event("response.output_text.done", **self._place, text=text, logprobs=self._logprobs),
                self.event("response.content_part.done", **self._place, part=_part(text, self._logprobs)),
                self.event("response.output_item.done", output_index=0, item=self._item()),
                self.event(f"response.{self._status()}", response=self.response()),
            ]
        )

    def _status(self) -> str:
        if self._finish_reason is None:
            return "in_progress"
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _item(self) -> dict[str, Any]:
        part = _part("".join(self._texts), self._logprobs)
        item = {"id": self._place["item_id"], "type": "message", "status": self._status(), "role": "assistant"}
        return item | {"content": [part]}

    def _format(self) -> dict[str, Any]:
        wanted = None if self._body.text is None else self._body.text.format
        if wanted is None or wanted.type != "json_schema":
            return {"type": "text" if wanted is None else wanted.type}
        return wanted.model_dump(by_alias=True, exclude_none=True)

    def _usage(self) -> dict[str, Any]:
        tokens = self.tokens
        return {
            "input_tokens": tokens.prompt,
            "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
            "output_tokens": tokens.completion,
            "output_tokens_details": {"reasoning_tokens": tokens.reasoning or 0},
            "total_tokens": tokens.prompt + tokens.completion,
        }


def _part(text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _entries(fragment: Fragment) -> list[dict[str, Any]]:
    return [] if fragment.logprobs is None else fragment.logprobs["content"]
