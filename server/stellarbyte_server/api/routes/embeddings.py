"""POST /v1/embeddings: the final hidden states of texts as vectors of length 1."""

import asyncio
import base64

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.bodies.embeddings import EmbeddingsBody
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.generation import (
    read_body,
)
from stellarbyte_server.api.service import ServiceOfRequest
from stellarbyte_server.api.vectors import vectors_of

router = APIRouter()


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
    vectors, num_tokens = await vectors_of(http, service, body, [(given, "input") for given in body.input])
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
                "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            }
        )
    )
    return Response(content, media_type="application/json", headers=headers)


def _as_base64(vector: bytes) -> str:
    """The vector as base64 of little-endian float32, OpenAI's clients' default."""
    return base64.b64encode(vector).decode()


def _as_floats(vector: bytes) -> list[float]:
    return np.frombuffer(vector, "<f4").tolist()
