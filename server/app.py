"""The HTTP application: routes, errors and middleware around one engine client. Never imports torch."""

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.api import adapters, chat, completions, embeddings, health, models, responses, tokenize
from server.api.disconnect import ClientLeft, answer_client_left
from server.api.docs import add_docs
from server.api.errors import ApiError, answer_api_error, answer_http_exception, answer_no_tokenizer
from server.api.middleware import BodyLimit, RequestLog
from server.api.openapi import describe
from server.api.service import Service
from server.tokenizer import NoTokenizerError


def create_app(service: Service) -> FastAPI:
    """An application for a service whose engine is ready."""
    app = FastAPI(title="StellarByte", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for module in (completions, chat, responses, embeddings, tokenize, models, adapters, health):
        app.include_router(module.router)
    describe(app, service.settings.model_name, allows_unknown_fields=service.settings.unknown_fields == "warn")
    add_docs(app)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(NoTokenizerError, answer_no_tokenizer)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_exception_handler(ClientLeft, answer_client_left)
    app.add_exception_handler(ClientDisconnect, answer_client_left)
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes)
    app.add_middleware(RequestLog)  # added last, so around all others
    return app
