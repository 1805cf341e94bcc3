"""Which requests may be made by whom: one table of all routes. Knows no keys and no settings.

What is not in the table is not served: an application with a route that has no row cannot be made.
"""

import re
from collections.abc import Iterable
from enum import Enum

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Mount, compile_path


class Access(Enum):
    OPEN = "open"  # for anybody: probes and scrapers, which cannot be given keys everywhere, and pages
    USER = "user"  # for any key, if there are keys
    ADMIN = "admin"  # for the admin key; with --allow-local-admin for this machine


ACCESS: dict[tuple[str, str], Access] = {
    ("POST", "/v1/completions"): Access.USER,
    ("POST", "/v1/chat/completions"): Access.USER,
    ("POST", "/v1/responses"): Access.USER,
    ("POST", "/v1/embeddings"): Access.USER,
    ("POST", "/tokenize"): Access.USER,
    ("POST", "/detokenize"): Access.USER,
    ("GET", "/v1/models"): Access.USER,
    ("GET", "/v1/models/{name:path}"): Access.USER,
    ("GET", "/v1/adapters"): Access.USER,
    ("POST", "/v1/load_lora_adapter"): Access.ADMIN,
    ("POST", "/v1/unload_lora_adapter"): Access.ADMIN,
    ("GET", "/health"): Access.OPEN,
    ("GET", "/ready"): Access.OPEN,
    ("GET", "/version"): Access.OPEN,
    ("GET", "/metrics"): Access.OPEN,
    ("GET", "/openapi.json"): Access.USER,
    ("HEAD", "/openapi.json"): Access.USER,
    ("GET", "/docs"): Access.USER,
    ("HEAD", "/docs"): Access.USER,
    ("GET", "/docs/static/{path:path}"): Access.USER,
    ("HEAD", "/docs/static/{path:path}"): Access.USER,
    ("GET", "/"): Access.OPEN,  # a page asks for the key itself
    ("HEAD", "/"): Access.OPEN,
    ("GET", "/status"): Access.OPEN,
    ("HEAD", "/status"): Access.OPEN,
    ("GET", "/web/{path:path}"): Access.OPEN,
    ("HEAD", "/web/{path:path}"): Access.OPEN,
}

_Methods = dict[str, Access]
_EXACT: dict[str, _Methods] = {}
_PATTERNS: dict[str, tuple[re.Pattern[str], _Methods]] = {}
for (_method, _path), _access in ACCESS.items():
    if "{" in _path:
        _PATTERNS.setdefault(_path, (compile_path(_path)[0], {}))[1][_method] = _access
    else:
        _EXACT.setdefault(_path, {})[_method] = _access


def methods_of(path: str) -> _Methods:
    """What may be asked of a path, and by whom; nothing when there is no such route."""
    methods = _EXACT.get(path)
    if methods is not None:
        return methods
    return next((methods for pattern, methods in _PATTERNS.values() if pattern.match(path)), {})


def route_of(path: str) -> str | None:
    """The row of the table that a path belongs to, as it is written there."""
    if path in _EXACT:
        return path
    return next((template for template, (pattern, _) in _PATTERNS.items() if pattern.match(path)), None)


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """Method and path of everything that an application serves; "*" for what takes any method."""
    found: set[tuple[str, str]] = set()
    for route in iter_route_contexts(app.routes):
        if isinstance(route.original_route, Mount):
            path, methods = f"{route.original_route.path}/{{path:path}}", {"GET", "HEAD"}  # of files, which check it
        else:
            path, methods = str(route.path), set(route.methods or ("*",))
        found |= {(method, path) for method in methods}
    return found


def check_routes(app: FastAPI) -> None:
    """AssertionError unless the application's routes are those of the table."""
    _check(routes_of(app))


def _check(routes: Iterable[tuple[str, str]]) -> None:
    differing = sorted(set(routes) ^ ACCESS.keys())
    if differing:
        raise AssertionError(
            f"server/stellarbyte_server/access/rules.py and the application differ about who may call {differing}"
        )
