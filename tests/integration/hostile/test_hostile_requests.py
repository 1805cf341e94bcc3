"""Hundreds of requests (thousands with --slow) made wrong at random: each is answered rightly, and nothing is left."""

import random
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.cases import some
from tests.support.servers.processes import resident_bytes
from tests.support.servers.raw_http import (
    WHOLE,
    assert_healthy,
    chunked,
    connect,
    open_files,
    read_all,
    statuses,
    wait_until_closed,
)
from tests.support.servers.server_process import FAKE, ServerProcess, running

AT_ONCE = 400
GROWTH_LIMIT_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def server(fake_model: str) -> Iterator[ServerProcess]:
    with running(FAKE, "--model", fake_model, "--max-body-bytes", "100000", "--receive-timeout", "2") as server:
        yield server
        assert "Traceback" not in server.log()


def hostile(chance: random.Random) -> tuple[bytes, list[int] | None]:
    """A request in which something is not as it should be; the answers to it, None: one that says 200 or 4xx."""
    request = bytearray(WHOLE)
    wanted: list[int] | None = None
    garbage = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 40)))
    place = chance.randrange(len(request))
    match chance.randrange(9):
        case 0:
            request[place : place + len(garbage)] = garbage
        case 1:
            request = bytearray(garbage)
        case 2:
            request[:0] = chance.choice(
                [b"\r\n" * 500, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00", b" "]
            )
        case 3:
            method = chance.choice([b"GET", b"CONNECT", b"OPTIONS", b"TRACE", b"PUT", b"BREW", b"post", b"SUBSCRIBE"])
            target = chance.choice(
                [b"*", b"http://evil.test/health", b"a:1", b"//", b"/\xff", b"/%00", b"/?" + garbage]
            )
            request[: request.index(b" HTTP")] = method + b" " + target
        case 4:
            field = chance.choice(
                [
                    b"Upgrade: websocket\r\nConnection: upgrade",
                    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAAA",
                    b"Expect: 100-continue",
                    b"Expect: nonsense",
                    b"Transfer-Encoding: gzip, chunked",
                    b"Transfer-Encoding: identity",
                    b"Content-Encoding: gzip",
                    b"Content-Length: +5",
                    b"Host: evil.test",
                    b"Connection: close, close",
                    b"Authorization: Bearer " + garbage,
                    b"X: " + garbage,
                    b" folded: x",
                    b": x",
                    b"x",
                ]
            )
            request = bytearray(WHOLE.replace(b"Content-Type", field + b"\r\nContent-Type", 1))
        case 5:
            number = chance.randrange(2, 20)
            request, wanted = bytearray(WHOLE * number), [200] * number  # pipelined
        case 6:
            request, wanted = bytearray(WHOLE[: place + 1]), [408 if place + 1 < len(WHOLE) else 200]
        case 7:
            parts = [b"%x\r\n%s\r\n" % (chance.choice([1, 5, 2**31, 2**64]), garbage) for _ in range(5)]
            request = bytearray(chunked(*parts))
        case 8:
            version = chance.choice([b"HTTP/1.0", b"HTTP/9.9", b"HTTP/0.9", b"ICY"])
            request, wanted = (
                bytearray(WHOLE.replace(b"HTTP/1.1", version)),
                [200 if version in (b"HTTP/1.0", b"HTTP/0.9") else 400],
            )
    return bytes(request), wanted


def check_answers(request: bytes, wanted: list[int] | None, is_half_closed: bool, found: list[int]) -> None:
    if wanted is not None:
        assert found == wanted or (is_half_closed and found == []), request
    assert found or is_half_closed or not request.strip(b"\r\n"), request
    assert all(status in (100, 200) or 400 <= status < 500 for status in found), (found, request)


def send_hostile(server: ServerProcess, chance: random.Random, number: int) -> Counter[int]:
    """Send some at once, half of them from clients that say that they will send no more; the answers."""
    seen: Counter[int] = Counter()
    sent = []
    for _ in range(number):
        connection = connect(server)
        request, wanted = hostile(chance)
        is_half_closed = chance.random() < 0.5
        sent.append((connection, request, wanted, is_half_closed))
        try:
            connection.sendall(request)
            if is_half_closed:
                connection.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # it was refused before its end
    for connection, request, wanted, is_half_closed in sent:
        with connection:
            found = statuses(read_all(connection))
        check_answers(request, wanted, is_half_closed, found)
        seen.update(found)
    return seen


@pytest.mark.parametrize("num_hostile", some([400, 2000], 0))
def test_hostile_requests_leave_nothing_behind(server: ServerProcess, num_hostile: int) -> None:
    chance = random.Random(0)
    files_before = open_files(server)
    send_hostile(server, chance, AT_ONCE)  # what is made once is made
    before = resident_bytes(server.process.pid)
    seen: Counter[int] = Counter()
    for _ in range(num_hostile // AT_ONCE):
        seen += send_hostile(server, chance, AT_ONCE)
    assert seen[200] > num_hostile / 10 and seen[400] > num_hostile / 10 and seen[408] > num_hostile / 100, seen
    assert_healthy(server)
    wait_until_closed(server, files_before)
    assert resident_bytes(server.process.pid) - before < GROWTH_LIMIT_BYTES
