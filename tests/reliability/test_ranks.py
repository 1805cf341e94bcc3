"""A server whose engine is several ranks: one that dies ends all with one line, and no process is left over."""

import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.support.servers.processes import assert_gone, child_pids, descendants
from tests.support.servers.server_process import REAL, ServerProcess, running

ENGINE = "stellarbyte_server.engine.process"


def rank_of(server: ServerProcess) -> int:
    (engine,) = child_pids(server, ENGINE)
    (rank,) = descendants(engine)
    return rank


def stream(server: ServerProcess, num_tokens: int) -> httpx._client.Client:  # type: ignore[name-defined]
    body = {"model": "tiny", "prompt": "the capital", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "context_overflow": "slide"}
    return httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60)


def events_until_end(lines) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def test_the_ranks_live_and_die_together(tiny_model: str, tmp_path: Path) -> None:
    flags = ["--model", tiny_model, "--device", "cpu", "--tensor-parallel-size", "2", "--restart-engine", "5"]
    with running(REAL, *flags, "--shutdown-timeout", "30") as server:
        for how in ("rank 1", "rank 0"):
            (engine,) = child_pids(server, ENGINE)
            rank = rank_of(server)
            with stream(server, 10**6) as answer:
                lines = answer.iter_lines()
                assert "text" in next(line for line in lines if line.startswith("data: "))
                os.kill(rank if how == "rank 1" else engine, signal.SIGKILL)
                assert "error" in events_until_end(lines)[-1]
            assert_gone([engine, rank])
            server.wait_logged("the engine process takes requests again" if False else "restart", 60)
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
    import time

    deadline_s = time.monotonic() + 60
    while httpx.get(f"{server.url}/ready", timeout=5).status_code != 200:
        assert time.monotonic() < deadline_s, server.log()
        time.sleep(0.05)


if __name__ == "__main__":
    pytest.main()
