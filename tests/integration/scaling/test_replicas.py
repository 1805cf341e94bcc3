"""--replicas: several engines answer as one, one's end costs its streams only, adapters reach all of them or none."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.reliability.load import Ended, Progress, ask
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.servers.adapter_server import NUM_TOKENS, PROMPT, KnownModel, completion
from tests.support.servers.faulty_engine import FAULTY_ONCE
from tests.support.servers.processes import child_pids
from tests.support.servers.server_process import ServerProcess, running

FAULTY = "tests.support.servers.faulty_server"  # the real engine; only a folder's name makes it fail
ENGINE = "tests.support.servers.faulty_engine"
NUM_REPLICAS = 2
LONG = 300  # tokens


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownModel:
    return KnownModel.make(tmp_path_factory.mktemp("replicas"))


@pytest.fixture(scope="module")
def answers(known: KnownModel) -> dict[str, list[str]]:
    """By name of an adapter, or of the model, the answer's text after so many tokens."""
    folder = known.folder.parent / "adapters"
    names = ("a", "b", "others/a", f"{FAULTY_ONCE}-c")
    found = {name: known.add_adapter(folder / name, seed) for seed, name in enumerate(names)}
    own = known.answers(known.model)
    return found if own is None else found | {"tiny": own}


@pytest.fixture(scope="module")
def server(known: KnownModel, answers: dict[str, list[str]]) -> Iterator[ServerProcess]:
    assert answers, "the folder of adapters is there"
    flags = ["--model", str(known.folder), "--adapter-dir", str(known.folder.parent / "adapters")]
    flags += ["--replicas", str(NUM_REPLICAS), "--restart-engine", "1000", "--allow-local-admin"]
    with running(FAULTY, *flags, "--kv-cache-memory", "64MiB", "--log-level", "warning") as server:
        yield server
    assert server.process.returncode == 0
    assert server.log().count("Traceback") == server.log().count("a planted fault"), server.log()


def at_once(server: ServerProcess, *bodies: dict[str, Any]) -> list[Ended]:
    async def all_of_them() -> list[Ended]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            return await asyncio.gather(*(ask(http, body) for body in bodies))

    return asyncio.run(all_of_them())


def by_engine(server: ServerProcess, name: str) -> list[float]:
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"stellarbyte:engine_{name}{{")]


