"""A connection before its TLS handshake is complete; it counts as a connection from the start.

asyncio's TLS servers would tell the protocol about a connection only after the handshake.
"""

import asyncio
import math
import ssl
from typing import Any, ClassVar

from starlette.datastructures import Headers

from stellarbyte_server.api.middleware import log_request, request_id_for
from stellarbyte_server.http.connections.connection_limit import too_many_connections
from stellarbyte_server.http.connections.protocol import BoundedProtocol


class TlsProtocol(asyncio.Protocol):
    """Passes a connection to HTTP if its handshake completes within `receive_timeout_s` of the bounds."""

    context: ClassVar[ssl.SSLContext]
    http_class: ClassVar[type[BoundedProtocol]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._http = self.http_class(*args, **kwargs)
        self._tcp: asyncio.Transport
        self._handshake: asyncio.Task[None] | None = None
        self._early: list[bytes] = []  # received together with the end of the handshake

    def connection_made(self, tcp: asyncio.Transport) -> None:  # type: ignore[override]
        self._tcp = tcp
        connections, bounds = self._http.connections, self._http.bounds
        connections.add(self)  # type: ignore[arg-type]
        if len(connections) > bounds.max_connections:  # without an answer, which would need a handshake
            error = too_many_connections()
            bounds.note_rejected(str(error.code))
            log_request(request_id_for(Headers()), None, None, None, error=error.code)
            tcp.abort()
            return
        tcp.set_write_buffer_limits(0)  # unsent output stays in the TLS layer, where it is bounded
        tcp.pause_reading()  # until TLS reads
        self._handshake = asyncio.create_task(self._shake_hands())

    def connection_lost(self, _: Exception | None) -> None:
        self._http.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def shutdown(self) -> None:
        """Close at shutdown; called by uvicorn."""
        self._tcp.abort()

    async def _shake_hands(self) -> None:
        try:
            tls = await asyncio.get_running_loop().start_tls(
                self._tcp,
                self,
                self.context,
                server_side=True,
                ssl_handshake_timeout=self._http.bounds.receive_timeout_s,
                ssl_shutdown_timeout=math.inf,  # SendTimeout bounds it
            )
        except OSError:  # includes ssl.SSLError
            tls = None
        finally:
            self._http.connections.discard(self)
        if tls is None:  # connection lost
            return
        tls.set_protocol(self._http)
        self._http.connection_made(tls, self._tcp)
        for data in self._early:
            self._http.data_received(data)


def tls_protocol(http_class: type[BoundedProtocol], context: ssl.SSLContext) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn in place of `http_class`."""
    return type("Protocol", (TlsProtocol,), {"http_class": http_class, "context": context})
