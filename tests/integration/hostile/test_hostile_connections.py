"""Connections of all kinds of ill will: refused or closed in time, nothing kept of them, and the server as before."""

import itertools
import re
import resource
import signal
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from stellarbyte_server.http.connections.connection_limit import OTHER_FILES
from stellarbyte_server.http.connections.protocol import MAX_HEADER_BYTES, MAX_HEADER_FIELDS
from tests.support.cases import some
from tests.support.certificates import make_certificate
from tests.support.servers.fake_engine import SLOW
from tests.support.servers.processes import forget_peak, peak_bytes, resident_bytes
from tests.support.servers.raw_http import (
    BODY,
    HEAD,
    WHOLE,
    assert_healthy,
    chunked,
    connect,
    error_of,
    read_all,
    send_what_is_taken,
    statuses,
    wait_until_closed,
)
from tests.support.servers.server_process import FAKE, ServerProcess, running

RECEIVE_TIMEOUT_S = 2.0  # --receive-timeout; a quarter of it without a byte is too long
CLOSED_AFTER_S = RECEIVE_TIMEOUT_S + 10  # on a machine that is busy with other things
MAX_BODY_BYTES = 100_000
BOMB_BYTES = 16 * 2**20
HELD_LIMIT_BYTES = 4 * 2**20  # for a request that is refused


@pytest.fixture(scope="module")
def server(fake_model: str) -> Iterator[ServerProcess]:
    flags = ["--max-body-bytes", str(MAX_BODY_BYTES), "--receive-timeout", str(RECEIVE_TIMEOUT_S)]
    with running(FAKE, "--model", fake_model, *flags) as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * (MAX_HEADER_BYTES + 1),
        b"GET / HTTP/1.1\r\n" + b"a" * (5 * MAX_HEADER_BYTES),
        b"GET / HTTP/1.1\r\nx: " + b"a" * (5 * MAX_HEADER_BYTES),
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * (MAX_HEADER_FIELDS + 1),
        b"GET / HTTP/1.1\r\nHost: a\r\n" + (b"x: " + b"a" * 1000 + b"\r\n") * 70,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + (b"x: " + b"a" * 1000 + b"\r\n") * 10_000 + b"\r\n",
    ],
    ids=["path", "name", "value", "fields", "sum", "megabytes"],
)
def test_a_header_without_end_is_refused(server: ServerProcess, head: bytes) -> None:
    with connect(server) as connection:
        send_what_is_taken(connection, head)
        answer = read_all(connection)
    assert statuses(answer) == [431]
    assert error_of(answer)["code"] == "header_too_large"


def test_a_large_header_within_the_limits_is_fine(server: ServerProcess) -> None:
    headers = {f"x-{i}": "a" * 300 for i in range(180)}
    assert httpx.get(f"{server.url}/version", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (chunked(*[b"1\r\n \r\n"] * (MAX_BODY_BYTES + 1)), 413),
        (chunked(b"fffffff\r\n" + b" " * BOMB_BYTES), 413),
        (chunked(b"1;" + b"x" * BOMB_BYTES), 431),
        (chunked(b"0\r\n" + b"a: b\r\n" * (MAX_HEADER_FIELDS + 1)), 431),
        (chunked(b"0\r\nx: " + b"a" * BOMB_BYTES), 431),
        (chunked(b"fffffffffffffffff\r\n"), 400),
        (chunked(b"-1\r\n"), 400),
        (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (HEAD + b"Content-Length: 999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    ],
)
def test_bombs_in_chunks_and_lies_about_length(server: ServerProcess, content: bytes, wanted: int) -> None:
    pid = server.process.pid
    forget_peak(pid)
    before = resident_bytes(pid)
    with connect(server) as connection:
        send_what_is_taken(connection, content)
        answer = read_all(connection)
    assert statuses(answer) == [wanted]
    assert peak_bytes(pid) - before < HELD_LIMIT_BYTES
    assert_healthy(server)


VERSION = b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
LAST = VERSION.replace(b"Host", b"Connection: close\r\nHost")
OTHER_PROTOCOLS = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n",
    b"Upgrade: websocket\r\nSec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==\r\nSec-WebSocket-Version: 13\r\n"
    b"Connection: keep-alive\r\nConnection: upgrade\r\n",
    b"Connection: upgrade\r\nUpgrade: TLS/1.0\r\nUpgrade: a/1, b\r\nExpect: 100-continue\r\n",
]


def post(fields: bytes, body: bytes, is_chunked: bool) -> bytes:
    if is_chunked:
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:3], body[3:]))
        return HEAD + fields + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    return HEAD + fields + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("fields", OTHER_PROTOCOLS, ids=["h2c", "websocket", "others"])
