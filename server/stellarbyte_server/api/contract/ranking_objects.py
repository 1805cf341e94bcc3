"""Models of answers of /v1/score and /v1/rerank, for the OpenAPI document and tests (see objects.py)."""

from typing import Annotated, Literal

from pydantic import Field

from stellarbyte_server.api.contract.objects import AnswerObject, Count, EmbeddingUsage, Left

Cosine = Annotated[float, Field(ge=-1, le=1, description="The cosine of the angle between the vectors of both texts.")]


class Score(AnswerObject):
    index: Annotated[Count, Field(description="Of the pair.")]
    object: Literal["score"]
    score: Cosine


class ScoreList(AnswerObject):
    id: str
    object: Literal["list"]
    created: Annotated[int, Field(description="Unix seconds.")]
    model: str
    data: list[Score]
    usage: EmbeddingUsage


class RankedText(AnswerObject):
    text: str


class RankedDocument(AnswerObject):
    index: Annotated[Count, Field(description="Of the document in the request.")]
    document: Left[RankedText]
    relevance_score: Cosine


class Ranking(AnswerObject):
    id: str
    model: str
    results: Annotated[list[RankedDocument], Field(description="The best first.")]
    usage: EmbeddingUsage
