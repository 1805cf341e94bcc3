"""Access rules: each endpoint declares one, and a table of all routes gives the rule of a method and path.

Creating an application with an endpoint without a rule fails.
"""

import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import compile_path


class Access(Enum):
    OPEN = "open"  # everyone: probes and scrapers, which often cannot send keys, and pages
    USER = "user"  # any key, if keys exist
    ADMIN = "admin"  # the admin key; with --allow-local-admin also this machine


EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])
_RULE = "access_rule"  # the attribute of an endpoint


def allows(access: Access) -> Callable[[EndpointT], EndpointT]:
    """A decorator, below the router's, that declares an endpoint's access rule."""

    def declare(endpoint: EndpointT) -> EndpointT:
        setattr(endpoint, _RULE, access)
        return endpoint

    return declare


class RouteTable:
    """The access rule of each method and path of an application. HEAD is allowed wherever GET is."""

    def __init__(self, rules: Mapping[tuple[str, str], Access]) -> None:
        """`rules` by method and path, the path in the router's form ("/v1/models/{name:path}")."""
        self._exact: dict[str, dict[str, Access]] = {}
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, Access]]] = {}
        heads = {("HEAD", path): access for (method, path), access in rules.items() if method == "GET"}
        for (method, path), access in {**rules, **heads}.items():
            if "{" in path:
                self._patterns.setdefault(path, (compile_path(path)[0], {}))[1][method] = access
            else:
                self._exact.setdefault(path, {})[method] = access

    def methods_of(self, path: str) -> Mapping[str, Access]:
        """The methods of a path with their access rules; empty if there is no such route."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods
        return next((methods for pattern, methods in self._patterns.values() if pattern.match(path)), {})

    def route_of(self, path: str) -> str | None:
        """The route of a path, in the router's form."""
        if path in self._exact:
            return path
        return next((template for template, (pattern, _) in self._patterns.items() if pattern.match(path)), None)


def rules_of(app: FastAPI) -> dict[tuple[str, str], Access]:
    """The access rule of each method and path of an application.

    Raises:
        AssertionError: a route has no rule (mounts and WebSockets never have one), or two routes have one method and
            path.
    """
    rules: dict[tuple[str, str], Access] = {}
    for route in iter_route_contexts(app.routes):
        access = getattr(route.endpoint, _RULE, None)
        if access is None or route.path is None or not route.methods:
            raise AssertionError(f"the route {route.path} declares no access rule (access/rules.py: allows)")
        for method in route.methods:
            if (method, route.path) in rules:
                raise AssertionError(f"there are two routes for {method} {route.path}")
            rules[method, route.path] = access
    return rules