def test_a_wish_for_another_protocol_is_ignored(server: ServerProcess, fields: bytes, is_chunked: bool) -> None:
    """The body was once dropped, and then taken for the next request. Java's client sends the first one by default."""
    good, smuggled = post(fields, BODY, is_chunked), post(fields, VERSION, is_chunked)
    bare = VERSION.replace(b"Host", fields + b"Host")
    requests = good + smuggled + bare + good + LAST
    ends = [len(requests)]
    head_end = requests.index(b"\r\n\r\n") + 4
    for pieces in ([], [head_end], [head_end - 2], [10, head_end + 5, len(good) + 3], range(1, len(requests))):
        with connect(server) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start, end in itertools.pairwise([0, *pieces, *ends]):
                connection.sendall(requests[start:end])
                if len(pieces) < 10:
                    time.sleep(0.02)  # so that it comes in these pieces
            answer = read_all(connection)
        assert [status for status in statuses(answer) if status != 100] == [200, 400, 200, 200, 200]
        assert answer.count(b'"text":"h"') == 2


def test_a_wish_for_another_protocol_may_be_the_last_request(server: ServerProcess) -> None:
    for version in (b"HTTP/1.1", b"HTTP/1.0"):
        with connect(server) as connection:
            connection.sendall(
                post(b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n", BODY, False).replace(b"HTTP/1.1", version)
            )
            assert statuses(read_all(connection)) == [200]


def test_a_tunnel_is_refused(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n" + VERSION)
        assert statuses(read_all(connection)) == [400]


def test_what_is_no_http_ends_the_connection_after_the_answers_before_it(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(WHOLE + WHOLE + b"garbage\r\n\r\n" + VERSION)
        assert statuses(read_all(connection)) == [200, 200]


def test_what_follows_a_chunked_body_is_no_header(fake_model: str) -> None:
    """Fields after a body must not bring the key, or take the place of one that a proxy has looked at."""
    with running(FAKE, "--model", fake_model, "--api-key", "user") as server, connect(server) as connection:
        body = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nAuthorization: Bearer user\r\n\r\n"
        connection.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        assert statuses(read_all(connection)) == [401]


# What was begun, and the answers that may come to who is silent then, and to who sends a byte now and then: it may
# complete a wrong request, if it is fast enough.
UNFINISHED: list[tuple[bytes, list[list[int]], list[list[int]]]] = [
    (b"", [[]], [[]]),
    (b"\r\n", [[]], [[]]),
    (b"G", [[408]], [[400]]),
    (b"GET /health HTTP/1.1\r\nHost: a\r\n", [[408]], [[408]]),
    (WHOLE[:-1], [[408]], [[400, 400]]),
    (HEAD + b"Content-Length: 10\r\n\r\n", [[408]], [[400, 400], [408]]),
    (chunked(b"5\r\nhello\r\n"), [[408]], [[400]]),
    (chunked(b"0\r\n"), [[408]], [[408]]),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n", [[403]], [[403, 400], [403]]),
    (HEAD + b"Content-Length: 999999\r\n\r\n", [[413]], [[413]]),
]


@pytest.mark.parametrize("goes_on", [False, True], ids=["silent", "drops"])
def test_who_does_not_send_what_is_due_is_closed(server: ServerProcess, goes_on: bool) -> None:
    """All at once, since each waits for the server's time-out."""
    with ThreadPoolExecutor(len(UNFINISHED)) as clients:
        heard = list(clients.map(lambda case: until_closed(server, case[0], goes_on), UNFINISHED))
    for (begun, silent, drops), answers in zip(UNFINISHED, heard, strict=True):
        assert answers in (drops if goes_on else silent), begun


def until_closed(server: ServerProcess, begun: bytes, goes_on: bool) -> list[int]:
    """What is answered until the server closes the connection."""
    drop = b"x" if begun.strip() else b"\r\n"
    with connect(server) as connection:
        connection.sendall(begun)
        answer = b""
        deadline_s = time.monotonic() + CLOSED_AFTER_S
        connection.settimeout(RECEIVE_TIMEOUT_S / 10)
        while True:
            assert time.monotonic() < deadline_s, "it is still open"
            try:
                if goes_on:
                    connection.sendall(drop)
                part = connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not part:
                break
            answer += part
    return statuses(answer)


def test_a_slow_client_that_goes_on_is_served(server: ServerProcess) -> None:
    with connect(server) as connection:
        for start in range(0, len(WHOLE), 20):
            connection.sendall(WHOLE[start : start + 20])
            time.sleep(0.02)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_stream_may_take_longer_than_its_request_may(server: ServerProcess) -> None:
    body = {"model": "fake", "prompt": SLOW, "max_tokens": int(RECEIVE_TIMEOUT_S * 2 / 0.02), "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert list(answer.iter_lines())[-2:] == ["data: [DONE]", ""]


def test_many_who_never_finish_hold_up_nobody(server: ServerProcess) -> None:
    connections = [connect(server) for _ in range(200)]
    try:
        for i, connection in enumerate(connections):
            connection.sendall((WHOLE if i % 2 else HEAD)[: -1 - i % 50])
        assert_healthy(server)
        answers = Counter(status for connection in connections for status in statuses(read_all(connection)))
        assert answers == {408: len(connections)}
    finally:
        for connection in connections:
            connection.close()
    assert_healthy(server)


def test_connections_beyond_what_the_process_can_hold_are_refused(fake_model: str) -> None:
    """Those that were there before are served on, and new ones as soon as there is room."""
    num_allowed = 40
    server = ServerProcess(FAKE, "--model", fake_model)
    try:
        limit = num_allowed + OTHER_FILES
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))  # long before it serves
        server.wait_ready()
        connections = [connect(server) for _ in range(num_allowed)]
        for _ in range(3):
            with connect(server) as one_more:
                answer = read_all(one_more)
            assert statuses(answer) == [503] and b"retry-after: 1" in answer.lower()
            assert error_of(answer)["code"] == "too_many_connections"
            request_id = re.search(rb"x-request-id: (\w+)", answer.lower())[1].decode()
            assert f"- - 503 request_id={request_id} error=too_many_connections" in server.log()
        for connection in connections:
            connection.sendall(WHOLE)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.close()
        wait_until_closed(server, num_allowed)
        assert_healthy(server)
        rejected = 'stellarbyte:rejected_requests_total{model_name="fake",reason="too_many_connections"} 3.0'
        assert rejected in httpx.get(f"{server.url}/metrics").text
        assert "Traceback" not in server.log()
    finally:
        server.stop()


@pytest.mark.parametrize("is_secure", some([False, True], 1), ids=["http", "https"])
def test_silent_connections_in_any_number_take_the_place_of_others_for_a_while_only(
    fake_model: str, tmp_path: Path, is_secure: bool
) -> None:
    """Many at once, so that each is accepted before those before it are refused. Over TLS they once did not count."""
    num_allowed, num_silent = 40, 320
    if int(Path("/proc/sys/net/core/somaxconn").read_text()) < num_silent:
        pytest.skip("the kernel lets fewer connections wait at once")
    flags, verify = [], True
    if is_secure:
        certificate, key = make_certificate(tmp_path, "server")
        flags = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
        verify = ssl.create_default_context(cafile=str(certificate))
    server = ServerProcess(FAKE, "--model", fake_model, "--receive-timeout", str(RECEIVE_TIMEOUT_S), *flags)
    url = f"{'https' if is_secure else 'http'}://127.0.0.1:{server.port}/health"
    try:
        limit = num_allowed + OTHER_FILES
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        until_it_answers(url, verify)
        server.process.send_signal(signal.SIGSTOP)
        connections = [connect(server) for _ in range(num_silent)]
        server.process.send_signal(signal.SIGCONT)
        answered = Counter(len(statuses(read_all(connection))) for connection in connections)
        assert answered == ({0: num_silent} if is_secure else {0: num_allowed, 1: num_silent - num_allowed})
        until_it_answers(url, verify)
        assert server.log().count("error=too_many_connections") == num_silent - num_allowed
        assert "Traceback" not in server.log()
    finally:
        server.process.send_signal(signal.SIGCONT)
        server.stop()


def until_it_answers(url: str, verify: ssl.SSLContext | bool) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            assert httpx.get(url, verify=verify).status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
