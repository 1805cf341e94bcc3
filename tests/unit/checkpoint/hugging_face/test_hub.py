"""Models by their names on the Hub: downloaded and converted once, and one sentence for whatever goes wrong."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from stellarbyte.checkpoint import convert as convert_module
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_config, open_checkpoint
from stellarbyte.checkpoint.source import find_source, resolve_model
from tests.support.models.hugging_face import tiny_qwen3
from tests.support.stubs.hub import TOKEN, Hub, commit_of, running_hub, use_hub

OTHER_FILES = (
    *("README.md", "pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "onnx/model.safetensors"),
    *("original/consolidated.00.pth", "tf_model.h5", "model.gguf", "training_args.bin"),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_qwen3(tmp_path_factory.mktemp("hub") / "tiny", max_shard_size="60KB")
    for name in OTHER_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path / "converted"))
    monkeypatch.chdir(tmp_path)
    with running_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        hub.add("org/tiny", source)
        yield hub


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_a_model_is_downloaded_and_converted_once(hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch):
    path = resolve_model("org/tiny")
    assert open_checkpoint(path).config.num_hidden_layers == 3
    assert (path / "tokenizer.json").is_file() and (path / "chat_template.jinja").is_file()
    wanted = {file.name for file in source.iterdir() if file.is_file()} - set(OTHER_FILES)
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 1
    assert {Path(name).name for name in hub.downloads} == wanted and len(hub.downloads) == len(wanted)
    hub.asked.clear()
    monkeypatch.setattr(convert_module, "convert", lambda *_, **__: pytest.fail("converted again"))
    assert resolve_model("org/tiny") == path
    assert len(hub.asked) == 1  # what the branch's commit is


def test_a_model_in_the_cache_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    path = resolve_model("org/tiny")
    hub.is_failing = True
    assert resolve_model("org/tiny") == path
    use_hub(monkeypatch, "http://127.0.0.1:9", Path(constants.HF_HUB_CACHE))
    assert resolve_model("org/tiny") == path


def test_a_revision_is_served_as_it_is_named(hub: Hub, source: Path, tmp_path: Path):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.125}))
    hub.add("org/tiny", other, "refs/pr/1")
    main, pull_request = resolve_model("org/tiny"), resolve_model("org/tiny@refs/pr/1")
    assert load_config(main).rms_norm_eps != load_config(pull_request).rms_norm_eps == 0.125
    assert resolve_model(f"org/tiny@{commit_of(other)}") == pull_request
    assert resolve_model("org/tiny@main") == main
    assert "org/tiny has no revision 'v9'" in refusal("org/tiny@v9")


def test_a_renamed_model_is_found(hub: Hub):
    hub.renamed["old/tiny"] = "org/tiny"
    open_checkpoint(resolve_model("old/tiny"))


def test_a_gated_model_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.gated.add("org/tiny")
    assert re.search(rf"is gated: accept its terms at {hub.url}/org/tiny, then .*HF_TOKEN", refusal("org/tiny"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    open_checkpoint(resolve_model("org/tiny"))


def test_an_unknown_model_is_named(hub: Hub):
    assert f"There is no path org/none, and {hub.url} has no model of this name" in refusal("org/none")


@pytest.mark.parametrize(
    "name", ["none", "/no/such/folder", "a/b/c", "./a/b", "org/", "org/na me", "-org/tiny", "a//b"]
)
def test_what_is_no_name_is_not_asked_for(hub: Hub, name: str):
    assert refusal(name) == f"{name} does not exist."
    assert hub.asked == []


@pytest.mark.usefixtures("hub")
def test_without_a_connection_and_a_cache_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "empty")
    said = r"no path org/tiny, .*empty.* does not hold .* http://127.0.0.1:9 cannot be reached or fails"
    assert re.search(said, refusal("org/tiny"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("org/tiny")


def test_a_download_that_broke_off_is_never_served(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.broken.add("model-00002-of-00004.safetensors")
    first = {Path(name).name for name in hub.downloads}
    assert "org/tiny cannot be downloaded" in refusal("org/tiny")
    use_hub(monkeypatch, "http://127.0.0.1:9", Path(constants.HF_HUB_CACHE))
    assert "does not hold all of" in refusal("org/tiny")
    use_hub(monkeypatch, hub.url, Path(constants.HF_HUB_CACHE))
    hub.broken.clear()
    open_checkpoint(resolve_model("org/tiny"))
    assert first == set()


def test_a_path_of_that_name_comes_first(hub: Hub, source: Path, tmp_path: Path):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(source)
    assert find_source("org/tiny") == Path("org/tiny")
    open_checkpoint(resolve_model("org/tiny"))
    assert hub.asked == []


def test_random_weights_need_no_download_of_the_real_ones(hub: Hub):
    folder = resolve_model("org/tiny", needs_weights=False)
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    assert not any(name.endswith(".safetensors") for name in hub.downloads)


def test_a_repository_without_a_model_says_what_to_do(hub: Hub, tmp_path: Path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.Q8_0.gguf").touch()
    hub.add("org/gguf", tmp_path / "gguf")
    assert "org/gguf has no config.json" in refusal("org/gguf") and "GGUF" in refusal("org/gguf")
