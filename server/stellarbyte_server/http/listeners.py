"""The server's listening sockets: of its port, and of --admin-listen. Imports no modules of HTTP."""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from stellarbyte_server.config.settings import ServerSettings

# The kernel's buffer for unread output of a connection. Linux doubles the value; its default is megabytes.
SEND_BUFFER_BYTES = 64 * 1024


class ListenError(Exception):
    """An address cannot be listened on; str() is one sentence for the user."""


@dataclass(frozen=True)
class Listeners:
    """The bound sockets of one HTTP process."""

    public: socket.socket
    admin: socket.socket | None = None  # of --admin-listen

    @property
    def filenos(self) -> tuple[int, ...]:
        return tuple(listener.fileno() for listener in (self.public, self.admin) if listener is not None)

    def close(self) -> None:
        for listener in (self.public, self.admin):
            if listener is not None:
                listener.close()


@contextlib.contextmanager
def listening(settings: ServerSettings) -> Iterator[list[Listeners]]:
    """Hold the addresses, with sockets for each HTTP process. Raises ListenError."""
    bound: list[socket.socket] = []
    number = settings.http_workers
    try:
        public = _bind_all(settings.host, settings.port, number, bound)
        admin: list[socket.socket | None] = [None] * number
        if settings.admin_listen is not None:
            admin = [*_bind_all(*settings.admin_listen, number, bound)]
        yield list(map(Listeners, public, admin))
    finally:
        for listener in bound:
            listener.close()


def _bind_all(host: str, port: int, number: int, bound: list[socket.socket]) -> list[socket.socket]:
    """New sockets of an address, which are added to `bound`; ListenError."""
    start = len(bound)
    try:
        _bind(host, port, number, bound)
    except OSError as error:
        raise ListenError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return bound[start:]


def _bind(host: str, port: int, number: int, listeners: list[socket.socket]) -> None:
    """Bind the port before the model is loaded; connections are accepted once it is ready. Adds to `listeners`.

    With several sockets each belongs to one HTTP process, and Linux spreads connections evenly over them. (Processes
    that accept from one socket get very unequal shares.) Only the later ones are bound with SO_REUSEPORT, so that a
    port in use is detected, even if its server uses SO_REUSEPORT, too.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    for index in range(number):
        listener = socket.socket(family, kind, protocol)
        listeners.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections inherit it
        if index > 0:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        if number > 1:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
