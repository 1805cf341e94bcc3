"""Clients that read slowly, or stop at any place of an answer, over TCP and TLS: a small application, real sockets."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from stellarbyte_server.http.connections.protocol import ConnectionBounds, bounded_protocol
from stellarbyte_server.http.connections.tls import server_context
from stellarbyte_server.http.connections.tls_protocol import tls_protocol
from tests.support.certificates import make_certificate

SEND_TIMEOUT_S = 1.0
ANSWER_BYTES = 3_000_000
PIECE_BYTES = 60_000
BUFFER_BYTES = 16 * 1024  # of each kernel buffer


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in one piece, in pieces (/pieces), or not to the end (/broken)."""
    await receive()
    length = {"/broken": ANSWER_BYTES + 1}.get(scope["path"], ANSWER_BYTES)
    headers = [(b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/pieces":
        for _ in range(ANSWER_BYTES // PIECE_BYTES):
            await send({"type": "http.response.body", "body": b"a" * PIECE_BYTES, "more_body": True})
        await send({"type": "http.response.body"})
    else:
        more_body = scope["path"] == "/broken"
        await send({"type": "http.response.body", "body": b"a" * ANSWER_BYTES, "more_body": more_body})


@dataclass
class Site:
    port: int
    state: ServerState
    client_context: ssl.SSLContext | None

    async def ask(self, path: str, *fields: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """What comes is read from the socket only as fast as it is read from the stream, but for small buffers."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        secure = {"ssl": self.client_context, "server_hostname": "127.0.0.1"} if self.client_context else {}
        reader, writer = await asyncio.open_connection(sock=connection, limit=BUFFER_BYTES, **secure)
        writer.write("\r\n".join([f"GET {path} HTTP/1.1", "Host: a", *fields, "\r\n"]).encode())
        await reader.readuntil(b"\r\n\r\n")
        return reader, writer

    async def until_all_are_gone(self) -> None:
        async with asyncio.timeout(30):
            while self.state.connections:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(certificate: tuple[Path, Path] | None, keep_alive_s: int = 1) -> AsyncIterator[Site]:
    rejections: list[str] = []
    bounds = ConnectionBounds(
        receive_timeout_s=30, send_timeout_s=SEND_TIMEOUT_S, max_connections=100, note_rejected=rejections.append
    )
    protocol: type[asyncio.Protocol] = bounded_protocol(bounds)
    client_context = None
    if certificate is not None:
        protocol = tls_protocol(bounded_protocol(bounds), server_context(str(certificate[0]), str(certificate[1])))
        client_context = ssl.create_default_context(cafile=str(certificate[0]))
    state = ServerState()
    config = uvicorn.Config(application, http=protocol, ws="none", log_config=None, timeout_keep_alive=keep_alive_s)
    config.load()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    server = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
        sock=listener,
    )
    async with server:
        yield Site(listener.getsockname()[1], state, client_context)


@pytest.fixture(params=["tcp", "tls"])
def certificate(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path] | None:
    return make_certificate(tmp_path, "site") if request.param == "tls" else None


def test_who_reads_steadily_gets_all_of_it_however_long_it_takes(certificate: tuple[Path, Path] | None) -> None:
    """The time-out once ran until everything was read: 1.4 MB at 200 KB/s were cut off after it."""

    async def read_steadily(site: Site, path: str, field: str) -> None:
        reader, writer = await site.ask(path, field)
        for _ in range(ANSWER_BYTES // PIECE_BYTES):
            assert len(await reader.readexactly(PIECE_BYTES)) == PIECE_BYTES
            await asyncio.sleep(2.5 * SEND_TIMEOUT_S * PIECE_BYTES / ANSWER_BYTES)
        writer.close()

    async def check() -> None:
        async with serving(certificate) as site:
            fields = ("Connection: keep-alive", "Connection: close")
            await asyncio.gather(*(read_steadily(site, path, field) for path in ("/", "/pieces") for field in fields))
            await site.until_all_are_gone()

    asyncio.run(check())


def test_who_stops_reading_is_cut_off_wherever_that_is(certificate: tuple[Path, Path] | None) -> None:
    """When the connection was to be closed, one with little left to read was once kept for ever."""

    async def check() -> None:
        async with serving(certificate) as site:
            clients = []
            for path in ("/", "/pieces", "/broken"):
                for field in ("Connection: keep-alive", "Connection: close"):
                    for left in (5, 20_000, 40_000, 60_000, 100_000, 200_000, 400_000, ANSWER_BYTES):
                        clients.append(await site.ask(path, field))
                        await clients[-1][0].readexactly(ANSWER_BYTES - left)
            await site.until_all_are_gone()
            for _, writer in clients:
                writer.close()

    asyncio.run(check())


def test_who_says_no_more_and_reads_no_more_is_cut_off() -> None:
    async def check() -> None:
        async with serving(None, keep_alive_s=60) as site:
            clients = []
            for left in range(60_000, 140_000, 2_000):
                clients.append(await site.ask("/"))
                await clients[-1][0].readexactly(ANSWER_BYTES - left)
            await asyncio.sleep(0.1)  # all buffers are as full as they will be
            for _, writer in clients:
                writer.write_eof()
            await site.until_all_are_gone()
            for _, writer in clients:
                writer.close()

    asyncio.run(check())