def change(server: ServerProcess, route: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{route}", json=body, timeout=120)


def wait_until_whole(server: ServerProcess) -> None:
    deadline_s = time.monotonic() + 120
    while httpx.get(f"{server.url}/health", timeout=30).json()["status"] != "ok":
        assert time.monotonic() < deadline_s, server.log()
        time.sleep(0.1)


def names_listed(server: ServerProcess) -> list[str]:
    return [card["id"] for card in httpx.get(f"{server.url}/v1/adapters", timeout=30).json()["data"]]


def test_all_replicas_answer_as_one_engine_does(server, known, answers) -> None:
    """Greedy and seeded, with adapters and a prefix in the cache."""
    seeded = {"temperature": 1.0, "seed": 7, "return_token_ids": True, "context_overflow": "error"}
    request = make_request(PROMPT, NUM_TOKENS, seed=7, temperature=1.0)
    (expected,) = ModelEngine(known.model, num_blocks=256).generate([request])
    before = by_engine(server, "generation_tokens_total")
    names = [name for name in ("a", "b", "tiny") * 5 if name in answers]
    for _ in range(2):
        ends = at_once(server, *map(completion, names))
        assert [end.text for end in ends] == [answers[name][NUM_TOKENS] for name in names]
        ends = at_once(server, *[completion("tiny", **seeded) for _ in range(8)])
        assert [end.token_ids for end in ends] == [expected] * 8
    after = by_engine(server, "generation_tokens_total")
    assert len(after) == NUM_REPLICAS and all(now > then for now, then in zip(after, before, strict=True))
    assert server.metric("vllm:generation_tokens_total") == sum(after)


def test_the_end_of_a_replica_costs_only_its_streams_and_it_comes_back_with_the_adapters(server, answers) -> None:
    loaded = change(server, "load_lora_adapter", lora_name="x", lora_path="a", load_inplace=True)
    assert loaded.status_code == 200, loaded.text
    whole = at_once(server, completion("x", LONG))[0].text
    body = completion("x", LONG, stream=True)
    shown = server.metric("vllm:generation_tokens_total")

    async def kill_under_load() -> list[Ended]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            progresses = [Progress() for _ in range(8)]
            streams = [asyncio.create_task(ask(http, body, progress)) for progress in progresses]
            while not all(progress.num_events > 1 for progress in progresses):
                await asyncio.sleep(0.01)
            os.kill(child_pids(server, ENGINE)[0], signal.SIGKILL)
            return await asyncio.gather(*streams)

    ends = asyncio.run(kill_under_load())
    complete = [end for end in ends if end.is_complete]
    assert {end.text for end in complete} == {whole}
    assert all(end.is_honest_failure and whole.startswith(end.text) for end in ends if not end.is_complete)
    assert 2 <= len(complete) <= 6, "both had some"
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 200, "the other one serves"
    wait_until_whole(server)
    assert by_engine(server, "up") == [1.0] * NUM_REPLICAS
    before = by_engine(server, "generation_tokens_total")
    ends = at_once(server, *[completion("x") for _ in range(8)])
    assert [end.text for end in ends] == [answers["a"][NUM_TOKENS]] * 8
    after = by_engine(server, "generation_tokens_total")
    assert all(now > then for now, then in zip(after, before, strict=True)), "the new one answered, too"
    shown_later = server.metric("vllm:generation_tokens_total")
    assert shown_later >= shown + 8 * NUM_TOKENS, "what was counted of the dead one stays counted"
    unloaded = change(server, "unload_lora_adapter", lora_name="x")
    assert unloaded.status_code == 200 and unloaded.json()["freed_bytes"] > 0
    assert "x" not in names_listed(server)
    assert {end.status for end in at_once(server, *[completion("x") for _ in range(4)])} == {404}


def test_an_adapter_that_one_replica_cannot_read_is_loaded_by_none(server, answers) -> None:
    body = {"lora_name": "c", "lora_path": f"{FAULTY_ONCE}-c"}
    failed = change(server, "load_lora_adapter", **body)
    assert failed.status_code == 500
    assert failed.json()["error"]["message"].startswith("Replica ") and "so no replica has" in failed.text
    assert "c" not in names_listed(server)
    assert {end.status for end in at_once(server, *[completion("c") for _ in range(4)])} == {404}
    assert change(server, "load_lora_adapter", **body).status_code == 200, "nothing of it is left in the way"
    ends = at_once(server, *[completion("c") for _ in range(4)])
    assert [end.text for end in ends] == [answers[f"{FAULTY_ONCE}-c"][NUM_TOKENS]] * 4


def test_an_adapter_in_use_is_replaced_at_all_replicas_at_once(server, answers) -> None:
    for path in ("a", "others/a", "a"):
        changed = change(server, "load_lora_adapter", lora_name="swapped", lora_path=path, load_inplace=True)
        assert changed.status_code == 200, changed.text
        ends = at_once(server, *[completion("swapped") for _ in range(6)])
        assert [end.text for end in ends] == [answers[path][NUM_TOKENS]] * 6
    refused = change(server, "load_lora_adapter", lora_name="swapped", lora_path="b")
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400,
        "The adapter 'swapped' is already loaded; set load_inplace to replace it.",
    )
    (card,) = [card for card in httpx.get(f"{server.url}/v1/adapters").json()["data"] if card["id"] == "swapped"]
    assert card["requests"] == 18 and card["tokens"] == 18 * NUM_TOKENS


@pytest.mark.slow
def test_a_restarted_replica_serves_what_was_loaded_whatever_the_folder_holds_by_then(server, known) -> None:
    folder = known.folder.parent / "adapters" / "changed"
    loaded_answers = known.add_adapter(folder, 99)
    assert change(server, "load_lora_adapter", lora_name="changed-later", lora_path="changed").status_code == 200
    known.add_adapter(folder, 100)
    os.kill(child_pids(server, ENGINE)[0], signal.SIGKILL)
    while httpx.get(f"{server.url}/health", timeout=30).json()["status"] == "ok":
        time.sleep(0.01)
    wait_until_whole(server)
    ends = at_once(server, *[completion("changed-later") for _ in range(8)])
    assert [end.text for end in ends] == [loaded_answers[NUM_TOKENS]] * 8
    assert change(server, "unload_lora_adapter", lora_name="changed-later").status_code == 200
    os.kill(child_pids(server, ENGINE)[0], signal.SIGKILL)
    while httpx.get(f"{server.url}/health", timeout=30).json()["status"] == "ok":
        time.sleep(0.01)
    wait_until_whole(server)
    assert {end.status for end in at_once(server, *[completion("changed-later") for _ in range(4)])} == {404}
