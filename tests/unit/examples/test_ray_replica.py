"""examples/ray/replica.py: requests passed on to a server in a process of its own, which never outlives its parent."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from examples.ray.replica import ServerChild
from tests.support.servers.fake_engine import SLOW, make_model_folder
from tests.support.servers.processes import assert_gone, descendants
from tests.support.servers.server_process import FAKE, FAKE_MODEL, ROOT, free_port

OWN = {"X-Served-By": "here"}
HEADERS_THAT_DIFFER = {"date", "server", "x-request-id", "x-served-by"}


def command(model: Path) -> list[str]:
    return [sys.executable, "-m", FAKE, "--model", str(model), "--served-model-name", FAKE_MODEL]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "fake")


@contextlib.contextmanager
def in_front_of(child: ServerChild) -> Iterator[str]:
    """The address of an application that passes everything on, as the deployment does."""

    async def pass_on(request: Request) -> Response:
        return await child.pass_on(request, OWN)

    async def check(request: Request) -> Response:
        del request
        try:
            await child.check()
        except RuntimeError as error:
            return PlainTextResponse(str(error))
        return PlainTextResponse("healthy")

    methods = ["GET", "POST", "DELETE"]
    app = Starlette(routes=[Route("/check", check), Route("/{path:path}", pass_on, methods=methods)])
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as probe:  # until it listens
        probe.get(f"{url}/check")
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def child(model: Path) -> Iterator[ServerChild]:
    child = ServerChild(command(model))
    try:
        child.wait_ready(120)
        yield child
    finally:
        child.close()


@pytest.fixture(scope="module")
def front(child: ServerChild) -> Iterator[str]:
    with in_front_of(child) as url:
        yield url


def completion(prompt: str, **fields: object) -> dict[str, object]:
    return {"model": FAKE_MODEL, "prompt": prompt, "max_tokens": 20, **fields}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/fake?a=%2F&b=", None),
        ("GET", "/v1/models/no%2Fsuch", None),
        ("POST", "/tokenize", {"model": FAKE_MODEL, "prompt": "Grüße"}),
        ("POST", "/v1/completions", completion("Hello", temperature="hot")),
        ("DELETE", "/v1/models", None),
        ("GET", "/nothing", None),
    ],
)
def test_an_answer_is_the_servers_own(
    child: ServerChild, front: str, method: str, path: str, body: dict[str, object] | None
) -> None:
    theirs = httpx.request(method, child.url + path, json=body)
    ours = httpx.request(method, front + path, json=body)
    assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)
    assert ours.headers["x-served-by"] == "here"
    kept = ours.headers.keys() - HEADERS_THAT_DIFFER
    assert kept == theirs.headers.keys() - HEADERS_THAT_DIFFER
    assert all(ours.headers[name] == theirs.headers[name] for name in kept)


def test_the_server_sees_the_clients_host_name_and_not_its_own(front: str) -> None:
    refused = httpx.get(f"{front}/v1/models", headers={"Host": "evil.example"})
    assert refused.status_code == 403 and "host names" in refused.json()["error"]["message"]


def test_a_body_over_the_servers_limit_gets_its_refusal(front: str) -> None:
    refused = httpx.post(f"{front}/v1/completions", json=completion("x" * 3_000_000))
    assert refused.status_code == 413


def test_a_streams_text_is_the_answers(front: str) -> None:
    with httpx.stream("POST", f"{front}/v1/completions", json=completion("Hello", stream=True)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, end = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert end == "[DONE]" and text == "Hello" * 4


def test_a_client_that_leaves_ends_its_request(front: str) -> None:
    endless = completion(SLOW, stream=True, max_tokens=2000)
    with httpx.stream("POST", f"{front}/v1/completions", json=endless) as answer:
        next(answer.iter_lines())
    left = 'stellarbyte:aborted_requests_total{model_name="fake",reason="client_left"}'
    for _ in range(600):
        metrics = httpx.get(f"{front}/metrics").text
        lines = [line for line in metrics.splitlines() if line.startswith(left)]
        if lines and float(lines[0].rsplit(" ", 1)[1]) >= 1:
            return
    raise AssertionError(f"{left} stays 0")


def server_pid(child: ServerChild) -> int:
    """The process below the guard."""
    port = child.url.rpartition(":")[2].encode()
    lines = {pid: command_line(pid).split(b"\0") for pid in descendants(os.getpid())}
    (pid,) = [pid for pid, words in lines.items() if port in words and b"-c" not in words]
    return pid


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_server_that_ends_breaks_streams_off_with_an_error_event(model: Path) -> None:
    child = ServerChild(command(model))
    child.wait_ready(120)
    with in_front_of(child) as url:
        assert httpx.get(f"{url}/check").text == "healthy"
        endless = completion(SLOW, stream=True, max_tokens=2000)
        with httpx.stream("POST", f"{url}/v1/completions", json=endless) as answer:
            events = (line for line in answer.iter_lines() if line)
            assert "choices" in next(events)  # passed on before the answer is complete
            os.kill(server_pid(child), signal.SIGKILL)
            *_, last = events
        assert last.startswith('data: {"error"') and "ended" in last
        refused = httpx.post(f"{url}/v1/completions", json=completion("Hello"))
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["code"] == "engine_unavailable"
        assert "does not answer" in httpx.get(f"{url}/check").text
    child.close()


def test_a_server_that_cannot_start_is_an_error() -> None:
    child = ServerChild([sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(RuntimeError, match="ended with status 3"):
        child.wait_ready(60)


PARENT = """
import sys
from examples.ray.replica import ServerChild
child = ServerChild([sys.executable, "-c", "import time; time.sleep(600)"])
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("killed", ["parent", "guard"])
def test_the_server_ends_with_its_parent_and_with_its_guard(killed: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, cwd=ROOT)
    while len(below := descendants(parent.pid)) < 2 or b"sleep(600)" not in command_line(below[1]):
        assert parent.poll() is None
    guard, server = below
    os.kill(parent.pid if killed == "parent" else guard, signal.SIGKILL)
    assert_gone([server])
    parent.kill()
    parent.communicate()
