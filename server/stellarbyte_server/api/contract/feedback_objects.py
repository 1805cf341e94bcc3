"""Models of ratings, for the OpenAPI document and tests (see objects.py)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stellarbyte_server.api.contract.batch_objects import UnixSeconds
from stellarbyte_server.api.contract.objects import AnswerObject


class RatedChoice(AnswerObject):
    message: Annotated[dict[str, Any] | None, Field(description="Of a chat, a response or a message.")]
    text: Annotated[str | None, Field(description="Of a completion.")]
    finish_reason: str | None


class FeedbackObject(AnswerObject):
    id: str
    object: Literal["feedback"]
    created_at: UnixSeconds
    created_by: Annotated[str | None, Field(description="The name of a key; null: none was needed.")]
    answer_id: str
    index: Annotated[int, Field(description="Of the choice.")]
    rating: Literal["good", "bad"]
    answer: Annotated[str | None, Field(description="A better one.")]
    comment: str | None
    model: str
    adapter: Annotated[str | None, Field(description="NAME@HASH of the version that answered.")]
    messages: Annotated[list[dict[str, Any]] | None, Field(description="The chat before the answer.")]
    tools: list[dict[str, Any]] | None
    prompt: Annotated[str | None, Field(description="Of a completion.")]
    choice: Annotated[RatedChoice, Field(description="The rated answer.")]


class FeedbackList(AnswerObject):
    object: Literal["list"]
    data: list[FeedbackObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFeedback(AnswerObject):
    id: str
    object: Literal["feedback"]
    deleted: Literal[True]
