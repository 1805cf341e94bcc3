"""Passes the requests of batches through the whole application, without a socket."""

import asyncio
from dataclasses import dataclass

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope

from stellarbyte_server.access.keys import Keyring
from stellarbyte_server.api.caller import BATCH, BatchCaller
from stellarbyte_server.api.contract.errors import bad_request, unavailable
from stellarbyte_server.batch.results import Answer
from stellarbyte_server.batch.runner import OwnerGone
from stellarbyte_server.client.replicas.replicas import Replicas


class _Choices(msgspec.Struct):
    stream: object = None
    priority: object = None


@dataclass(frozen=True)
class BatchRequests:
    """Sends requests to an application, with the keys that made the batches."""

    app: ASGIApp
    keyring: Keyring
    client: Replicas

    async def ask(self, owner: str, endpoint: str, body: bytes) -> Answer:
        """The answer to a request; OwnerGone if its key no longer exists."""
        try:
            key = self.keyring.of_owner(owner)
        except LookupError:
            raise OwnerGone from None
        refused = _refused(body)
        if refused is not None:
            return refused
        exchange = _Exchange(body)
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": endpoint,
            "raw_path": endpoint.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
            "client": None,
            "server": None,
            "state": {BATCH: BatchCaller(key)},
        }
        num_lost = self.client.num_lost
        await self.app(scope, exchange.receive, exchange.send)
        answer = exchange.answer()
        if answer.status == 500 and self.client.num_lost > num_lost:  # possibly because of another request
            error = unavailable("The engine process ended while it worked on this request.")
            return msgspec.structs.replace(answer, status=error.status, body=msgspec.json.encode(error.content()))
        return answer


def _refused(body: bytes) -> Answer | None:
    """The refusal of a body with fields that are not available in a batch, or None."""
    choices = msgspec.json.decode(body, type=_Choices)
    error = None
    if choices.stream not in (None, False):
        error = bad_request("The field 'stream' must be false in a batch.", "stream")
    elif choices.priority not in (None, 0):
        error = bad_request("The field 'priority' is not available in a batch, which has the lowest one.", "priority")
    if error is None:
        return None
    return Answer(status=error.status, request_id="", body=msgspec.json.encode(error.content()))


class _Exchange:
    """One request and its answer, in ASGI's form. The client never disconnects; to abort, cancel the task."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 500
        self._headers = Headers()
        self._answer = bytearray()

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = Headers(raw=message["headers"])
        else:
            self._answer += message.get("body", b"")

    def answer(self) -> Answer:
        retry_after = self._headers.get("retry-after", "")
        return Answer(
            status=self._status,
            request_id=self._headers.get("x-request-id", ""),
            body=bytes(self._answer),
            retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
        )
