"""The HTTP application: routes, errors and middleware around one engine client. Never imports torch."""

from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from stellarbyte_server.access.keys import Keyring
from stellarbyte_server.access.rules import RouteTable, rules_of
from stellarbyte_server.api.contract.errors import (
    ApiError,
    answer_api_error,
    answer_http_exception,
    answer_no_tokenizer,
)
from stellarbyte_server.api.contract.openapi import make_document
from stellarbyte_server.api.disconnect import ClientLeft, answer_client_left
from stellarbyte_server.api.endpoints import OPERATIONS, ROUTERS
from stellarbyte_server.api.key_rate import RefusalRate
from stellarbyte_server.api.middleware import MAX_FORM_BYTES, BodyBounds, Cors, RequestLog, Unexpected
from stellarbyte_server.api.routes.docs import add_docs
from stellarbyte_server.api.routes.pages import add_pages
from stellarbyte_server.api.service import Service
from stellarbyte_server.http.gate import Gate
from stellarbyte_server.http.root_path import RootPath
from stellarbyte_server.observe.tracing import Tracing
from stellarbyte_server.tokens.tokenizer import NoTokenizerError

# Response headers that pages of other origins may read.
_EXPOSED = ("X-Request-Id", "Request-Id", "X-Ignored-Fields", "Retry-After", "WWW-Authenticate")

# Newer versions of FastAPI have spans and logs that would contain users' data; this server's are in tracing.py.
_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(service: Service, keyring: Keyring, tracing: Tracing | None = None) -> FastAPI:
    """Create the application of a service with a ready engine; AssertionError if a route declares no access rule."""
    settings = service.settings
    app = FastAPI(title="StellarByte", openapi_url=None, redirect_slashes=False, telemetry=_NO_TELEMETRY)
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    allows_unknown_fields = settings.unknown_fields == "warn"
    add_docs(app, partial(make_document, OPERATIONS, settings.model_name, allows_unknown_fields=allows_unknown_fields))
    add_pages(app, fine_tuning=service.tuning is not None)
    routes = RouteTable(rules_of(app))
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(NoTokenizerError, answer_no_tokenizer)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_exception_handler(ClientLeft, answer_client_left)
    app.add_exception_handler(ClientDisconnect, answer_client_left)
    # Each wraps those before it.
    app.add_middleware(
        BodyBounds,
        max_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_file_bytes + MAX_FORM_BYTES,
        timeout_s=settings.receive_timeout,
    )
    app.add_middleware(RefusalRate, service=service)
    app.add_middleware(Gate, routes=routes, keyring=keyring, settings=settings)
    app.add_middleware(Unexpected)
    if settings.cors_origin:  # around the gate: browsers' preflight requests have no key, and pages must see errors
        app.add_middleware(
            Cors,
            allow_origins=settings.cors_origin,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )
    app.add_middleware(RequestLog, routes=routes, service=service, tracing=tracing)
    app.add_middleware(RootPath, routes=routes)
    return app
