"""The server started from what people have: a Hugging Face folder, in a folder with files of anybody's."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stellarbyte.user_cache import cache_folder
from tests.support.models.hugging_face import tiny_qwen3
from tests.support.servers.server_process import REAL, ServerProcess, running, the_error_line

# What the two processes import once they have started; some only on other machines.
PLANTED = ("numpy", "torch", "triton", "numba", "tokenizers", "safetensors", "zmq", "uvicorn", "fastapi", "jinja2")
CONTEXT, FITTING = 128, 100  # of the model; with 8 blocks of 16 tokens, one for the sinks, one that is being filled
CACHE_BYTES = 8 * 16 * 2 * 3 * 2 * 16 * 4  # blocks, tokens, keys and values, layers, heads, channels, bytes


def plant(folder: Path, mark: Path) -> None:
    """Modules that leave a mark when they are imported."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).write_text(__file__)\nraise SystemExit(9)\n"
    for name in PLANTED:
        file = folder / name / "__init__.py" if name == "triton" else folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("sources") / "Tiny-Qwen3")


@pytest.fixture(scope="module")
def mark(folder: Path) -> Path:
    return folder.parent / "imported"


@pytest.fixture(scope="module")
def server(folder: Path, mark: Path) -> Iterator[ServerProcess]:
    plant(folder, mark)
    plant(folder.parent, mark)
    flags = ("--model", folder.name, "--device", "cpu", "--kv-cache-memory", str(CACHE_BYTES))
    # A cache of its own, but the kernels that other tests have compiled.
    caches = {"STELLARBYTE_CACHE": str(folder.parent / "cache"), "NUMBA_CACHE_DIR": str(cache_folder() / "compiled")}
    with running(REAL, *flags, cwd=folder.parent, environment=caches) as server:
        yield server


def complete(server: ServerProcess, **fields: object) -> dict[str, object]:
    body = {"model": "Tiny-Qwen3", "prompt": "the capital", "temperature": 0, "ignore_eos": True} | fields
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_hugging_face_folder_answers_as_in_transformers(server: ServerProcess, folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer("the capital", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    expected = ids[prompt["input_ids"].shape[1] :].tolist()
    found = complete(server, max_tokens=12, return_token_ids=True)
    assert found["choices"][0]["token_ids"] == expected
    chat = {"model": "Tiny-Qwen3", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).status_code == 200


def test_a_cache_too_small_for_the_context_serves_what_fits(server: ServerProcess):
    (card,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert card["max_model_len"] == FITTING
    lines = [line for line in server.log().splitlines() if f"serving --max-model-len {FITTING}" in line]
    assert len(lines) == 1 and f"context of {CONTEXT} tokens" in lines[0]
    slid = complete(server, max_tokens=3 * CONTEXT, context_overflow="slide")
    assert slid["usage"]["completion_tokens"] == 3 * CONTEXT


def test_nothing_is_imported_from_the_current_folder_or_the_models(server: ServerProcess, mark: Path):
    complete(server, max_tokens=2)
    assert not mark.exists(), mark.read_text()


@pytest.mark.slow
def test_an_empty_entry_of_the_python_path_is_not_the_current_folder(server: ServerProcess, folder: Path, mark: Path):
    """The model is not there: its refusal comes when all is imported."""
    del server
    path = f"{os.environ['PYTHONPATH']}:"
    other = ServerProcess(REAL, "--model", "no-such-model", cwd=folder.parent, environment={"PYTHONPATH": path})
    assert "no-such-model does not exist" in the_error_line(other)
    assert not mark.exists(), mark.read_text()


def test_without_a_connection_a_name_on_the_hub_is_one_line(tmp_path: Path):
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    line = the_error_line(ServerProcess(REAL, "--model", "org/none", environment=hub))
    assert "There is no path org/none" in line and "http://127.0.0.1:9 cannot be reached" in line
