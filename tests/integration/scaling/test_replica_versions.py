"""--data-dir with --replicas: versions change at all engines, also at one that is killed, and survive the server."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx

from tests.support.servers.adapter_server import KnownModel, completion
from tests.support.servers.processes import child_pids
from tests.support.servers.server_process import REAL, ServerProcess, running

ENGINE = "stellarbyte_server.engine.process"
NUM_TOKENS = 12


def change(server: ServerProcess, route: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{route}", json=body, timeout=120)


def load(server: ServerProcess, path: str, **fields: Any) -> httpx.Response:
    return change(server, "load_lora_adapter", lora_name="x", lora_path=path, load_inplace=True, **fields)


def answers(server: ServerProcess, *users: str) -> list[str]:
    """The texts of many requests at once, which both replicas share; "": there is no adapter."""

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            bodies = [completion("x", NUM_TOKENS, user=user) for user in users or ("ann",) for _ in range(6)]
            return await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))

    return ["" if answer.status_code == 404 else answer.json()["choices"][0]["text"] for answer in asyncio.run(ask())]


def wait_until_whole(server: ServerProcess) -> None:
    deadline_s = time.monotonic() + 120
    while httpx.get(f"{server.url}/health", timeout=30).json()["status"] != "ok":
        assert time.monotonic() < deadline_s, server.log()
        time.sleep(0.1)


def test_versions_change_at_all_replicas_and_survive_the_ends_of_engines_and_server(tmp_path: Path) -> None:
    known = KnownModel.make(tmp_path)
    texts = {name: known.add_adapter(tmp_path / "adapters" / name, seed)[NUM_TOKENS] for seed, name in enumerate("abc")}
    assert len(set(texts.values())) == 3
    (tmp_path / "adapters" / "torn").mkdir()
    flags = ["--model", str(known.folder), "--adapter-dir", str(tmp_path / "adapters"), "--replicas", "2"]
    flags += ["--restart-engine", "1000", "--allow-local-admin", "--kv-cache-memory", "64MiB", "--max-loras", "2"]
    flags += ["--data-dir", str(tmp_path / "data"), "--log-level", "warning"]
    with running(REAL, *flags) as server:
        first = load(server, "a", pinned=True).json()
        assert first["version"] == 1 and first["pinned"] and first["probe"]["max_logit_change"] > 0
        assert load(server, "b").json()["version"] == 2
        assert set(answers(server)) == {texts["b"]}
        assert load(server, "torn").status_code == 404
        os.kill(child_pids(server, ENGINE)[0], signal.SIGKILL)
        while httpx.get(f"{server.url}/health", timeout=30).json()["status"] == "ok":
            time.sleep(0.01)
        assert change(server, "adapters/x/rollback").json()["current"] == 1  # while one replica starts
        assert set(answers(server)) == {texts["a"]}
        wait_until_whole(server)
        assert set(answers(server)) == {texts["a"]}
        split = change(server, "adapters/x/split", shares={"1": 0.5, "2": 0.5})
        assert split.status_code == 200, split.text
        users = [f"user {number}" for number in range(6)]
        got = answers(server, *users)
        assert set(got) == {texts["a"], texts["b"]}
        assert all(len(set(got[i : i + 6])) == 1 for i in range(0, len(got), 6)), "a caller has one version everywhere"
        server.process.kill()
        server.wait()
    with running(REAL, *flags) as server:
        assert answers(server, *users) == got
        cards = httpx.get(f"{server.url}/v1/adapters", timeout=30).json()["data"]
        pinned = {card["content_hash"]: card["pinned"] for card in cards if card["id"] == "x"}
        assert pinned.pop(first["content_hash"]) is True and list(pinned.values()) == [False]
        assert load(server, "c").json()["pinned"]
        assert set(answers(server)) == {texts["c"]}
        assert change(server, "unload_lora_adapter", lora_name="x").status_code == 200
        assert set(answers(server)) == {""}
        assert "Traceback" not in server.log(), server.log()
