"""HTTP byte by byte over a socket, and what a server holds meanwhile."""

import json
import re
import select
import socket
import time
from pathlib import Path

import httpx

from tests.support.servers.server_process import ServerProcess

BODY = json.dumps({"model": "fake", "prompt": "hi", "max_tokens": 1}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def send_what_is_taken(connection: socket.socket, content: bytes) -> None:
    """All of it, unless the server answers or closes; without waiting for ever where it no longer reads."""
    connection.setblocking(False)
    deadline_s = time.monotonic() + 60
    sent = 0
    while sent < len(content) and time.monotonic() < deadline_s:
        readable, writable, _ = select.select([connection], [connection], [], 1)
        if readable:
            break
        if writable:
            try:
                sent += connection.send(content[sent : sent + 65536])
            except (ConnectionError, BlockingIOError):
                break
    connection.settimeout(30)


def read_all(connection: socket.socket) -> bytes:
    """What the server says until it closes."""
    content = b""
    try:
        while part := connection.recv(65536):
            content += part
    except ConnectionResetError:
        pass
    return content


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def error_of(answer: bytes) -> dict[str, str]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def open_files(server: ServerProcess) -> int:
    return sum(1 for _ in Path(f"/proc/{server.process.pid}/fd").iterdir())


def assert_healthy(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.metric("vllm:num_requests_running") == 0
    answer = httpx.post(f"{server.url}/v1/completions", content=BODY, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


def chunked(*chunks: bytes) -> bytes:
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks)


def wait_until_closed(server: ServerProcess, num_files: int) -> None:
    """It has seen that clients closed their connections: no more files than these are open."""
    deadline_s = time.monotonic() + 30
    while open_files(server) > num_files:
        assert time.monotonic() < deadline_s, "connections are still open"
        time.sleep(0.01)
