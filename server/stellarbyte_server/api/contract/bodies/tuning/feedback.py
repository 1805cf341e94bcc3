"""The body of POST /v1/feedback, and the query of its list."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from stellarbyte_server.api.contract.bodies.fields import optional, required
from stellarbyte_server.api.contract.bodies.generation import MAX_CHOICES

MAX_PAGE = 100
_ID_PATTERN = "^(chatcmpl-|cmpl-|resp_|msg_)([0-9a-f]{24})$"


class FeedbackBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=_ID_PATTERN)] = required("The id of a chat, completion, response or message.")
    rating: Literal["good", "bad"] = required("The judgement.")
    answer: Annotated[str, Field(min_length=1, max_length=65_536)] | None = optional("A better answer.")
    comment: Annotated[str, Field(min_length=1, max_length=4096)] | None = optional("A reason, for people.")
    index: Annotated[int, Field(ge=0, lt=MAX_CHOICES)] | None = optional("Which of several answers. Default: 0.")


class FeedbackQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Annotated[str, Field(min_length=1, max_length=64)] | None = optional(
        "The id of the last rating of the previous page."
    )
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = optional("Ratings per page, 1 to 100. Default: 20.")
    rating: Literal["good", "bad"] | None = optional("Only these. Default: all.")
