"""An answer runs the engine's requests and returns their text, streamed or whole."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from stellarbyte_server.api.answers.choices import ChoiceReader, Fragment, Kind, prompt_fields
from stellarbyte_server.api.answers.ends import UNCHECKED, AnswerEnds, KeptRequest
from stellarbyte_server.api.answers.queueing import stream_when_running
from stellarbyte_server.api.answers.receipt import make_receipt
from stellarbyte_server.api.answers.sse import DONE, ChunkWriter, encode_json, event
from stellarbyte_server.api.contract.bodies.generation import GenerationBody
from stellarbyte_server.api.contract.errors import ApiError, from_engine
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.structured.answer_check import AnswerCheck
from stellarbyte_server.api.submission import record_of, submit
from stellarbyte_server.client.delta_stream import DeltaStream
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.observe.record import TokenCount
from stellarbyte_server.protocol.adapter_reference import AdapterReference
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest, RequestRejected

_ID_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}
_PATH = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
_OBJECT = {"chat": "chat.completion", "completion": "text_completion"}
_INLINE_TOKENS = 5000  # longer answers are written in a thread, so that they do not delay streams
_CHUNK_OBJECT = {"chat": "chat.completion.chunk", "completion": "text_completion"}


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """The engine's requests for one body, and the form of the answer.

    Each prompt has `candidates` consecutive requests; the best `choices` of their answers are shown.
    """

    kind: Kind
    model: str  # as named by the client
    requests: tuple[GenerationRequest, ...]
    candidates: int
    choices: int
    reader: Callable[[int], ChoiceReader]  # by the index of the request
    stream: bool
    grammar_param: str | None = None  # the field that the requests' grammar comes from
    check: AnswerCheck | None = None  # of finished answers
    include_usage: bool = False
    continuous_usage: bool = False
    begins_with_text: bool = True  # of a chat; False: its answers consist of tool calls only
    ignored: tuple[str, ...] = ()  # paths of fields without an effect on this model
    kept: KeptRequest | None = None  # for --feedback
    receipt_of: GenerationBody | None = None  # add a receipt of the answers to this body


async def answer(http: Request, service: Service, plan: AnswerPlan, headers: dict[str, str]) -> Response:
    """Run a plan's requests and answer them. Headers are sent once the engine has begun to run one."""
    tokens = count_tokens(http, plan.requests, plan.candidates)
    try:
        if plan.stream:

            def events(streams: list[DeltaStream]) -> AsyncIterator[bytes]:
                base = _base(service, plan, note_adapter(http, plan.requests[0], streams), _CHUNK_OBJECT)
                so_far = tokens.usage if plan.continuous_usage else None
                include_usage = plan.include_usage
                writer = ChunkWriter(base, plan.kind, len(streams), include_usage=include_usage, usage_so_far=so_far)
                return _events(streams, plan, writer, tokens, AnswerEnds.of(http, service, plan))

            return await stream_when_running(http, service, plan.requests, events, headers, plan.grammar_param)

        async def whole() -> tuple[list[DeltaStream], list[ReadChoice]]:
            streams = await submit(http, service, *plan.requests)
            note_adapter(http, plan.requests[0], streams)  # which kept answers name
            return streams, await _read_all(streams, plan, tokens, AnswerEnds.of(http, service, plan))

        streams, read = await unless_client_leaves(http.receive, whole())
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error, plan.grammar_param) from None
    adapter_hash = note_adapter(http, plan.requests[0], streams)
    base = _base(service, plan, adapter_hash, _OBJECT)

    def write() -> bytes:
        choices = [choice.reader.whole(index, choice.fragments) for index, choice in enumerate(_best(read, plan))]
        content = base | {"choices": choices, "usage": tokens.usage()}
        if plan.kind == "chat":  # which has one prompt
            content |= prompt_fields(read[0].fragments[0])
        if plan.receipt_of is not None:
            token_ids = [choice.token_ids for choice in read]
            content["receipt"] = make_receipt(
                service, _PATH[plan.kind], plan.receipt_of, plan.requests, adapter_hash, token_ids
            )
        return encode_json(content)

    is_long = tokens.prompt + tokens.completion > _INLINE_TOKENS
    content = await asyncio.to_thread(write) if is_long else write()
    return Response(content, media_type="application/json", headers=headers)


def count_tokens(http: Request, requests: Sequence[GenerationRequest], candidates: int = 1) -> TokenCount:
    """A counter of the requests' tokens, shared with the access log."""
    tokens = TokenCount(
        sum(len(request.prompt_token_ids) for request in requests[::candidates]),
        reasoning=None if requests[0].reasoning is None else 0,
        predicted=len(requests[0].prediction_token_ids) or None,
    )
    record_of(http).tokens = tokens
    return tokens


