"""POST /v1/embeddings: the final hidden states of texts as vectors of length 1."""

import asyncio
import base64
import secrets
from functools import partial

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.answers.answer import count_tokens, note_adapter, read_deltas
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.bodies.embeddings import EmbeddingsBody
from stellarbyte_server.api.contract.bodies.prompt_input import PromptInput
from stellarbyte_server.api.contract.errors import bad_request, from_engine
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.generation import (
    adapter_of,
    check_characters,
    check_prompt,
    check_token_ids,
    most_at_once,
    off_loop_if_long,
    read_body,
)
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.api.submission import submit
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.protocol.request import GenerationRequest, RequestRejected, SamplingParams
from stellarbyte_server.tokens.tokenizer import UnembeddableTokenError

router = APIRouter()

_AT_ONCE = 32  # inputs of one request in the engine at once, to leave room for others
_NOTHING = SamplingParams(max_tokens=0, seed=0)


@router.post("/v1/embeddings")
@Operation(
    access=Access.USER,
    summary="Turn texts into vectors",
    tag="Generation",
    bodies=(EmbeddingsBody,),
    answer=objects.EmbeddingList,
    errors=GENERATION_REFUSED,
)
async def create_embeddings(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, EmbeddingsBody)
    size = service.info.hidden_size
    if body.dimensions not in (None, size):
        raise bad_request(f"The field 'dimensions' must be {size}, the size of this model's vectors.", "dimensions")
    num_characters = sum(map(len, body.input))
    token_ids = [await _token_ids(http, body, service, given, num_characters) for given in body.input]
    requests = [_request(body, service, ids) for ids in token_ids]
    tokens = count_tokens(http, requests)

    async def embed() -> list[bytes]:
        vectors = [b""] * len(requests)
        at_once = min(_AT_ONCE, most_at_once(service))
        num_later = tokens.prompt
        for start in range(0, len(requests), at_once):
            wave = requests[start : start + at_once]
            num_later -= sum(len(request.prompt_token_ids) for request in wave)
            streams = await submit(http, service, *wave, continues=start > 0, num_later_tokens=num_later)
            try:
                note_adapter(http, wave[0], streams)
                async for number, delta in read_deltas(streams, tokens):
                    assert delta.embedding is not None, "the only delta of a pooled request"
                    vectors[start + number] = delta.embedding
            finally:
                for stream in streams:
                    stream.close()
        return vectors

    try:
        vectors = await unless_client_leaves(http.receive, embed())
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error) from None
    shown = _as_base64 if body.encoding_format == "base64" else _as_floats
    content = await asyncio.to_thread(
        lambda: msgspec.json.encode(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": shown(vector)}
                    for index, vector in enumerate(vectors)
                ],
                "model": body.model,
                "usage": {"prompt_tokens": tokens.prompt, "total_tokens": tokens.prompt},
            }
        )
    )
    return Response(content, media_type="application/json", headers=headers)


async def _token_ids(
    http: Request, body: EmbeddingsBody, service: Service, given: PromptInput, num_characters: int
) -> list[int]:
    limit = service.info.max_model_len
    if isinstance(given, str):
        check_characters(len(given), limit, service, "input")
        add_special_tokens = body.add_special_tokens is not False
        encode = partial(service.tokenizer.encode, given, add_special_tokens=add_special_tokens)
        try:
            token_ids = await off_loop_if_long(http, service, encode, num_characters)
        except UnembeddableTokenError as error:
            raise bad_request(str(error), "input") from None
    else:
        token_ids = given
        check_prompt(token_ids, limit, "input", least=0)
        check = partial(check_token_ids, token_ids, service, "input")
        await off_loop_if_long(http, service, check, num_characters)
    check_prompt(token_ids, limit, "input", least=0)
    return token_ids


def _request(body: EmbeddingsBody, service: Service, token_ids: list[int]) -> GenerationRequest:
    adapter, adapter_scale = adapter_of(body.model, body.adapter_scale, service)
    return GenerationRequest(
        request_id=secrets.token_hex(12),
        prompt_token_ids=tuple(token_ids),
        sampling=_NOTHING,
        priority=0 if body.priority is None else body.priority,
        adapter=adapter,
        adapter_scale=adapter_scale,
        cache_salt="" if body.cache_salt is None else body.cache_salt,
        pooling="last" if body.pooling is None else body.pooling,
    )


def _as_base64(vector: bytes) -> str:
    """The vector as base64 of little-endian float32, OpenAI's clients' default."""
    return base64.b64encode(vector).decode()


def _as_floats(vector: bytes) -> list[float]:
    return np.frombuffer(vector, "<f4").tolist()
