"""The vectors of texts: the final hidden states of their tokens, for embeddings, scores and rankings."""

import secrets
from collections.abc import Sequence
from functools import partial

from fastapi import Request

from stellarbyte_server.api.answers.answer import count_tokens, note_adapter, read_deltas
from stellarbyte_server.api.contract.bodies.embeddings import PoolingFields
from stellarbyte_server.api.contract.bodies.prompt_input import PromptInput
from stellarbyte_server.api.contract.errors import bad_request, from_engine
from stellarbyte_server.api.disconnect import unless_client_leaves
from stellarbyte_server.api.generation import (
    adapter_of,
    check_characters,
    check_prompt,
    check_token_ids,
    most_at_once,
    off_loop_if_long,
    user_of,
)
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.submission import submit
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.protocol.request import GenerationRequest, RequestRejected, SamplingParams
from stellarbyte_server.tokens.tokenizer import UnembeddableTokenError

_AT_ONCE = 32  # inputs of one request in the engine at once, to leave room for other requests
_NOTHING = SamplingParams(max_tokens=0, seed=0)


async def vectors_of(
    http: Request, service: Service, body: PoolingFields, inputs: Sequence[tuple[PromptInput, str]]
) -> tuple[list[bytes], int]:
    """A vector of length 1 (float32, little-endian) for each input, and the number of their tokens; ApiError.

    Each input comes with the name of its field.
    """
    num_characters = sum(len(given) for given, _ in inputs)
    token_ids = [await _token_ids(http, body, service, given, param, num_characters) for given, param in inputs]
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
        return await unless_client_leaves(http.receive, embed()), tokens.prompt
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error) from None


async def _token_ids(
    http: Request, body: PoolingFields, service: Service, given: PromptInput, param: str, num_characters: int
) -> list[int]:
    limit = service.info.max_model_len
    if isinstance(given, str):
        check_characters(len(given), limit, service, param)
        add_special_tokens = body.add_special_tokens is not False
        encode = partial(service.tokenizer.encode, given, add_special_tokens=add_special_tokens)
        try:
            token_ids = await off_loop_if_long(http, service, encode, num_characters)
        except UnembeddableTokenError as error:
            raise bad_request(str(error), param) from None
    else:
        token_ids = given
        check_prompt(token_ids, limit, param, least=0)
        check = partial(check_token_ids, token_ids, service, param)
        await off_loop_if_long(http, service, check, num_characters)
    check_prompt(token_ids, limit, param, least=0)
    return token_ids


def _request(body: PoolingFields, service: Service, token_ids: list[int]) -> GenerationRequest:
    adapter, adapter_scale = adapter_of(body, service)
    return GenerationRequest(
        request_id=secrets.token_hex(12),
        prompt_token_ids=tuple(token_ids),
        sampling=_NOTHING,
        priority=0 if body.priority is None else body.priority,
        adapter=adapter,
        adapter_scale=adapter_scale,
        cache_salt="" if body.cache_salt is None else body.cache_salt,
        caller=user_of(body),
        pooling="last" if body.pooling is None else body.pooling,
    )
