"""SIGTERM or SIGINT under load: nobody new is let in, those who can finish do, the others hear of it, nothing is left.

Run with `--slow` for the long form (20 times); without it there is one.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.reliability.load import Ended, Progress, ask
from tests.support.cases import some
from tests.support.servers.fake_engine import SLOW, make_model_folder
from tests.support.servers.processes import descendants, is_alive
from tests.support.servers.server_process import FAKE, ServerProcess

SHORT, LONG = 100, 100_000  # tokens: with 20 ms for each 2 s, and longer than any shutdown waits
NUM_SHORT, NUM_LONG = 24, 8
SHUTDOWN_TIMEOUT_S = 8.0
ADMISSION_ENDS_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LIMIT_S = SHUTDOWN_TIMEOUT_S + 6.0  # from the signal to the end of the server's process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("models") / "fake"))


def start(model: str, workers: str, module: str = FAKE) -> ServerProcess:
    flags = ["--http-workers", workers, "--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S)]
    server = ServerProcess(module, "--model", model, *flags).wait_ready()
    server.wait_listening()
    return server


def a_body(number: int, max_tokens: int, **fields: Any) -> dict[str, Any]:
    body = {"model": "fake", "prompt": f"{SLOW} {number:02} ", "max_tokens": max_tokens, "stream": True}
    return body | {"context_overflow": "slide"} | fields


def expected_text(number: int) -> str:
    script = f"{SLOW} {number:02} "
    return (script * SHORT)[:SHORT]


async def newcomers(url: str, told_at_s: float, server: ServerProcess) -> list[tuple[float, str]]:
    """What requests hear that come after the signal, each on a connection of its own: seconds, and what."""
    heard: list[tuple[float, str]] = []
    while server.process.poll() is None:
        sent_s = time.monotonic() - told_at_s
        for path in ("/v1/completions", "/ready"):
            try:
                async with httpx.AsyncClient(base_url=url, timeout=10) as http:
                    body = a_body(99, 1, stream=False)
                    response = await (http.get(path) if path == "/ready" else http.post(path, json=body))
                what = f"{path} {response.status_code}"
                if response.status_code == 503 and "retry-after" not in response.headers:
                    what += " without Retry-After"
            except httpx.TransportError:
                what = f"{path} refused"
            heard.append((sent_s, what))
        await asyncio.sleep(0.2)
    return heard


async def begun(progresses: list[Progress]) -> None:
    """Wait until every stream has its first event."""
    async with asyncio.timeout(60):
        while not all(progress.num_events for progress in progresses):
            await asyncio.sleep(0.01)


async def shut_down(server: ServerProcess, number: signal.Signals) -> tuple[list[Ended], list[tuple[float, str]]]:
    """Signal a server that streams; how the streams ended, and what newcomers heard."""
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
        progresses = [Progress() for _ in range(NUM_SHORT + NUM_LONG)]
        streams = [
            asyncio.create_task(ask(http, a_body(i, SHORT if i < NUM_SHORT else LONG), progress))
            for i, progress in enumerate(progresses)
        ]
        await begun(progresses)
        told_at_s = time.monotonic()
        server.process.send_signal(number)
        heard = asyncio.create_task(newcomers(server.url, told_at_s, server))
        ends = await asyncio.gather(*streams)
        return ends, await asyncio.wait_for(heard, LIMIT_S)


def check_ends(ends: list[Ended]) -> None:
    for i, ended in enumerate(ends[:NUM_SHORT]):
        assert ended.is_complete and ended.is_done and ended.text == expected_text(i), (i, ended)
    for ended in ends[NUM_SHORT:]:
        assert ended.is_honest_failure and "shut down" in (ended.error or {})["message"], ended


def check_newcomers(heard: list[tuple[float, str]]) -> None:
    late = Counter(what for sent_s, what in heard if sent_s > ADMISSION_ENDS_S)
    allowed = {"/v1/completions 503", "/ready 503", "/v1/completions refused", "/ready refused"}
    assert late and late.keys() <= allowed, late


@pytest.mark.parametrize(("times", "workers"), some([(1, "2"), (1, "1"), (10, "1"), (10, "2")], 0))
def test_a_signal_with_thirty_two_streams(model: str, workers: str, times: int) -> None:
    outcomes: Counter[str] = Counter()
    most_s = 0.0
    for i in range(times):
        server = start(model, workers)
        try:
            pids = descendants(server.process.pid)
            assert len(pids) == (1 if workers == "1" else 1 + int(workers))
            began_s = time.monotonic()
            ends, heard = asyncio.run(shut_down(server, SIGNALS[(i + int(workers)) % 2]))
            assert server.wait(LIMIT_S) == 0
            most_s = max(most_s, time.monotonic() - began_s)
            check_ends(ends)
            check_newcomers(heard)
            assert any(what == "/v1/completions 503" for _, what in heard), "the port was closed and told nobody why"
            outcomes.update(what for _, what in heard)
            deadline_s = time.monotonic() + 30
            while alive := [pid for pid in pids if is_alive(pid)]:
                assert time.monotonic() < deadline_s, f"processes {alive} are still there"
                time.sleep(0.05)
            assert "Traceback" not in server.log() and "starting another" not in server.log()
        finally:
            server.process.kill()
    print(
        f"{times} times, {workers} HTTP processes: ended after {most_s:.1f} s at most; newcomers heard {dict(outcomes)}"
    )


@pytest.mark.parametrize(("workers", "number"), some([("1", signal.SIGTERM), ("2", signal.SIGINT)], 1))
def test_a_second_signal_ends_it_now(model: str, workers: str, number: signal.Signals) -> None:
    server = start(model, workers)
    try:

        async def stop_twice() -> Ended:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                progress = Progress()
                stream = asyncio.create_task(ask(http, a_body(0, LONG), progress))
                await begun([progress])
                server.process.send_signal(number)
                await asyncio.sleep(0.5)
                assert not stream.done()
                server.process.send_signal(number)
                return await asyncio.wait_for(stream, 15)

        ended = asyncio.run(stop_twice())
        assert ended.is_honest_failure and "shut down" in (ended.error or {})["message"]
        assert server.wait(5) == 0
        assert "Traceback" not in server.log()
    finally:
        server.process.kill()


@pytest.mark.slow
def test_a_server_that_goes_on_admitting_would_be_noticed(model: str) -> None:
    """The control: one that was not told to stop answers 200."""
    server = start(model, "1")
    try:

        async def listen() -> list[tuple[float, str]]:
            listening = asyncio.create_task(newcomers(server.url, time.monotonic() - 60, server))
            await asyncio.sleep(1)
            os.kill(server.process.pid, signal.SIGKILL)
            return await listening

        with pytest.raises(AssertionError, match="200"):
            check_newcomers(asyncio.run(listen()))
    finally:
        server.process.kill()


def test_an_answer_that_is_cut_off_but_called_complete_would_be_noticed() -> None:
    cut = Ended(200, text=expected_text(0)[:-1], finish_reason="length", is_done=True)
    whole = Ended(200, text=expected_text(0), finish_reason="length", is_done=True)
    with pytest.raises(AssertionError):
        check_ends([cut])
    check_ends([whole])
    with pytest.raises(AssertionError):
        check_ends(
            [
                *(Ended(200, text=expected_text(i), finish_reason="length", is_done=True) for i in range(NUM_SHORT)),
                whole,
            ]
        )
