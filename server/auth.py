"""Who may do what an operator does: load and unload adapters."""

import ipaddress
import re
import secrets
from typing import Annotated

from fastapi import Depends, Request

from server.api.errors import ApiError, bad_request
from server.api.service import ServiceOfRequest

_LOOPBACK_HOST = r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


async def require_admin(request: Request, service: ServiceOfRequest) -> None:
    """ApiError unless the request carries --admin-api-key, or there is none and the server listens on loopback only.

    A web page that a user of this machine looks at can send requests here, too. It cannot send JSON without asking
    first, which is never granted, and if its name was made to point here, the Host header gives it away.
    """
    key = service.settings.admin_api_key
    if key is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
            message = "This needs the server's --admin-api-key in the header 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    elif not _is_loopback(service.settings.host):
        raise ApiError(403, "This is off because the server was started without --admin-api-key.")
    elif any(name in request.headers for name in _PROXY_HEADERS):
        raise ApiError(403, "Without --admin-api-key this does not work through a proxy.")
    elif re.fullmatch(_LOOPBACK_HOST, request.headers.get("host", "")) is None:
        raise ApiError(403, "Without --admin-api-key this works only under the host name localhost or 127.0.0.1.")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise bad_request("The header 'Content-Type' must be application/json.")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


RequireAdmin = Annotated[None, Depends(require_admin)]
