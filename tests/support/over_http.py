"""Short ways to ask a server over HTTP, to run commands against it and to check its answers."""

import os
import subprocess
import time

import httpx

from tests.support.servers.server_process import ROOT, ServerProcess

NUM_CONNECTIONS = 24  # the kernel spreads connections: all on one of two workers once in 8 million runs


def get_often(server: ServerProcess, path: str) -> list[httpx.Response]:
    """Answers to one request on many connections."""
    return [httpx.get(server.url + path, timeout=10) for _ in range(NUM_CONNECTIONS)]


def assert_error(
    response: httpx.Response, status: int, param: str | None = None, code: str | None = None
) -> dict[str, str]:
    """The answer is an error in the API's form; what it says."""
    assert response.status_code == status
    (name,) = response.json()
    error: dict[str, str] = response.json()[name]
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"].endswith(".")
    return error


def wait_until_idle(server: ServerProcess, limit_s: float = 60) -> None:
    """AssertionError if something is still held by requests after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while left := {name: value for name in names if (value := server.metric(name))}:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)


def run(url: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that finds the server by its variable."""
    environment = os.environ | {"STELLARBYTE_URL": url}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
