"""--admin-listen: a second address of the same server, on which local programs are operators."""

import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.over_http import get_often
from tests.support.servers.fake_engine import SLOW
from tests.support.servers.server_process import FAKE, ServerProcess, free_port, running, the_error_line

LOAD = {"lora_name": "x", "lora_path": "x"}  # the fake engine has no adapters: 400 of the engine
USER_KEY = "key-of-a-user"


@pytest.fixture(scope="module", params=["1", "2"], ids=["one process", "two processes"])
def both(fake_model: str, request: pytest.FixtureRequest) -> Iterator[tuple[ServerProcess, str]]:
    """A server with keys, and its admin address."""
    port = free_port()
    flags = ["--api-key", USER_KEY, "--admin-listen", f"127.0.0.1:{port}", "--http-workers", request.param]
    with running(FAKE, "--model", fake_model, *flags) as server:
        yield server, f"http://127.0.0.1:{port}"


def test_adapters_change_there_without_a_key_and_nowhere_else(both: tuple[ServerProcess, str]) -> None:
    server, admin = both
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        body = LOAD if path.startswith("/v1/load") else {"lora_name": "x"}
        for _ in range(6):  # whichever process answers
            assert httpx.post(admin + path, json=body).status_code == 400
            assert httpx.post(server.url + path, json=body).status_code == 403
            with_key = {"Authorization": f"Bearer {USER_KEY}"}
            assert httpx.post(server.url + path, json=body, headers=with_key).status_code == 403
    assert {answer.status_code for answer in get_often(server, "/v1/models")} == {401}
    assert httpx.get(f"{admin}/v1/models").json()["data"][0]["id"] == "fake"
    assert httpx.get(f"{admin}/health").status_code == 200
    completion = {"model": "fake", "prompt": "a", "max_tokens": 1}
    assert httpx.post(f"{admin}/v1/completions", json=completion).status_code == 401
    with_key = {"Authorization": f"Bearer {USER_KEY}"}
    assert httpx.post(f"{admin}/v1/completions", json=completion, headers=with_key).status_code == 200
    rebound = httpx.post(f"{admin}/v1/load_lora_adapter", json=LOAD, headers={"Host": "evil.test"})
    assert rebound.status_code == 403 and "--admin-listen" in rebound.json()["error"]["message"]


def test_a_busy_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = ServerProcess(FAKE, "--admin-listen", f"127.0.0.1:{port}")
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in the_error_line(server)
    server = ServerProcess(FAKE, "--admin-listen", "0.0.0.0:9000")
    assert "--admin-listen" in the_error_line(server)


def test_both_addresses_drain_and_stop_together(fake_model: str) -> None:
    port = free_port()
    with running(FAKE, "--model", fake_model, "--admin-listen", f"127.0.0.1:{port}") as server:
        body = {"model": "fake", "prompt": SLOW, "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as stream:
            events = filter(None, stream.iter_lines())
            next(events)
            server.process.send_signal(signal.SIGTERM)
            deadline_s = time.monotonic() + 10
            while httpx.get(f"{server.url}/ready").status_code != 503:
                assert time.monotonic() < deadline_s
            assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 503
            assert list(events)[-1] == "data: [DONE]", "the stream at the admin address ended whole"
        assert server.wait() == 0
        for address in (server.port, port):
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://127.0.0.1:{address}/health")