def note_adapter(http: Request, request: GenerationRequest, streams: Sequence[DeltaStream]) -> str:
    """Record the requests' adapter for the access log. Returns its content hash; "" without an adapter."""
    if request.adapter is None:
        return ""
    adapter_hash = next(stream.adapter_hash for stream in streams if stream.accepted.done())
    record_of(http).adapter = str(AdapterReference(request.adapter.name, adapter_hash[:12]))
    return adapter_hash


def _base(service: Service, plan: AnswerPlan, adapter_hash: str, object_names: dict[str, str]) -> dict[str, Any]:
    """The fields common to all objects of an answer."""
    return {
        "id": _ID_PREFIX[plan.kind] + plan.requests[0].request_id,
        "object": object_names[plan.kind],
        "created": int(time.time()),
        "model": plan.model,
        "system_fingerprint": service.fingerprint(adapter_hash),
    }


@dataclass(kw_only=True)
class ReadChoice:
    """An answer, read to its end."""

    reader: ChoiceReader
    fragments: list[Fragment]
    logprobs: list[float]
    token_ids: list[int]  # if the request returns them

    @property
    def score(self) -> float:
        """The mean log-probability of its tokens."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


def _best(read: Sequence[ReadChoice], plan: AnswerPlan) -> list[ReadChoice]:
    """The answers to show: for each prompt those with the highest scores, best first."""
    if plan.candidates == plan.choices:
        return list(read)
    best: list[ReadChoice] = []
    for start in range(0, len(read), plan.candidates):
        best += sorted(read[start : start + plan.candidates], key=lambda choice: -choice.score)[: plan.choices]
    return best


async def _read_all(
    streams: Sequence[DeltaStream], plan: AnswerPlan, tokens: TokenCount, ends: AnswerEnds = UNCHECKED
) -> list[ReadChoice]:
    """Every answer, read to its end; ApiError as soon as one fails."""
    read = [
        ReadChoice(reader=plan.reader(number), fragments=[], logprobs=[], token_ids=[])
        for number in range(len(streams))
    ]
    try:
        async for number, delta in read_deltas(streams, tokens, plan.candidates, plan.grammar_param):
            read[number].fragments.append(await ends.note(number, read[number].reader.read(delta)))
            read[number].logprobs += [entry.logprob for entry in delta.logprobs]
            read[number].token_ids += delta.token_ids
    finally:
        for stream in streams:
            stream.close()
    return read


async def _events(
    streams: Sequence[DeltaStream],
    plan: AnswerPlan,
    writer: ChunkWriter,
    tokens: TokenCount,
    ends: AnswerEnds = UNCHECKED,
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; a failure is the last event."""
    readers = [plan.reader(number) for number in range(len(streams))]
    if plan.kind == "chat":
        content = "" if plan.begins_with_text else None
        roles = [writer.role(number, content, reader.prompt_token_ids) for number, reader in enumerate(readers)]
        yield b"".join(roles)
    try:
        async for number, delta in read_deltas(streams, tokens, plan.candidates, plan.grammar_param):
            fragment = await ends.note(number, readers[number].read(delta))
            if plan.kind == "chat":
                fragment.prompt_token_ids = None  # sent with the role
            chunk = writer.fragment(number, fragment)
            if chunk:
                yield chunk
    except ApiError as error:
        yield event(error.content())
        return
    if plan.include_usage:
        yield writer.usage(tokens.usage())
    yield DONE


async def read_deltas(
    streams: Sequence[DeltaStream], tokens: TokenCount, candidates: int = 1, grammar_param: str | None = None
) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of several streams as they arrive, with their stream's index, counted; ApiError if one fails."""
    async for number, delta in interleaved(streams):
        if delta.finish_reason == "error":
            raise _failure(delta, grammar_param)
        tokens.add(delta, first_of_prompt=number % candidates == 0)
        yield number, delta


async def interleaved(streams: Sequence[DeltaStream]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of several streams as they arrive, each with the index of its stream."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    reading = {asyncio.ensure_future(_next(stream)): number for number, stream in enumerate(streams)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, next_delta = reading.pop(task), task.result()
                if next_delta is not None:
                    reading[asyncio.ensure_future(_next(streams[number]))] = number
                    yield number, next_delta
    finally:
        for task in reading:
            task.cancel()


async def _next(stream: DeltaStream) -> Delta | None:
    return await anext(stream, None)


def _failure(delta: Delta, grammar_param: str | None) -> ApiError:
    """The error for the user from the last delta of a failed request."""
    message = "The engine failed." if delta.error is None else delta.error
    if delta.code is not None:
        return from_engine(RequestRejected(message, delta.code, delta.param), grammar_param)
    return ApiError(500, message)
