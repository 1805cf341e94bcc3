"""Counts requests that do not reach the engine against keys' requests per minute: refused ones, and /tokenize.

The engine counts for all HTTP processes, and counts submitted requests itself. Requests refused before that are
reported to it after their answer, as they also cost time. When the limit is reached, this process refuses the key's
requests at once, without reading their bodies, until the limit allows more.
"""

import asyncio
import math
import time

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from stellarbyte_server.access.keys import Key
from stellarbyte_server.api.caller import limits_of
from stellarbyte_server.api.contract.errors import ApiError, from_engine
from stellarbyte_server.api.disconnect import CLIENT_CLOSED_REQUEST
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.submission import record_of
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.observe.record import RequestRecord
from stellarbyte_server.protocol.messages import KeyLimits
from stellarbyte_server.protocol.request import RATE_LIMITED, RequestRejected

CHARGE_LIMIT_S = 10.0


async def charge(http: Request, service: Service) -> None:
    """Count a request without the model, before its work; ApiError if it exceeds the key's limit."""
    limits = limits_of(http)
    if limits is None or limits.requests_per_minute is None:
        return
    record_of(http).is_counted = True
    try:
        async with asyncio.timeout(CHARGE_LIMIT_S):
            await service.client.charge(limits)
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error) from None
    except TimeoutError:
        raise from_engine(EngineDead("The engine does not answer.")) from None


class RefusalRate:
    """Counts refused requests against their keys, and refuses more of them beyond the limit. Inside the gate."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._full_until_s: dict[str, float] = {}  # by the key's name: end of the refusals
        self._charging: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key: Key | None = scope.get("state", {}).get("key")
        limits = None if key is None else key.limits
        if limits is None or limits.requests_per_minute is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        wait_s = math.ceil(self._full_until_s.get(limits.key_name, 0.0) - time.monotonic())
        if wait_s > 0:
            most = limits.requests_per_minute
            message = f"The key {limits.key_name!r} is at its limit of {most} requests per minute; try again in"
            headers = {"Retry-After": str(wait_s)}
            await ApiError(429, f"{message} {wait_s} s.", code=RATE_LIMITED, headers=headers).answer(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)
        if _is_refused(scope["state"]["record"]):
            charging = asyncio.create_task(self._charge(limits))  # sent at once, before the client's next request
            self._charging.add(charging)
            charging.add_done_callback(self._charging.discard)

    async def _charge(self, limits: KeyLimits) -> None:
        try:
            await self._service.client.charge(limits)
        except RequestRejected as refusal:
            self._full_until_s[limits.key_name] = time.monotonic() + (refusal.retry_after_s or 0)
        except EngineDead:
            pass  # a new engine starts with new counts


def _is_refused(record: RequestRecord) -> bool:
    """Whether a request was refused without reaching the engine."""
    status = record.status
    return (
        status is not None and 400 <= status < 500 and status not in (429, CLIENT_CLOSED_REQUEST)
    ) and not record.is_counted
