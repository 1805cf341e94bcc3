"""From the engine's requests to an HTTP answer, streamed or whole. Knows no bodies' fields and no prompts' origin."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import Response

from server.api.choices import ChoiceReader, Fragment, Kind, whole_choice
from server.api.disconnect import unless_client_leaves
from server.api.errors import ApiError, from_engine
from server.api.service import Service
from server.api.sse import DONE, ChunkWriter, DeltaStreamResponse, encode_json, event
from server.engine.client import DeltaStream, EngineDead
from server.engine.messages import Delta
from server.engine.request import GRAMMAR_REFUSED, GenerationRequest, RequestRejected

_ID_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}
_OBJECT = {"chat": "chat.completion", "completion": "text_completion"}
_CHUNK_OBJECT = {"chat": "chat.completion.chunk", "completion": "text_completion"}


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """How the requests that were made of one body are answered.

    There are `candidates` requests for each prompt, one after the other; of their answers the best `choices` are shown.
    """

    kind: Kind
    model: str  # as the client called it
    requests: tuple[GenerationRequest, ...]
    candidates: int
    choices: int
    reader: Callable[[int], ChoiceReader]  # for the request of that number
    stream: bool
    grammar_param: str | None = None  # the field that the requests' grammar is made of
    include_usage: bool = False


async def answer(http: Request, service: Service, plan: AnswerPlan, headers: dict[str, str]) -> Response:
    """Run a plan's requests and answer them. Headers are sent once the engine has begun to run one."""
    tokens = count_tokens(http, plan.requests, plan.candidates)
    try:
        if plan.stream:
            streams = await unless_client_leaves(http.receive, service.client.submit(*plan.requests))
            base = _base(http, service, plan, streams, _CHUNK_OBJECT)
            writer = ChunkWriter(base, plan.kind, len(streams), include_usage=plan.include_usage)
            return DeltaStreamResponse(streams, _events(streams, plan, writer, tokens), headers)

        async def whole() -> tuple[list[DeltaStream], list[list[Fragment]], list[float]]:
            streams = await service.client.submit(*plan.requests)
            return streams, *await _read_all(streams, plan, tokens)

        streams, fragments, scores = await unless_client_leaves(http.receive, whole())
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error, plan.grammar_param) from None
    shown = _best(scores, plan)
    choices = [whole_choice(plan.kind, index, fragments[number]) for index, number in enumerate(shown)]
    content = _base(http, service, plan, streams, _OBJECT) | {"choices": choices, "usage": tokens.usage()}
    if plan.kind == "chat" and fragments[0][0].prompt_token_ids is not None:
        content["prompt_token_ids"] = fragments[0][0].prompt_token_ids
    return Response(encode_json(content), media_type="application/json", headers=headers)


def count_tokens(http: Request, requests: Sequence[GenerationRequest], candidates: int = 1) -> "TokenCount":
    """A count of the requests' tokens, which the access log will show."""
    tokens = TokenCount(sum(len(request.prompt_token_ids) for request in requests[::candidates]))
    http.state.tokens = tokens
    return tokens


def note_adapter(http: Request, request: GenerationRequest, streams: Sequence[DeltaStream]) -> str:
    """Put the adapter that the requests run with into the access log; its content hash ("": none)."""
    if request.adapter is None:
        return ""
    adapter_hash = next(stream.adapter_hash for stream in streams if stream.accepted.done())
    http.state.adapter = f"{request.adapter.partition('@')[0]}@{adapter_hash[:12]}"
    return adapter_hash


def _base(
    http: Request, service: Service, plan: AnswerPlan, streams: Sequence[DeltaStream], object_names: dict[str, str]
) -> dict[str, Any]:
    """The fields that all of an answer's objects share."""
    adapter_hash = note_adapter(http, plan.requests[0], streams)
    return {
        "id": _ID_PREFIX[plan.kind] + plan.requests[0].request_id,
        "object": object_names[plan.kind],
        "created": int(time.time()),
        "model": plan.model,
        "system_fingerprint": service.fingerprint(adapter_hash),
    }


def _best(scores: Sequence[float], plan: AnswerPlan) -> list[int]:
    """Numbers of the requests that are shown: of each prompt's those with the best scores, the best first."""
    if plan.candidates == plan.choices:
        return list(range(len(scores)))
    best = []
    for start in range(0, len(scores), plan.candidates):
        numbers = range(start, start + plan.candidates)
        best += sorted(numbers, key=lambda number: -scores[number])[: plan.choices]
    return best


@dataclass
class TokenCount:
    """Tokens of one HTTP request so far; the access log reads it at the end."""

    prompt: int
    completion: int = 0
    cached: int = 0  # of the prompts; known at the end
    evicted: int = 0  # out of sight at the end, when the context slid

    def add(self, delta: Delta, *, first_of_prompt: bool) -> None:
        self.completion += delta.num_tokens
        self.evicted += delta.evicted_tokens
        if first_of_prompt:
            self.cached += delta.cached_tokens

    def usage(self) -> dict[str, Any]:
        usage = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        return usage | {"evicted_tokens": self.evicted} if self.evicted else usage


async def _read_all(
    streams: Sequence[DeltaStream], plan: AnswerPlan, tokens: TokenCount
) -> tuple[list[list[Fragment]], list[float]]:
    """The fragments of every request, and the mean log-probability of its tokens; ApiError when one failed."""
    fragments: list[list[Fragment]] = [[] for _ in streams]
    scores = []
    try:
        for number, stream in enumerate(streams):
            reader = plan.reader(number)
            logprobs: list[float] = []
            async for delta in stream:
                if delta.finish_reason == "error":
                    raise failure_of(delta, plan.grammar_param)
                tokens.add(delta, first_of_prompt=number % plan.candidates == 0)
                fragments[number].append(reader.read(delta))
                logprobs += [entry.logprob for entry in delta.logprobs]
            scores.append(sum(logprobs) / max(1, len(logprobs)))
    finally:
        for stream in streams:
            stream.close()
    return fragments, scores


async def _events(
    streams: Sequence[DeltaStream], plan: AnswerPlan, writer: ChunkWriter, tokens: TokenCount
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; a failure is its last one."""
    readers = [plan.reader(number) for number in range(len(streams))]
    if plan.kind == "chat":
        yield b"".join([writer.role(number) for number in range(len(streams))])
    async for number, delta in interleaved(streams):
        if delta.finish_reason == "error":
            yield event(failure_of(delta, plan.grammar_param).content())
            return
        tokens.add(delta, first_of_prompt=number % plan.candidates == 0)
        chunk = writer.fragment(number, readers[number].read(delta))
        if chunk:
            yield chunk
    if plan.include_usage:
        yield writer.usage(tokens.usage())
    yield DONE


async def interleaved(streams: Sequence[DeltaStream]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of several streams as they come, each with the number of its stream."""
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


def failure_of(delta: Delta, grammar_param: str | None = None) -> ApiError:
    """What the last delta of a request that failed means to the user."""
    message = "The engine failed." if delta.error is None else delta.error
    if delta.code == GRAMMAR_REFUSED:
        return ApiError(400, message, param=grammar_param, code=delta.code)
    return ApiError(500, message)
