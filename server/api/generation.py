"""What both ways to generate share: from a checked body to the engine, and from its deltas to an answer."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from fastapi import Request
from starlette.responses import Response

from server.api.disconnect import unless_client_leaves
from server.api.errors import ApiError, bad_request, error_content, from_engine
from server.api.schemas import BodyT, GenerationBody, parse_body
from server.api.service import Service
from server.api.sse import DONE, ChunkWriter, DeltaStreamResponse, encode_json, event
from server.engine.client import DeltaStream, EngineDead
from server.engine.messages import Delta
from server.engine.request import MAX_SLIDING_TOKENS, GenerationRequest, RequestRejected, SamplingParams

logger = logging.getLogger("server.api")

_INLINE_CHARACTERS = 2000  # longer inputs are tokenized in a thread, so that they hold up no stream
_MAX_IGNORED_HEADER = 1000


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """Where answers to chats and to plain completions differ."""

    id_prefix: str
    object: str
    chunk_object: str
    choice: Callable[[str], dict[str, Any]]  # the text's place in a choice that is not streamed
    is_chat: bool


async def read_body(request: Request, service: Service, body_class: type[BodyT]) -> tuple[BodyT, dict[str, str]]:
    """The checked body, for the served model, and the headers that tell which fields were ignored."""
    content = await request.body()
    body, ignored = parse_body(body_class, content, warn_unknown=service.settings.unknown_fields == "warn")
    if not ignored:
        return body, {}
    return body, {"X-Ignored-Fields": ", ".join(quote(path, safe="[]._-") for path in ignored)[:_MAX_IGNORED_HEADER]}


async def tokenize(encode: Callable[[], list[int]], num_characters: int) -> list[int]:
    """Run `encode`; off the event loop when the input is long. The tokenizer lets other threads run."""
    if num_characters <= _INLINE_CHARACTERS:
        return encode()
    return await asyncio.to_thread(encode)


def overflow_of(body: GenerationBody, service: Service) -> Literal["error", "slide"]:
    """What happens at the end of the context: as the request says, else as the server was started."""
    return service.settings.context_overflow if body.context_overflow is None else body.context_overflow


def context_limit(body: GenerationBody, service: Service) -> int:
    """Most tokens of prompt and answer together."""
    return MAX_SLIDING_TOKENS if overflow_of(body, service) == "slide" else service.info.max_model_len


def check_prompt(token_ids: list[int], limit: int, param: str) -> int:
    """Tokens that `limit` leaves for the answer, at least 1; ApiError when the prompt cannot be run."""
    if not token_ids:
        raise bad_request("The prompt is empty.", param)
    room = limit - len(token_ids)
    if room < 1:
        raise bad_request(
            f"The prompt has {len(token_ids)} tokens, but the model's context of {limit} tokens must hold it and"
            " at least one token of the answer.",
            param,
            "context_length_exceeded",
        )
    return room


def make_request(body: GenerationBody, service: Service, token_ids: list[int], max_tokens: int) -> GenerationRequest:
    is_adapted = body.model != service.settings.model_name
    if not is_adapted and body.adapter_scale not in (None, 1):
        raise bad_request("The field 'adapter_scale' needs an adapter as 'model'.", "adapter_scale")

    def chosen(name: str) -> Any:
        value = getattr(body, name)
        return getattr(service.defaults, name) if value is None else value

    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=float(chosen("temperature")),
        top_p=float(chosen("top_p")),
        top_k=max(0, int(chosen("top_k"))),
        min_p=float(chosen("min_p")),
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
        stop=() if body.stop is None else body.stop,
        ignore_eos=bool(body.ignore_eos),
    )
    return GenerationRequest(
        request_id=secrets.token_hex(12),
        prompt_token_ids=tuple(token_ids),
        sampling=sampling,
        priority=0 if body.priority is None else body.priority,
        context_overflow=overflow_of(body, service),
        adapter=body.model if is_adapted else None,
        adapter_scale=1.0 if body.adapter_scale is None else float(body.adapter_scale),
        cache_salt="" if body.cache_salt is None else body.cache_salt,
    )


async def answer(
    http: Request,
    service: Service,
    body: GenerationBody,
    request: GenerationRequest,
    form: AnswerForm,
    headers: dict[str, str],
) -> Response:
    """Run a request and answer it, streamed or whole. Headers are sent once the engine has begun to run it."""
    tokens = TokenCount(len(request.prompt_token_ids))
    http.state.tokens = tokens

    async def submit() -> tuple[DeltaStream, dict[str, Any]]:
        """The accepted request, and the fields that all of its answer's objects share."""
        stream = await service.client.submit(request)
        if request.adapter is not None:
            http.state.adapter = f"{request.adapter.partition('@')[0]}@{stream.adapter_hash[:12]}"
        return stream, {
            "id": form.id_prefix + request.request_id,
            "object": form.chunk_object if body.stream else form.object,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": service.fingerprint(stream.adapter_hash),
        }

    async def whole() -> tuple[str, str, dict[str, Any]]:
        stream, base = await submit()
        return *await _whole(stream, tokens), base

    try:
        if body.stream:
            stream, base = await unless_client_leaves(http.receive, submit())
            writer = ChunkWriter(base, is_chat=form.is_chat, include_usage=body.include_usage)
            events = _events(stream, writer, tokens, with_role=form.is_chat, with_usage=body.include_usage)
            return DeltaStreamResponse(stream, events, headers)
        text, reason, base = await unless_client_leaves(http.receive, whole())
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error) from None
    choice = {"index": 0, **form.choice(text), "logprobs": None, "finish_reason": reason}
    content = encode_json(base | {"choices": [choice], "usage": tokens.usage()})
    return Response(content, media_type="application/json", headers=headers)


@dataclass
class TokenCount:
    """Tokens of one request so far; the access log reads it at the end."""

    prompt: int
    completion: int = 0
    cached: int = 0  # of the prompt; known at the end
    evicted: int = 0  # out of sight at the end, when the context slid

    def add(self, delta: Delta) -> None:
        self.completion += delta.num_tokens
        self.cached, self.evicted = delta.cached_tokens, delta.evicted_tokens

    def usage(self) -> dict[str, Any]:
        usage = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        return usage | {"evicted_tokens": self.evicted} if self.evicted else usage


async def _whole(stream: DeltaStream, tokens: TokenCount) -> tuple[str, str]:
    """Text and finish reason of the whole answer; ApiError when the engine failed on the way."""
    texts, reason = [], None
    try:
        async for delta in stream:
            if delta.finish_reason == "error":
                raise ApiError(500, _failure(delta.error))
            texts.append(delta.text)
            tokens.add(delta)
            reason = delta.finish_reason
    finally:
        stream.close()
    assert reason is not None, "a stream ends with a finish reason"
    return "".join(texts), reason


async def _events(
    stream: DeltaStream, writer: ChunkWriter, tokens: TokenCount, *, with_role: bool, with_usage: bool
) -> AsyncIterator[bytes]:
    """The answer as server-sent events; a failure is its last one."""
    if with_role:
        yield writer.role()
    async for delta in stream:
        if delta.finish_reason == "error":
            yield event(error_content(500, _failure(delta.error)))
            return
        tokens.add(delta)
        chunk = writer.text(delta.text) if delta.text else b""
        if delta.finish_reason is not None:
            chunk += writer.finish(delta.finish_reason)
            if with_usage:
                chunk += writer.usage(tokens.usage())
            chunk += DONE
        if chunk:
            yield chunk


def _failure(message: str | None) -> str:
    return "The engine failed." if message is None else message
