"""The hash that is reported is that of the weights that are served, whatever lies beside them."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from stellarbyte.checkpoint import weights_hash as module
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import open_checkpoint
from stellarbyte_server.engine.start.model_folder import open_model_folder
from tests.support.models.byte_transformer import make_model
from tests.support.models.hugging_face import tiny_qwen2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hashes")
    return convert(tiny_qwen2(folder / "source"), folder / "whole", max_shard_bytes=50_000)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED_NS", -1)
    return tmp_path / "cache"


def hash_of(folder: Path) -> str:
    return module.weights_hash(module.states_of(open_checkpoint(folder).files))


def sha256_of(folder: Path) -> str:
    """Of the weights' files, without our code."""
    files = sorted(folder.glob("*.safetensors"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    listing = "".join(f"{digest}  {file.name}\n" for file, digest in zip(files, digests, strict=True))
    return digests[0] if len(files) == 1 else hashlib.sha256(listing.encode()).hexdigest()


def never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read again"))


def test_it_is_what_sha256sum_prints(whole: Path, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "one")
    assert len(list(whole.glob("*.safetensors"))) > 1
    for folder in (tmp_path / "one", whole):
        assert hash_of(folder) == hash_of(folder) == sha256_of(folder)


def test_a_folder_cannot_say_what_its_hash_is(whole: Path, tmp_path: Path) -> None:
    """With other weights it ships the file that older versions kept, and one as the cache has, for the true ones."""
    claimed = hash_of(whole)
    folder = shutil.copytree(whole, tmp_path / "copy")
    file = max(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    claims = {}
    for shard in folder.glob("*.safetensors"):
        status, digest = shard.stat(), hashlib.sha256((whole / shard.name).read_bytes()).hexdigest()
        claims[shard.name] = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "sha256": digest}
    (folder / "weights-hash.json").write_text(json.dumps(claims))
    (folder / module.CACHE_FILE).write_text(json.dumps(claims))
    assert claimed != hash_of(folder) == sha256_of(folder)


def test_it_follows_every_change_even_one_that_hides_its_time(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    before = hash_of(folder)
    file = max(folder.glob("*.safetensors"))
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert before != hash_of(folder) == sha256_of(folder)


def test_it_is_not_computed_twice_nor_after_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = convert(tiny_qwen2(tmp_path / "source"), tmp_path / "target")
    copy = shutil.copytree(folder, tmp_path / "copy")
    expected = hash_of(copy)
    never_read(monkeypatch)
    assert hash_of(folder) == hash_of(copy) == expected
    assert not list(tmp_path.glob("*/weights-hash.json"))


def test_a_file_that_changed_just_now_is_read_again(whole: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Another change within the same tick of the clock would leave no trace."""
    monkeypatch.setattr(module, "SETTLED_NS", 10**18 * 5)
    hash_of(whole)
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"model.safetensors": 1}', "nonsense", '{"\\u0000": {}}'])
def test_nonsense_in_the_cache_is_ignored(whole: Path, cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / module.CACHE_FILE).write_text(content)
    assert hash_of(whole) == hash_of(whole) == sha256_of(whole)


def test_without_a_cache_that_can_be_written_it_is_computed_each_time(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file is in the folder's place")
    assert hash_of(whole) == sha256_of(whole)
    monkeypatch.setattr(module, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert hash_of(whole) == sha256_of(whole)


def test_files_that_are_gone_leave_the_cache(whole: Path, tmp_path: Path, cache: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    hash_of(folder)
    shutil.rmtree(folder)
    hash_of(whole)
    kept = json.loads((cache / module.CACHE_FILE).read_text())
    assert set(kept) == {str(file.resolve()) for file in whole.glob("*.safetensors")}


def test_weights_replaced_while_they_are_loaded_are_not_reported(whole: Path, tmp_path: Path) -> None:
    """What is served then are the old ones."""
    folder = shutil.copytree(whole, tmp_path / "copy")
    opened = open_model_folder(folder, is_dummy=False)
    file = max(folder.glob("*.safetensors"))
    shutil.copy(file, tmp_path / "new")
    os.replace(tmp_path / "new", file)
    with pytest.raises(CheckpointError, match="changed while it was loaded"):
        opened.weights_hash()
