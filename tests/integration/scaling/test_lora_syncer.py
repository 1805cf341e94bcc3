"""The HTTP calls of the inference extension's LoRA syncer, as docker/kubernetes/adapters runs it beside the server.

The syncer (kubernetes-sigs/gateway-api-inference-extension, tools/dynamic-lora-sidecar) is on no package registry, so
`reconcile` makes its calls: without a key, to the address of --admin-listen.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers.adapter_server import NUM_TOKENS, KnownModel, completion
from tests.support.servers.server_process import REAL, ServerProcess, free_port, running

KEY = "of-users"


def reconcile(config: dict[str, Any]) -> None:
    """One round: each adapter of `ensureExist` is there afterwards, none of `ensureNotExist`."""
    settings = config["vLLMLoRAConfig"]
    url = f"http://{settings.get('host', 'localhost')}:{settings.get('port', 8000)}"
    assert httpx.get(f"{url}/health").status_code == 200
    for wanted in settings["ensureExist"]["models"]:
        if wanted["id"] not in names_at(url):
            body = {
                "lora_name": wanted["id"],
                "lora_path": wanted["source"],
                "base_model_name": wanted.get("base-model", settings.get("defaultBaseModel", "")),
            }
            httpx.post(f"{url}/v1/load_lora_adapter", json=body).raise_for_status()
    for unwanted in settings["ensureNotExist"]["models"]:
        if unwanted["id"] in names_at(url):
            httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": unwanted["id"]}).raise_for_status()


def names_at(url: str, **headers: str) -> set[str]:
    answer = httpx.get(f"{url}/v1/models", headers=headers)
    return {card["id"] for card in answer.json()["data"]}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownModel:
    return KnownModel.make(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """As adapters.yaml, for a model `tiny`."""
    none: dict[str, Any] = {"models": []}
    lists = {"ensureExist": none, "ensureNotExist": none}
    return {"vLLMLoRAConfig": {"host": "127.0.0.1", "port": free_port(), "defaultBaseModel": "tiny", **lists}}


@pytest.fixture(scope="module")
def adapters(known: KnownModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("adapters")
    return folder, known.add_adapter(folder / "v1", 1)


@pytest.fixture(scope="module")
def server(known: KnownModel, adapters: tuple[Path, list[str]], config: dict[str, Any]) -> Iterator[ServerProcess]:
    admin = f"127.0.0.1:{config['vLLMLoRAConfig']['port']}"
    flags = ["--model", str(known.folder), "--adapter-dir", str(adapters[0]), "--admin-listen", admin]
    with running(REAL, *flags, "--dtype", "float32", environment={"STELLARBYTE_API_KEY": KEY}) as server:
        yield server


def test_the_syncer_loads_and_unloads_while_users_need_keys(
    server: ServerProcess, adapters: tuple[Path, list[str]], config: dict[str, Any]
) -> None:
    settings = config["vLLMLoRAConfig"]
    key = {"Authorization": f"Bearer {KEY}"}
    pirate = {"id": "pirate", "source": "v1"}
    for _ in range(2):  # a second round changes nothing
        reconcile({"vLLMLoRAConfig": settings | {"ensureExist": {"models": [pirate]}}})
        assert "pirate" in names_at(server.url, **key)
    answer = httpx.post(f"{server.url}/v1/completions", json=completion("pirate"), headers=key, timeout=60)
    assert answer.json()["choices"][0]["text"] == adapters[1][NUM_TOKENS]
    refused = httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "pirate"})
    assert refused.status_code == 403  # users' address stays closed to it
    for _ in range(2):
        reconcile({"vLLMLoRAConfig": settings | {"ensureNotExist": {"models": [pirate]}}})
        assert "pirate" not in names_at(server.url, **key)


def test_an_adapter_of_another_model_is_refused(server: ServerProcess, config: dict[str, Any]) -> None:
    del server
    settings = config["vLLMLoRAConfig"]
    foreign = {"id": "bard", "source": "v1", "base-model": "another-model"}
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        reconcile({"vLLMLoRAConfig": settings | {"ensureExist": {"models": [foreign]}}})
