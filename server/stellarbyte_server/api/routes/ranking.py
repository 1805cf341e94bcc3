"""POST /v1/score and /v1/rerank: the similarity of texts, by the vectors that /v1/embeddings returns for them."""

import secrets
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.contract import ranking_objects
from stellarbyte_server.api.contract.bodies.embeddings import MAX_INPUTS
from stellarbyte_server.api.contract.bodies.ranking.ranking import RerankBody, ScoreBody
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.contract.operation import GENERATION_REFUSED, Operation
from stellarbyte_server.api.generation import read_body
from stellarbyte_server.api.service import ServiceOfRequest
from stellarbyte_server.api.vectors import vectors_of

router = APIRouter()
_SCORE = Operation(
    access=Access.USER,
    summary="Compare pairs of texts",
    tag="Generation",
    bodies=(ScoreBody,),
    answer=ranking_objects.ScoreList,
    errors=GENERATION_REFUSED,
)
_RERANK = Operation(
    access=Access.USER,
    summary="Order documents by a query",
    tag="Generation",
    bodies=(RerankBody,),
    answer=ranking_objects.Ranking,
    errors=GENERATION_REFUSED,
)


@router.post("/score")
@router.post("/v1/score")
@_SCORE
async def score(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, ScoreBody)
    first, second = body.text_1, body.text_2
    if len(first) not in (1, len(second)):
        raise bad_request(f"The field 'text_1' must have one text, or {len(second)} texts as in 'text_2'.", "text_1")
    if len(first) + len(second) > MAX_INPUTS:
        message = f"The fields have {len(first) + len(second)} texts; at most {MAX_INPUTS} are allowed."
        raise bad_request(message, "text_2")
    texts = [*((text, "text_1") for text in first), *((text, "text_2") for text in second)]
    vectors, num_tokens = await vectors_of(http, service, body, texts)
    scores = _cosines(vectors[: len(first)], vectors[len(first) :])
    content = {
        "id": f"score-{secrets.token_hex(16)}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return JSONResponse(content, headers=headers)


@router.post("/rerank")
@router.post("/v2/rerank")
@router.post("/v1/rerank")
@_RERANK
async def rerank(http: Request, service: ServiceOfRequest) -> Response:
    body, headers = await read_body(http, service, RerankBody)
    documents = body.documents
    texts = [(body.query, "query"), *((text, f"documents[{index}]") for index, text in enumerate(documents))]
    vectors, num_tokens = await vectors_of(http, service, body, texts)
    scores = _cosines(vectors[:1], vectors[1:])
    best = sorted(range(len(documents)), key=lambda index: -scores[index])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
    if body.return_documents is not False:
        results = [result | {"document": {"text": documents[result["index"]]}} for result in results]
    content = {
        "id": f"rerank-{secrets.token_hex(16)}",
        "model": body.model,
        "results": results,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return JSONResponse(content, headers=headers)


def _cosines(first: list[bytes], second: list[bytes]) -> list[float]:
    """The cosine of each pair of vectors of length 1; a single first vector is paired with each second one."""
    one, other = (np.stack([np.frombuffer(vector, "<f4") for vector in vectors]) for vectors in (first, second))
    products: list[float] = (one.astype(np.float64) * other).sum(axis=1).clip(-1, 1).tolist()
    return products
