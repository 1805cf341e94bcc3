"""/v1/feedback: ratings of answers, from which examples for fine-tuning can be made."""

import asyncio
import logging
import sqlite3
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.caller import owner_id, owner_of
from stellarbyte_server.api.contract import feedback_objects
from stellarbyte_server.api.contract.bodies.body import parse_named, parse_plain_body
from stellarbyte_server.api.contract.bodies.tuning.feedback import FeedbackBody, FeedbackQuery
from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.contract.operation import BODY_REFUSED, Operation
from stellarbyte_server.api.generation import parse_apart
from stellarbyte_server.api.key_rate import charge
from stellarbyte_server.api.routes.batch.storage import no_such, page
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.batch.files import NoRoom
from stellarbyte_server.feedback.store import Feedback, FeedbackStore, NoSuchAnswer, NoSuchChoice

logger = logging.getLogger("server.feedback")

router = APIRouter()
_TAG = "Feedback"
_PAGE = 20
_REQUEST_ID = 24  # characters at the end of an answer's id


@router.post("/v1/feedback")
@Operation(
    access=Access.USER,
    summary="Rate an answer",
    tag=_TAG,
    bodies=(FeedbackBody,),
    answer=feedback_objects.FeedbackObject,
    errors=(*BODY_REFUSED, 404, 429, 503),
)
async def rate(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    store = _store_of(service)
    body = await parse_apart(http, service, partial(parse_plain_body, FeedbackBody))
    await charge(http, service)
    try:
        feedback = await asyncio.to_thread(
            store.rate,
            owner_id(http),
            body.id[-_REQUEST_ID:],
            answer_id=body.id,
            index=0 if body.index is None else body.index,
            rating=body.rating,
            answer=body.answer,
            comment=body.comment,
            created_by=owner_of(http) or None,
        )
    except NoSuchAnswer:
        raise ApiError(
            404,
            f"The answer {body.id!r:.100} cannot be rated: this key has no such answer, or it is no longer kept.",
            param="id",
        ) from None
    except NoSuchChoice as error:
        raise bad_request(
            f"The field 'index' must be less than {error.args[0]}, the number of answers.", "index"
        ) from None
    except NoRoom as error:
        raise bad_request(str(error), code="storage_limit") from None
    except sqlite3.Error:
        logger.exception("a rating could not be stored")
        message = "The server could not store the rating; its log has the reason."
        raise ApiError(503, message, code="storage_unavailable", headers={"Retry-After": "60"}) from None
    return _object(feedback)


@router.get("/v1/feedback")
@Operation(
    access=Access.ADMIN,
    summary="List ratings with the answers they are about, newest first",
    tag=_TAG,
    query=FeedbackQuery,
    answer=feedback_objects.FeedbackList,
    errors=(400,),
)
async def list_feedback(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    store = _store_of(service)
    query = parse_named(FeedbackQuery, http.query_params.multi_items())
    limit = _PAGE if query.limit is None else query.limit
    try:
        found = await asyncio.to_thread(store.page, limit=limit, after=query.after, rating=query.rating)
    except KeyError:
        raise bad_request(f"The rating {query.after!r:.100} does not exist.", "after") from None
    ratings, has_more = found
    return page([_object(rating) for rating in ratings], has_more=has_more)


@router.delete("/v1/feedback/{feedback_id}")
@Operation(
    access=Access.ADMIN,
    summary="Delete a rating and the answer it is about",
    tag=_TAG,
    answer=feedback_objects.DeletedFeedback,
    errors=(400, 404),
    path_parameters=(("feedback_id", "A rating's id."),),
)
async def delete_feedback(feedback_id: str, service: ServiceOfRequest) -> dict[str, Any]:
    if not await asyncio.to_thread(_store_of(service).remove, feedback_id):
        raise no_such("rating", feedback_id)
    return {"id": feedback_id, "object": "feedback", "deleted": True}


def _store_of(service: Service) -> FeedbackStore:
    """The store; ApiError if the server was started without one."""
    if service.feedback is None:
        raise bad_request(
            "Feedback is off because the server was started without --feedback.", code="feedback_required"
        )
    return service.feedback


def _object(feedback: Feedback) -> dict[str, Any]:
    fields = msgspec.structs.asdict(feedback)
    return {
        "id": fields.pop("id"),
        "object": "feedback",
        **fields,
        "choice": msgspec.structs.asdict(feedback.choice),
    }
