"""--replicas with --tensor-parallel-size: two engines of two ranks each answer as one engine of one process does."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.reliability.load import Ended, ask
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.servers.adapter_server import NUM_TOKENS, PROMPT, KnownModel, completion
from tests.support.servers.processes import child_pids, descendants
from tests.support.servers.server_process import REAL, ServerProcess, running

ENGINE = "stellarbyte_server.engine.process"


def at_once(server: ServerProcess, *bodies: dict[str, Any]) -> list[Ended]:
    async def all_of_them() -> list[Ended]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            return await asyncio.gather(*(ask(http, body) for body in bodies))

    return asyncio.run(all_of_them())


def wait_until(server: ServerProcess, status: str) -> None:
    deadline_s = time.monotonic() + 300
    while httpx.get(f"{server.url}/health", timeout=30).json()["status"] != status:
        assert time.monotonic() < deadline_s, server.log()
        time.sleep(0.02)


@pytest.mark.slow
def test_two_replicas_of_two_ranks_answer_and_change_adapters_as_one_engine(tmp_path: Path) -> None:
    """Greedy and seeded, with adapters that are loaded, replaced and kept by a replica whose rank was killed."""
    known = KnownModel.make(tmp_path)
    answers = {name: known.add_adapter(tmp_path / "adapters" / name, seed) for seed, name in enumerate("ab")}
    request = make_request(PROMPT, NUM_TOKENS, seed=7, temperature=1.0)
    (seeded_tokens,) = ModelEngine(known.model, num_blocks=256).generate([request])
    seeded = completion("tiny", temperature=1.0, seed=7, return_token_ids=True, context_overflow="error")
    flags = ["--model", str(known.folder), "--device", "cpu", "--replicas", "2", "--tensor-parallel-size", "2"]
    flags += ["--adapter-dir", str(tmp_path / "adapters"), "--allow-local-admin", "--restart-engine", "5"]
    with running(REAL, *flags, "--kv-cache-memory", "16MiB", "--log-level", "warning") as server:
        engines = child_pids(server, ENGINE)
        assert len(engines) == 2 and all(len(descendants(engine)) == 1 for engine in engines)
        assert [end.token_ids for end in at_once(server, *[seeded] * 6)] == [seeded_tokens] * 6
        for path in "ab":
            body = {"lora_name": "x", "lora_path": path, "load_inplace": True}
            loaded = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=120)
            assert loaded.status_code == 200, loaded.text
            ends = at_once(server, *[completion("x") for _ in range(6)])
            assert [end.text for end in ends] == [answers[path][NUM_TOKENS]] * 6
        os.kill(descendants(engines[0])[0], signal.SIGKILL)
        wait_until(server, "degraded")
        assert [end.text for end in at_once(server, completion("x"))] == [answers["b"][NUM_TOKENS]]
        wait_until(server, "ok")
        names = ["x", "a"] * 4
        ends = at_once(server, *map(completion, names))
        assert [end.text for end in ends] == [answers["b" if name == "x" else "a"][NUM_TOKENS] for name in names]
        lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
        tokens = [line for line in lines if line.startswith("stellarbyte:engine_generation_tokens_total{")]
        assert len(tokens) == 2 and all(float(line.rsplit(" ", 1)[1]) > 0 for line in tokens)
        assert "Traceback" not in server.log(), server.log()
