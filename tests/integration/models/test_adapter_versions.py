"""Adapters in --data-dir over HTTP: they survive a kill, have versions, go back, and share their callers."""

import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.support.clients.openai_client import strict_client
from tests.support.over_http import assert_error
from tests.support.servers.adapter_server import PROMPT, KnownModel, completion
from tests.support.servers.processes import child_pids
from tests.support.servers.server_process import REAL, ServerProcess, running, the_error_line

NUM_CALLERS = 60
LASTING = ("rank", "bytes", "content_hash", "root", "invocation_tokens")  # of an entry, whether it is read or not


@dataclass
class Stored:
    folder: Path
    flags: list[str]
    answers: dict[str, str]  # folder in --adapter-dir → its answer

    def running(self) -> "Iterator[ServerProcess]":
        return running(REAL, *self.flags)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("versions")
    known = KnownModel.make(folder)
    offered = folder / "adapters"
    answers = {name: known.add_adapter(offered / name, seed)[-1] for name, seed in (("v1", 1), ("v2", 2), ("v3", 3))}
    answers["tiny"] = known.answers(known.model)[-1]
    assert len(set(answers.values())) == 4
    for name, factor in (("zero", 0.0), ("huge", 1e30)):
        (offered / name).mkdir()
        (offered / name / "adapter_config.json").write_bytes((offered / "v1" / "adapter_config.json").read_bytes())
        weights = load_file(offered / "v1" / "adapter_model.safetensors")
        scaled = {key: tensor * (factor if ".lora_B." in key else 1) for key, tensor in weights.items()}
        save_file(scaled, offered / name / "adapter_model.safetensors")
    flags = ["--model", str(known.folder), "--adapter-dir", str(offered), "--allow-local-admin", "--log-level", "info"]
    return Stored(folder, flags, answers)


@pytest.fixture
def flags(adapters: Stored, tmp_path: Path) -> list[str]:
    return [*adapters.flags, "--data-dir", str(tmp_path / "data")]


def wait_until_healthy(server: ServerProcess) -> None:
    """After the end of an engine, until another one serves."""
    deadline_s = time.monotonic() + 120
    while httpx.get(f"{server.url}/health", timeout=30).status_code == 200:
        assert time.monotonic() < deadline_s, server.log()
    while httpx.get(f"{server.url}/health", timeout=30).status_code != 200:
        assert time.monotonic() < deadline_s, server.log()
        time.sleep(0.1)


def load(http: httpx.Client, path: str, name: str = "x", **fields: object) -> httpx.Response:
    return http.post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, "load_inplace": True, **fields}
    )


def answer(http: httpx.Client, model: str = "x", **fields: object) -> tuple[str, str]:
    """The text and the first digits of the version's hash."""
    response = http.post("/v1/completions", json=completion(model, **fields))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"], response.json()["system_fingerprint"].split("_")[2]


def listed(http: httpx.Client, name: str = "x") -> dict[str, Any]:
    """The current version's entry in the list of adapters."""
    (entry,) = [entry for entry in http.get("/v1/adapters").json()["data"] if entry["id"] == name]
    return entry


def history(http: httpx.Client, name: str = "x") -> dict[str, object]:
    response = http.get(f"/v1/adapters/{name}/versions")
    assert response.status_code == 200, response.text
    return response.json()


