"""Real servers with --kv-offload-dir: what one that was killed has written, the next finds, if it is still true."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from stellarbyte.checkpoint.native import load_model
from tests.support.cases import SLOW
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.models.byte_transformer import random_tokens
from tests.support.servers.adapter_server import KnownModel
from tests.support.servers.server_process import REAL, ServerProcess, running

NUM_TOKENS = 8
PROMPT = random_tokens(100, seed=5)
CACHED = 84  # whole blocks before its last token: one of the 4 sinks, 5 of 16 tokens
NUM_BLOCKS = 6


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownModel:
    found = KnownModel.make(tmp_path_factory.mktemp("offload"))
    found.add_adapter(found.folder.parent / "adapters" / "a", 0)
    return found


def flags(known: KnownModel, folder: Path, model: Path | None = None) -> list[str]:
    return [
        "--model", str(model or known.folder), "--served-model-name", "tiny",
        "--adapter-dir", str(known.folder.parent / "adapters"),
        "--kv-offload-dir", str(folder), "--kv-offload-bytes", "4MiB", "--kv-cache-memory", "16MiB",
    ]  # fmt: skip


def ask(server: ServerProcess, model: str = "tiny", **fields: Any) -> tuple[list[int], int]:
    """The tokens of the answer and the number of cached ones of the prompt."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(
        f"{server.url}/v1/completions", json=body | {"return_token_ids": True} | fields, timeout=120
    ).json()
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def tier_metric(server: ServerProcess, name: str, tier: str) -> float:
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line.startswith(f"{name}{{") and f'tier="{tier}"' in line:
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no metric {name}")


def wait_for_files(folder: Path, number: int) -> list[Path]:
    deadline_s = time.monotonic() + 60
    while len(files := sorted(folder.glob("*.kv"))) < number:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return files


def other_weights(known: KnownModel, folder: Path) -> Path:
    """The same model with one of its weights changed."""
    shutil.copytree(known.folder, folder)
    changed = load_model(known.folder)
    with torch.no_grad():
        next(iter(changed.parameters()))[PROMPT[0]] += 1
    changed.save_pretrained(folder)
    return folder


def computed(folder: Path) -> list[int]:
    """The answer of a checkpoint, without server and cache."""
    (answer,) = ModelEngine(load_model(folder), num_blocks=64).generate([make_request(PROMPT, NUM_TOKENS)])
    return answer


@pytest.fixture(scope="module")
def killed(known: KnownModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that a server has left, killed after it answered."""
    folder = tmp_path_factory.mktemp("killed") / "kv"
    with running(REAL, *flags(known, folder)) as server:
        assert ask(server) == (computed(known.folder), 0)
        wait_for_files(folder, NUM_BLOCKS)
        server.process.kill()
        server.process.wait()
    yield folder


def test_a_restarted_server_finds_the_prompt_but_not_for_others(
    known: KnownModel, killed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "kv"))
    with running(REAL, *flags(known, folder)) as server:
        assert ask(server, "a")[1] == 0 and ask(server, cache_salt="x")[1] == 0
        assert ask(server) == (computed(known.folder), CACHED)
        assert tier_metric(server, "stellarbyte:kv_offload_loaded_blocks_total", "disk") == NUM_BLOCKS
        assert server.metric("vllm:external_prefix_cache_hits_total") == CACHED
        assert server.metric("vllm:external_prefix_cache_queries_total") == 3 * len(PROMPT)
        assert tier_metric(server, "vllm:kv_offload_store_bytes_total", "disk") > 0
    assert "Traceback" not in server.log()


def test_a_server_on_changed_weights_finds_nothing(known: KnownModel, killed: Path, tmp_path: Path) -> None:
    """A damaged file in the same folder is of no concern to it either."""
    folder = Path(shutil.copytree(killed, tmp_path / "kv"))
    model = other_weights(known, tmp_path / "changed")
    with running(REAL, *flags(known, folder, model)) as server:
        assert ask(server) == (computed(model), 0)
        assert ask(server) == (computed(model), CACHED)  # from its own cache
    assert computed(model) != computed(known.folder)


@SLOW
def test_damaged_files_cost_their_tokens_and_a_line(known: KnownModel, killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "kv"))
    for number, file in enumerate(sorted(folder.glob("*.kv"))):
        content = bytearray(file.read_bytes())
        content[-1 - number] ^= 1
        file.write_bytes(content if number % 2 else content[:-9])
    with running(REAL, *flags(known, folder)) as server:
        tokens, num_cached = ask(server)
        assert (tokens, num_cached) == (computed(known.folder), 0)
    assert server.log().count("--kv-offload-dir: ignored") >= 1 and "Traceback" not in server.log()


@SLOW
def test_replicas_share_a_folder(known: KnownModel, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    with running(REAL, *flags(known, folder), "--replicas", "2", "--restart-engine", "1") as server:
        expected = computed(known.folder)
        assert ask(server) == (expected, 0)
        wait_for_files(folder, NUM_BLOCKS)
        for salt in "abcdefgh":
            assert ask(server, cache_salt=salt) == (expected, 0)
        assert sum(file.stat().st_size for file in folder.glob("*.kv")) <= 4 * 2**20
    with running(REAL, *flags(known, folder), "--replicas", "2") as server:
        assert ask(server) == (expected, CACHED)
        assert ask(server, cache_salt="h") == (expected, CACHED)
