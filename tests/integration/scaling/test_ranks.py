"""A server whose engine is several ranks: one that dies ends all with one line, and no process is left over."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from stellarbyte.checkpoint.convert import convert
from tests.support.models.hugging_face import tiny_llama
from tests.support.servers.processes import assert_gone, child_pids, descendants
from tests.support.servers.server_process import REAL, ServerProcess, running

ENGINE = "stellarbyte_server.engine.process"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    return str(convert(tiny_llama(folder / "llama"), folder / "tiny"))


def rank_of(server: ServerProcess) -> int:
    (engine,) = child_pids(server, ENGINE)
    (rank,) = descendants(engine)
    return rank


def stream(server: ServerProcess, num_tokens: int) -> AbstractContextManager[httpx.Response]:
    body = {"model": "tiny", "prompt": "the capital", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "context_overflow": "slide"}
    return httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60)


def events_until_end(lines: Iterator[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("killed", [("rank 1",), pytest.param(("rank 0", "rank 1", "rank 0"), marks=pytest.mark.slow)])
def test_the_ranks_live_and_die_together(killed: tuple[str, ...], tiny_model: str) -> None:
    flags = ["--model", tiny_model, "--device", "cpu", "--tensor-parallel-size", "2", "--restart-engine", "5"]
    with running(REAL, *flags, "--shutdown-timeout", "30") as server:
        for which in killed:
            (engine,) = child_pids(server, ENGINE)
            rank = rank_of(server)
            with stream(server, 10**6) as answer:
                lines = answer.iter_lines()
                assert "text" in next(line for line in lines if line.startswith("data: "))
                os.kill(rank if which == "rank 1" else engine, signal.SIGKILL)
                assert "error" in events_until_end(lines)[-1]
            assert_gone([engine, rank])
            _until_ready(server)
        log = server.log()
        assert log.count("tensor-parallel rank 1 of 2 has ended (killed by signal 9); the engine ends with it") == 1
        assert "Traceback" not in log
        processes = descendants(server.process.pid)
        with stream(server, 60) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            server.process.send_signal(signal.SIGTERM)
            assert events_until_end(lines)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait(30) == 0
        assert_gone(processes)


def _until_ready(server: ServerProcess) -> None:
    deadline_s = time.monotonic() + 300
    while httpx.get(f"{server.url}/ready", timeout=5).status_code != 200:
        assert time.monotonic() < deadline_s, server.log()
        time.sleep(0.2)
