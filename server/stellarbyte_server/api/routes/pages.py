"""GET /, /tune and /status, the pages for browsers, from files of this server."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from stellarbyte_server.access.rules import Access, allows
from stellarbyte_server.api.contract.errors import no_route

FILES_PATH = "/web/{path:path}"
_PAGES = {"/": "index.html", "/tune": "tune.html", "/status": "status.html"}
_HIDDEN_LINK, _LINK = b'<a href="tune" hidden', b'<a href="tune"'  # in the bar of each page
_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}

# Pages show untrusted text from models: they may use only scripts and styles from these files, contact no other host,
# and parse no text as markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # revalidated each time, so that pages and scripts have the same version
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        """The file, or 304 if the client has it."""
        headers = _HEADERS | {"ETag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.etag in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def add_pages(app: FastAPI, *, fine_tuning: bool) -> None:
    """Add the pages and their files, which are read now; changes need a restart. `fine_tuning`: link its page."""
    known = _read_files(fine_tuning=fine_tuning)

    def add_page(path: str, file: _File) -> None:
        @allows(Access.OPEN)  # pages ask for the key themselves
        async def page(request: Request) -> Response:
            return file.answer(request)

        app.add_route(path, page, include_in_schema=False)

    for path, name in _PAGES.items():
        add_page(path, known.pop(name))

    @allows(Access.OPEN)
    async def static(request: Request) -> Response:
        file = known.get(request.path_params["path"])
        if file is None:
            raise no_route(request.url.path)
        return file.answer(request)

    app.add_route(FILES_PATH, static, include_in_schema=False)


def _read_files(*, fine_tuning: bool) -> dict[str, _File]:
    """Name → file, for types that browsers load."""
    known = {}
    for entry in files("stellarbyte_web").iterdir():
        media_type = next((kind for suffix, kind in _MEDIA_TYPES.items() if entry.name.endswith(suffix)), None)
        if media_type is not None:
            content = entry.read_bytes()
            if fine_tuning:
                content = content.replace(_HIDDEN_LINK, _LINK)
            known[entry.name] = _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return known
