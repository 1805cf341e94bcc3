"""GET /openapi.json, the API's document, and GET /docs, a page to try the API, without other hosts."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from stellarbyte_server.access.rules import Access, allows

DOCUMENT_PATH = "/openapi.json"
PAGE_PATH = "/docs"
FILES_PATH = "/docs/static"
# Browsers may contact only this server. The page contains an inline script.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " frame-ancestors 'none'"
)


def add_docs(app: FastAPI, make_document: Callable[[], dict[str, Any]]) -> None:
    """Add the document, the page, and Swagger UI's files from the package fastapi-offline, whose code is not used.

    The document is created on first use.
    """
    document = functools.cache(make_document)
    static = StaticFiles(directory=_files())

    @allows(Access.USER)
    async def openapi(request: Request) -> JSONResponse:
        root = _root(request)
        return JSONResponse({**document(), "servers": [{"url": root}]} if root else document())

    @allows(Access.USER)
    async def page(request: Request) -> HTMLResponse:
        root = _root(request)
        files = f"{root}{FILES_PATH}"
        response = get_swagger_ui_html(
            openapi_url=f"{root}{DOCUMENT_PATH}",
            title=app.title,
            swagger_js_url=f"{files}/swagger-ui-bundle.js",
            swagger_css_url=f"{files}/swagger-ui.css",
            swagger_favicon_url=f"{files}/favicon.png",
            swagger_ui_parameters={"validatorUrl": None},  # otherwise it sends the document's address to swagger.io
        )
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    @allows(Access.USER)
    async def file(request: Request) -> Response:
        return await static.get_response(request.path_params["path"], request.scope)

    app.add_route(DOCUMENT_PATH, openapi, include_in_schema=False)
    app.add_route(PAGE_PATH, page, include_in_schema=False)
    app.add_route(f"{FILES_PATH}/{{path:path}}", file, include_in_schema=False)


def _root(request: Request) -> str:
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


def _files() -> Path:
    spec = find_spec("fastapi_offline")
    assert spec is not None and spec.origin is not None, "the package fastapi-offline is a requirement"
    return Path(spec.origin).parent / "static"
