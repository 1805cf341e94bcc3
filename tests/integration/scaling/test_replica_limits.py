"""--replicas with limits, several HTTP processes and ends of engines, around a scripted engine."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from tests.support.cases import some
from tests.support.servers.fake_engine import SLOW, make_model_folder
from tests.support.servers.processes import assert_gone, child_pids, descendants, is_alive
from tests.support.servers.server_process import FAKE, ServerProcess, running

ENGINE = "tests.support.servers.fake_engine"
KEYS = """
[alice]
key = 'key-alice'
concurrent_streams = 3
[bob]
key = 'key-bob'
requests_per_minute = 5
[carol]
key = 'key-carol'
tokens_per_minute = 100
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(make_model_folder(tmp_path / "fake"))


def complete(server: ServerProcess, key: str, **fields: object) -> httpx.Response:
    body = {"model": "fake", "prompt": "hello", "max_tokens": 1} | fields
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)


def wait_for(what: Callable[[], object], limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_limits_of_keys_are_of_all_replicas(model: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    with running(FAKE, "--model", model, "--keys", str(keys), "--replicas", "2") as server:
        with ThreadPoolExecutor(8) as threads:
            slow = {"prompt": SLOW, "max_tokens": 150}
            statuses = [
                each.status_code for each in threads.map(lambda _: complete(server, "key-alice", **slow), range(8))
            ]
            assert sorted(statuses) == [200] * 3 + [429] * 5
            assert complete(server, "key-alice").status_code == 200, "they have ended"
            statuses = [each.status_code for each in threads.map(lambda _: complete(server, "key-bob"), range(8))]
            assert sorted(statuses) == [200] * 5 + [429] * 3
        statuses = [complete(server, "key-carol", prompt="0123456789" * 2, max_tokens=4).status_code for _ in range(5)]
        assert statuses == [200] * 4 + [429], "24 tokens each"
        assert complete(server, "key-bob").headers["retry-after"]


@pytest.mark.slow
def test_replicas_end_one_by_one_and_the_server_with_the_last(model: str) -> None:
    flags = ["--model", model, "--replicas", "3", "--http-workers", "2"]
    with running(FAKE, *flags) as server:
        below = descendants(server.process.pid)

        def answers() -> list[int]:
            return [complete(server, "any").status_code for _ in range(8)]

        def health() -> httpx.Response:
            return httpx.get(f"{server.url}/health")

        for left in (2, 1):
            os.kill(child_pids(server, ENGINE)[0], signal.SIGKILL)
            says = {"status": "degraded", "message": f"{left} of 3 replicas serve."}
            wait_for(lambda says=says: all(health().json() == says for _ in range(8)))
            assert answers() == [200] * 8
            assert server.log().count(f"the server goes on with {left} of 3") == 3, "each HTTP process says so once"
        os.kill(child_pids(server, ENGINE)[0], signal.SIGKILL)
        wait_for(lambda: health().status_code == 503)
        assert complete(server, "any").status_code == 503
        assert server.wait(20) == 1
        assert_gone(below)
        assert "Traceback" not in server.log()


@pytest.mark.slow
def test_a_worker_that_starts_later_knows_the_replicas_and_their_counts(model: str) -> None:
    flags = ["--model", model, "--replicas", "2", "--http-workers", "2", "--restart-engine", "1"]
    with running(FAKE, *flags) as server:
        for _ in range(10):
            assert complete(server, "any", max_tokens=3).status_code == 200
        assert server.metric("vllm:generation_tokens_total") == 30
        first = child_pids(server, ENGINE)[0]
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: len(child_pids(server, ENGINE)) == 2 and first not in child_pids(server, ENGINE))
        wait_for(lambda: all(httpx.get(f"{server.url}/health").json() == {"status": "ok"} for _ in range(8)))
        assert server.metric("vllm:generation_tokens_total") == 30
        for engine in child_pids(server, ENGINE):
            if engine != first:
                os.kill(engine, signal.SIGKILL)
                break
        workers = child_pids(server, "stellarbyte_server.http.worker")
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        wait_for(lambda: len(set(child_pids(server, "stellarbyte_server.http.worker")) - set(workers)) == 2)

        def counts() -> set[float]:
            try:
                return {server.metric("vllm:generation_tokens_total") for _ in range(4)}
            except (httpx.TransportError, AssertionError):
                return set()

        wait_for(lambda: counts() == {30.0})


@pytest.mark.parametrize("end", some([signal.SIGTERM, signal.SIGKILL], 1))
def test_no_folder_and_no_process_is_left(model: str, end: signal.Signals) -> None:
    with (
        TemporaryDirectory(prefix="ends-") as folder,  # pytest's folders have paths too long for a socket
        running(FAKE, "--model", model, "--replicas", "2", environment={"TMPDIR": folder}) as server,
    ):
        temporary = Path(folder)
        assert len(list(temporary.iterdir())) == 3, "one for each engine, and one of the server"
        engines = child_pids(server, ENGINE)
        server.process.send_signal(end)
        server.wait(30)
        wait_for(lambda: not any(map(is_alive, engines)))
        wait_for(lambda: not list(temporary.iterdir()))
