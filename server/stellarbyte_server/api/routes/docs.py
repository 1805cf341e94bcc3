"""GET /docs: a page to try the API on, made of files this server brings, so that it asks no other host."""

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

PAGE_PATH = "/docs"
FILES_PATH = "/docs/static"
# Whatever those files may try, the browser talks to this server only. The page has a script of its own in it.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " frame-ancestors 'none'"
)


def add_docs(app: FastAPI) -> None:
    """Add the page, and below it Swagger UI's files out of the package fastapi-offline, whose code is not used."""

    async def page(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "").rstrip("/")
        files = f"{root}{FILES_PATH}"
        response = get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=app.title,
            swagger_js_url=f"{files}/swagger-ui-bundle.js",
            swagger_css_url=f"{files}/swagger-ui.css",
            swagger_favicon_url=f"{files}/favicon.png",
            swagger_ui_parameters={"validatorUrl": None},  # else it sends the document's address to swagger.io
        )
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    app.add_route(PAGE_PATH, page, include_in_schema=False)
    app.mount(FILES_PATH, StaticFiles(directory=_files()))


def _files() -> Path:
    spec = find_spec("fastapi_offline")
    assert spec is not None and spec.origin is not None, "the package fastapi-offline is a requirement"
    return Path(spec.origin).parent / "static"