def test_versions_survive_a_kill_and_go_back(adapters: Stored, flags: list[str], tmp_path: Path) -> None:
    with running(REAL, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        hashes = []
        for number, path in enumerate(("v1", "v2", "v3"), 1):
            loaded = load(http, path).json()
            assert loaded["version"] == number and loaded["probe"]["max_logit_change"] > 0
            hashes.append(loaded["content_hash"])
        assert load(http, "v3").json()["version"] == 3  # which it was
        assert [each["content_hash"] for each in history(http)["data"]] == hashes
        assert [each["source"] for each in history(http)["data"]] == ["v1", "v2", "v3"]
        back = http.post("/v1/adapters/x/rollback", json={}).json()
        assert back["current"] == 2 and answer(http) == (adapters.answers["v2"], hashes[1][:12])
        again = http.post("/v1/adapters/x/rollback", json={"version": hashes[2][:8]}).json()
        assert again["current"] == 3 and answer(http)[0] == adapters.answers["v3"]
        assert http.post("/v1/adapters/x/rollback", json={"version": 1}).json()["current"] == 1
        assert_error(http.post("/v1/adapters/x/rollback", json={}), 400, param="version")
        assert_error(http.post("/v1/adapters/x/rollback", json={"version": 9}), 400, param="version")
        assert_error(http.post("/v1/adapters/y/rollback", json={}), 404, code="adapter_not_found")
        load(http, "v2", "gone")
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "gone"}).status_code == 200
        before, entry = history(http), listed(http)
        assert entry["rank"] and entry["bytes"]
        second = ServerProcess(REAL, *flags)
        assert "another server uses" in the_error_line(second)
        server.process.kill()
        server.wait()
    (tmp_path / "data" / "adapters" / "names" / "foreign").write_text("{}")
    (tmp_path / "data" / "adapters" / "contents" / "foreign").mkdir()
    with running(REAL, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert history(http) == before
        unread = listed(http)
        assert unread["tier"] == "disk"
        assert {name: unread[name] for name in LASTING} == {name: entry[name] for name in LASTING}
        assert answer(http) == (adapters.answers["v1"], hashes[0][:12])
        assert http.get("/v1/adapters/gone/versions").status_code == 404
        assert http.post("/v1/completions", json=completion("gone")).status_code == 404
        assert len(list((tmp_path / "data" / "adapters" / "contents").iterdir())) == 3 + 1  # the foreign one is left
        assert http.post("/v1/adapters/x/rollback", json={"version": 3}).json()["current"] == 3
        assert answer(http)[0] == adapters.answers["v3"]
        assert server.log().count("it is left out") == 2


@pytest.mark.slow  # test_probing has the same without HTTP
def test_an_adapter_without_effect_or_with_an_infinite_one_is_refused(adapters: Stored, flags: list[str]) -> None:
    with running(REAL, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        load(http, "v1")
        for path, said in (("zero", "changes no logit"), ("huge", "NaN or infinity")):
            refused = assert_error(load(http, path), 400, code="adapter_failed", param="lora_path")
            assert said in refused["message"] and "'x'" in refused["message"]
            assert [each["source"] for each in history(http)["data"]] == ["v1"]
            assert answer(http)[0] == adapters.answers["v1"]
        assert len(list((Path(flags[-1]) / "adapters" / "contents").iterdir())) == 1
        loaded = load(http, "zero", probe=False).json()
        assert loaded["probe"] is None and loaded["version"] == 2
        assert answer(http)[0] == adapters.answers["tiny"]


def test_callers_are_split_and_keep_their_version(adapters: Stored, flags: list[str]) -> None:
    with running(REAL, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        first, second = (load(http, path).json()["content_hash"] for path in ("v1", "v2"))
        by_hash = {first[:12]: adapters.answers["v1"], second[:12]: adapters.answers["v2"]}
        for shares, param in (
            ({"1": 0.5}, "shares"),
            ({"1": 0.5, "7": 0.5}, "shares"),
            ({"1": 1.5, "2": -0.5}, "shares"),
        ):
            assert_error(http.post("/v1/adapters/x/split", json={"shares": shares}), 400, param=param)
        told = http.post("/v1/adapters/x/split", json={"shares": {first[:8]: 0.25, "2": 0.75}}).json()
        assert told["shares"] == {first: 0.25, second: 0.75} and told["current"] == 2
        got = {}
        for caller in range(NUM_CALLERS):
            text, version = answer(http, user=f"caller {caller}", max_tokens=12)
            assert text == by_hash[version]
            got[caller] = version
        share = Counter(got.values())[first[:12]] / NUM_CALLERS
        assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / NUM_CALLERS)
        with strict_client(server.url) as client:
            for caller in range(0, NUM_CALLERS, 6):
                reply = client.completions.create(
                    model="x", prompt=PROMPT, max_tokens=12, temperature=0, user=f"caller {caller}",
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                assert reply.choices[0].text == by_hash[got[caller]]
        cards = [card for card in http.get("/v1/adapters").json()["data"] if card["id"] == "x"]
        assert {card["content_hash"]: card["share"] for card in cards} == {first: 0.25, second: 0.75}
        assert answer(http, f"x@{first}")[1] == first[:12] and answer(http, f"x@{second}")[1] == second[:12]
        server.process.kill()
        server.wait()
    with running(REAL, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert all(answer(http, user=f"caller {caller}")[1] == got[caller] for caller in range(0, NUM_CALLERS, 5))
        counts = Counter(got[caller] for caller in range(0, NUM_CALLERS, 5))
        lines = http.get("/metrics").text.splitlines()
        for version in (first[:12], second[:12]):
            labels = f'{{adapter="x",model_name="tiny",version="{version}"}}'
            for name, number in (("requests", counts[version]), ("tokens", 12 * counts[version])):
                assert f"stellarbyte:adapter_version_{name}_total{labels} {number:.1f}" in lines
        assert http.post("/v1/adapters/x/split", json={"shares": {}}).json()["shares"] == {}
        assert {answer(http, user=f"caller {caller}")[1] for caller in range(8)} == {second[:12]}
        assert http.post("/v1/completions", json=completion(f"x@{first}")).status_code == 404
        http.post("/v1/adapters/x/split", json={"shares": {"1": 1}})
        assert {answer(http, user=f"caller {caller}")[1] for caller in range(4)} == {first[:12]}
        load(http, "v3")
        assert {answer(http, user=f"caller {caller}")[0] for caller in range(4)} == {adapters.answers["v3"]}


def test_without_data_dir_the_record_lasts_as_long_as_the_server_and_an_engine_that_starts_gets_it(
    adapters: Stored, tmp_path: Path
) -> None:
    """Also where the folder that was loaded holds something else by then, and for names that were unloaded."""
    offered = shutil.copytree(adapters.folder / "adapters", tmp_path / "adapters")
    module = ["--lora-modules", f"mine={adapters.folder / 'adapters' / 'v3'}", "--restart-engine", "5"]
    flags = [str(offered) if flag == str(adapters.folder / "adapters") else flag for flag in adapters.flags]
    with running(REAL, *flags, *module) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        first, second = load(http, "v1").json(), load(http, "v2").json()
        assert (first["version"], second["version"]) == (1, 2) and second["probe"]["max_logit_change"] > 0
        assert http.post("/v1/adapters/x/rollback", json={}).json()["current"] == 1
        split = http.post("/v1/adapters/x/split", json={"shares": {"1": 0.5, "2": 0.5}}).json()
        assert split["shares"] == {first["content_hash"]: 0.5, second["content_hash"]: 0.5}
        got = {caller: answer(http, user=caller) for caller in map(str, range(12))}
        assert {text for text, _ in got.values()} == {adapters.answers["v1"], adapters.answers["v2"]}
        assert answer(http, "v2")[0] == adapters.answers["v2"] and answer(http, "mine")[0] == adapters.answers["v3"]
        for name in ("mine", "v2"):
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
        for file in (adapters.folder / "adapters" / "v3").iterdir():
            shutil.copy(file, offered / "v1")
        (engine,) = child_pids(server, "stellarbyte_server.engine.process")
        os.kill(engine, signal.SIGKILL)
        wait_until_healthy(server)
        assert {caller: answer(http, user=caller) for caller in got} == got
        for name in ("mine", "v2"):
            assert http.post("/v1/completions", json=completion(name)).status_code == 404
        assert answer(http, "v1")[0] == adapters.answers["v3"], "the folder itself is offered as it is"
        assert load(http, "v2", "mine").json()["version"] == 1
        assert answer(http, "mine")[0] == adapters.answers["v2"]
        assert "Traceback" not in server.log(), server.log()
    with running(REAL, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/v1/adapters/x/versions").status_code == 404
