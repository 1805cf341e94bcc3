"""The first check of every request: its host, its route and its key's permission. Plain ASGI."""

import re
from functools import partial
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from stellarbyte_server.access.keys import Key, Keyring
from stellarbyte_server.access.paths import path_of
from stellarbyte_server.access.rules import Access, RouteTable
from stellarbyte_server.api.caller import BATCH, REQUIRE_ADMIN
from stellarbyte_server.api.contract.errors import ApiError, bad_request, method_not_allowed, no_route
from stellarbyte_server.config.setting_values import is_address, is_loopback
from stellarbyte_server.config.settings import ServerSettings

ADMIN_ADDRESS = "admin_address"  # key in a scope's state of requests to --admin-listen, which only this server can set
_READING = ("GET", "HEAD")
_CHANGING = ("POST", "DELETE")
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)
_ORIGIN = re.compile(r"https?://(?P<host>[^/]+)", re.IGNORECASE)


class AtAdminAddress:
    """Marks all requests as requests to the address of --admin-listen."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[ADMIN_ADDRESS] = True
        await self._app(scope, receive, send)


class Gate:
    """Passes requests that the table of routes and the keys allow; `state.key` is then the request's `Key`."""

    def __init__(self, app: ASGIApp, routes: RouteTable, keyring: Keyring, settings: ServerSettings) -> None:
        self._app = app
        self._routes = routes
        self._cors_origins = settings.cors_origin
        self._keyring = keyring
        self._is_local = is_loopback(settings.host)
        self._names = {"localhost", settings.host.lower(), *settings.allowed_host}
        self._allows_local_admin = settings.allow_local_admin and self._is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            batch = scope.get("state", {}).get(BATCH)
            if batch is not None:  # checked when the batch was created
                scope["state"]["key"] = batch.key
            elif scope["type"] != "lifespan":  # not a client's request
                self._check(scope)
        except ApiError as error:
            await error.answer(scope, receive, send)
            return
        if scope.get("method") == "HEAD":  # routes answer GET; the HTTP protocol leaves the body out
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """ApiError unless the request is allowed. Without a key, unknown paths get the same error as known ones."""
        headers = Headers(scope=scope)
        keyring = self._keyring
        is_operators = ADMIN_ADDRESS in scope["state"]
        if is_operators:
            _require_local(headers, "At the address of --admin-listen")
        elif not keyring.has_user_keys and self._key(headers) is None and not self._is_own_name(headers):
            addresses = "addresses 127.… and [::1]" if self._is_local else "IP addresses"
            raise ApiError(
                403,
                f"Without --api-key this server accepts only the host names localhost, {addresses}, and those given"
                " with --allowed-host.",
            )
        path, method = path_of(scope), scope["method"]
        methods = self._routes.methods_of(path)
        access = methods.get(method, Access.USER)
        if access is not Access.OPEN:
            key = self._key(headers)
            if key is not None:
                scope["state"]["key"] = key
            scope["state"][REQUIRE_ADMIN] = (
                partial(_require_json, headers, method)
                if is_operators
                else partial(self._require_admin, key, method, headers)
            )
            if is_operators and (access is Access.ADMIN or method in _READING):
                _require_json(headers, method)
            elif access is Access.ADMIN:
                self._require_admin(key, method, headers)
            elif key is None and keyring.has_user_keys:
                raise _no_key("This request needs one of the server's API keys")
            elif key is None and method in _CHANGING and not self._may_come_from(headers):
                raise ApiError(
                    403, "Without API keys, web pages of other origins are refused unless --cors-origin allows them."
                )
        if not methods:
            raise no_route(path)
        if method not in methods:
            raise method_not_allowed(method, path, methods)

    def _is_own_name(self, headers: Headers) -> bool:
        """Whether a request's host is an address, or a name that others cannot make resolve to this server.

        Any other name may belong to a web page and resolve to this server only after the page was loaded (DNS
        rebinding): for the browser the page then has this server's origin. Addresses are safe; but a server on loopback
        gets requests for other addresses only through a proxy.
        """
        hosts = headers.getlist("host")
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            return False
        name = match["name"].strip("[]").lower()
        return name in self._names or (is_loopback(name) if self._is_local else is_address(name))

    def _may_come_from(self, headers: Headers) -> bool:
        """Whether a request is not a web page's, or comes from an allowed page.

        Browsers send simple requests of any page without a preflight, and only withhold the answer from the page.
        """
        origin = headers.get("origin")
        if origin is None or "*" in self._cors_origins or origin in self._cors_origins or _is_own_page(origin):
            return True
        match = _ORIGIN.fullmatch(origin)
        return match is not None and match["host"].lower() == headers.get("host", "").lower()

    def _key(self, headers: Headers) -> Key | None:
        """The key in the header Authorization or, if that has no valid key, in x-api-key (Anthropic's clients)."""
        given = headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        key = self._keyring.find(token.strip().encode("latin-1")) if scheme.lower() == "bearer" else None
        given = headers.getlist("x-api-key")
        if key is None and len(given) == 1:
            key = self._keyring.find(given[0].strip().encode("latin-1"))
        return key

    def _require_admin(self, key: Key | None, method: str, headers: Headers) -> None:
        """ApiError unless the key is the operator's, or --allow-local-admin allows programs of this machine.

        A request does not show whether it comes from a program of this machine or from a proxy or tunnel on it: nginx
        by default connects from loopback, with the loopback in Host and no further header. So the operator must declare
        that no proxy exists; the checks of proxies' and pages' headers are a second line of defence.

        A web page open on this machine can send requests here, too. It cannot send JSON without a preflight, which only
        --cors-origin grants; its Origin header identifies it, or, after DNS rebinding, the Host header.
        """
        if self._keyring.has_admin_key:
            if key is None:
                raise _no_key("This request needs the server's --admin-api-key")
            if not key.is_admin:
                raise ApiError(
                    403, f"The key {key.name!r} does not permit this request; it needs the server's --admin-api-key."
                )
        elif self._keyring.has_user_keys:
            raise ApiError(403, "This request is disabled: the server has API keys but no --admin-api-key.")
        elif not self._is_local:
            raise ApiError(403, "This request is disabled: the server has no --admin-api-key.")
        elif not self._allows_local_admin:
            raise ApiError(
                403,
                "This request is disabled: the server has no --admin-api-key. If no proxy or tunnel leads to it,"
                " --allow-local-admin enables it for this machine's programs without a key.",
            )
        else:
            _require_local(headers, "Without --admin-api-key")
        _require_json(headers, method)


def _require_local(headers: Headers, where: str) -> None:
    """ApiError if headers show that a request comes through a proxy or from a web page of another host."""
    hosts = headers.getlist("host")
    if any(name in headers for name in _PROXY_HEADERS) or len(hosts) != 1 or not _is_loopback_host(hosts[0]):
        raise ApiError(403, f"{where} this request is refused through a proxy.")
    if "origin" in headers and not _is_own_page(headers["origin"]):
        raise ApiError(403, f"{where} this request is refused from web pages of other hosts.")


def _require_json(headers: Headers, method: str) -> None:
    """ApiError unless a request that changes something is JSON, which web pages cannot send without a preflight."""
    if (
        method not in _READING
        and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json"
    ):
        raise bad_request("The header 'Content-Type' must be application/json.")


def _is_loopback_host(host: str) -> bool:
    """Whether a host, in the form of the headers Host and Origin, is loopback."""
    match = _HOST.fullmatch(host)
    return match is not None and is_loopback(match["name"].strip("[]"))


def _is_own_page(origin: str) -> bool:
    match = _ORIGIN.fullmatch(origin)
    return match is not None and _is_loopback_host(match["host"])


def _no_key(need: str) -> ApiError:
    message = f"{need} in the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key", headers=headers)
