"""Adapters of a Hub and of S3, loaded over HTTP while the server answers others; and LoRAX's fields."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from stellarbyte.user_cache import cache_folder
from tests.support.servers.adapter_server import KnownModel, completion
from tests.support.servers.server_process import REAL, running
from tests.support.stubs.hub import Hub, commit_of, running_hub
from tests.support.stubs.s3 import Store, running_store


@dataclass
class Sourced:
    http: httpx.Client
    hub: Hub
    store: Store
    folders: dict[str, Path]
    answers: dict[str, str]  # of each adapter and of the base model, "tiny"
    cache: Path  # of fetched adapters

    def answer(self, model: str, **fields: object) -> str:
        response = self.http.post("/v1/completions", json=completion(model, **fields))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def load(self, name: str, path: str, **fields: object) -> httpx.Response:
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


@pytest.fixture(scope="module")
def sourced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sourced]:
    folder = tmp_path_factory.mktemp("sourced")
    known = KnownModel.make(folder)
    folders = {name: folder / "remote" / name for name in ("a", "b")}
    answers = {name: known.add_adapter(path, seed)[-1] for seed, (name, path) in enumerate(folders.items())}
    base = known.answers(known.model)
    assert base is not None
    with running_hub() as hub, running_store() as store:
        hub.add("org/a", folders["a"])
        hub.add("organisation/a", folders["a"])
        store.add("bucket/adapters/b", folders["b"])
        store.add("bucket/others/b", folders["b"])
        environment = store.environment | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "0",
            "STELLARBYTE_CACHE": str(folder / "cache"),
            "NUMBA_CACHE_DIR": str(cache_folder() / "compiled"),  # the kernels that other tests have compiled
        }
        flags = ("--model", str(known.folder), "--adapter-source", "hf://org", "s3://bucket/adapters")
        with running(REAL, *flags, "--allow-local-admin", environment=environment) as server:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                cache = folder / "cache" / "adapters"
                yield Sourced(http, hub, store, folders, answers | {"tiny": base[-1]}, cache)


def test_an_adapter_of_the_hub_answers_and_its_card_names_the_commit(sourced: Sourced) -> None:
    loaded = sourced.load("from-hub", "hf://org/a@main")
    assert loaded.status_code == 200, loaded.text
    assert sourced.answer("from-hub") == sourced.answers["a"]
    card = sourced.http.get("/v1/models/from-hub").json()
    assert card["root"] == f"hf://org/a@{commit_of(sourced.folders['a'])}"
    again = sourced.load("from-hub", "hf://org/a")
    assert again.status_code == 400 and "load_inplace" in again.json()["error"]["message"]


def test_others_are_answered_while_an_adapter_of_s3_is_fetched_and_its_name_is_reserved(sourced: Sourced) -> None:
    store = sourced.store
    store.is_open.clear()
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(sourced.load, "from-s3", "s3://bucket/adapters/b")
        try:
            assert store.is_asked.wait(60)
            assert sourced.answer("tiny") == sourced.answers["tiny"]
            for path in ("s3://bucket/adapters/b", "hf://org/a", "b"):
                second = sourced.load("from-s3", path)
                assert (second.status_code, second.json()["error"]["code"]) == (409, "adapter_loading")
            assert not loading.done()
        finally:
            store.is_open.set()
        assert loading.result().status_code == 200, loading.result().text
    assert sourced.answer("from-s3") == sourced.answers["b"]
    assert sourced.load("from-s3", "hf://org/a", load_inplace=True).status_code == 200
    assert sourced.answer("from-s3") == sourced.answers["a"]


@pytest.mark.parametrize(
    ("name", "path", "status", "param", "said"),
    [
        ("x", "hf://organisation/a", 403, "lora_path", "--adapter-source does not allow hf://organisation/a"),
        ("x", "s3://bucket/others/b", 403, "lora_path", "--adapter-source does not allow"),
        ("x", "hf://org/../organisation/a", 400, "lora_path", "must be hf://ORG/NAME"),
        ("x", "s3://bucket/adapters/../others/b", 400, "lora_path", "must be hf://ORG/NAME"),
        ("x", "hf://org//a", 400, "lora_path", "must be hf://ORG/NAME"),
        ("x", "hf://org/none", 404, "lora_path", "no repository org/none"),
        ("x", "s3://bucket/adapters/none", 404, "lora_path", "S3 has no"),
        pytest.param("x", "s3://bucket/adapters/closed", 403, "lora_path", "may not read", marks=pytest.mark.slow),
        pytest.param(  # read three times
            "x", "s3://bucket/adapters/broken", 502, "lora_path", "cannot be read from S3", marks=pytest.mark.slow
        ),
        ("x", "s3://bucket/adapters/no-adapter", 400, "lora_path", "adapter_config.json"),
        ("x@y", "hf://org/a", 400, "lora_name", "1 to 128 letters"),
        ("tiny", "hf://org/a", 400, "lora_name", "differ from the model's name"),
    ],
)
def test_what_cannot_be_fetched_is_refused_in_one_sentence(
    sourced: Sourced, name: str, path: str, status: int, param: str, said: str
) -> None:
    store = sourced.store
    for kind in ("closed", "broken"):
        store.add(f"bucket/adapters/{kind}", sourced.folders["b"])
    store.forbidden.add("bucket/adapters/closed/adapter_config.json")
    store.broken.add("bucket/adapters/broken/adapter_model.safetensors")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        store.objects[f"bucket/adapters/no-adapter/{file}"] = b"nothing"
    response = sourced.load(name, path)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param) and said in error["message"], response.text
    assert not [*sourced.cache.glob(".*")]  # no partial download


def test_a_cached_adapter_is_loaded_by_its_source_only(sourced: Sourced) -> None:
    assert sourced.load("again", "hf://org/a").status_code == 200
    (folder, *_) = sourced.cache.iterdir()
    for path in (str(folder), folder.name, f"hf://../{folder.name}"):
        assert sourced.load("by-path", path).status_code in (400, 404)


def test_adapter_id_chooses_as_model_does(sourced: Sourced) -> None:
    assert sourced.load("chosen", "hf://org/a").status_code == 200
    for model in ("tiny", "chosen"):
        fields = {"adapter_id": "chosen", "adapter_source": "local"}
        assert sourced.answer(model, **fields) == sourced.answers["a"]
    chat = {"model": "tiny", "adapter_id": "chosen", "input": "hi"}
    assert sourced.http.post("/v1/embeddings", json=chat).json()["model"] == "chosen"
