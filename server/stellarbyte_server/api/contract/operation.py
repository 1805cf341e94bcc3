"""An operation: one method of one route, for the document at /openapi.json."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel

from stellarbyte_server.access.rules import Access, allows
from stellarbyte_server.api.contract.objects import ErrorBody

Model = type[BaseModel]
EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])
_OPERATION = "operation"  # the attribute of an endpoint

BODY_REFUSED = (400, 408, 413)
GENERATION_REFUSED = (*BODY_REFUSED, 404, 429)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A decorator, below the router's, with an endpoint's access, bodies and answer.

    The framework cannot derive the bodies, because routes read them themselves.
    """

    access: Access
    summary: str
    tag: str
    answer: Model | str  # a media type: text
    bodies: tuple[Model, ...] = ()  # alternatives for the request's JSON
    form: Model | None = None  # of a multipart request
    query: Model | None = None
    event: Model | None = None  # of the stream, if the body has `stream`
    ends_with_done: bool = True  # the stream's last event is [DONE]
    errors: tuple[int, ...] = ()
    error: Model = ErrorBody  # what they look like
    path_parameters: tuple[tuple[str, str], ...] = ()  # name, description

    def __call__(self, endpoint: EndpointT) -> EndpointT:
        setattr(endpoint, _OPERATION, self)
        return allows(self.access)(endpoint)


def operations_of(routers: Iterable[APIRouter]) -> dict[tuple[str, str], Operation]:
    """The operation of each method ("post") and path ("/v1/models/{name}"); AttributeError if a route has none."""
    return {
        (method.lower(), route.path_format): getattr(route.endpoint, _OPERATION)
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods or ())
    }
