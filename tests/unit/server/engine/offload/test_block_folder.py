"""The folder of blocks: within its bound at any time, least recently used first out, whatever is damaged or killed."""

import errno
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stellarbyte_server.engine.offload import block_folder
from stellarbyte_server.engine.offload.block_file import HEADER_BYTES
from stellarbyte_server.engine.offload.block_folder import BlockFolder
from tests.support.servers.server_process import ROOT

BLOCK_BYTES = 400
FILE_BYTES = HEADER_BYTES + BLOCK_BYTES


def sha(text: object) -> bytes:
    return hashlib.sha256(str(text).encode()).digest()


def content(key: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.shake_128(key).digest(BLOCK_BYTES), np.uint8)


def make_folder(path: Path, num_blocks: int = 10, model: str = "model") -> BlockFolder:
    return BlockFolder(path, num_blocks * FILE_BYTES, sha(model), BLOCK_BYTES)


def found(folder: BlockFolder, key: bytes) -> bool:
    """Whether the folder has a block; what it has must be the block's content."""
    out = np.zeros(BLOCK_BYTES, np.uint8)
    is_there = folder.has(key) and folder.read(key, out)
    assert not is_there or (out == content(key)).all()
    return is_there


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.kv"))


def test_a_block_outlives_the_engine(tmp_path: Path) -> None:
    keys = [sha(number) for number in range(5)]
    first = make_folder(tmp_path / "new" / "folder")
    assert all(first.write(key, content(key)) for key in keys)
    assert not first.write(keys[0], content(keys[0]))  # it is there
    second = make_folder(tmp_path / "new" / "folder")
    assert all(found(second, key) for key in keys) and not found(second, sha("other"))
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o777 == 0o700


def test_another_models_blocks_are_not_found_but_count(tmp_path: Path) -> None:
    keys = [sha(number) for number in range(6)]
    first, other = make_folder(tmp_path), make_folder(tmp_path, model="other weights")
    for key in keys:
        first.write(key, content(key))
    other.refresh()
    assert not any(found(other, key) for key in keys)
    for key in keys:
        other.write(key, content(key))
    assert size_of(tmp_path) <= 10 * FILE_BYTES
    assert found(other, keys[-1]) and not found(first, keys[0])


def test_the_least_recently_used_blocks_make_room(tmp_path: Path) -> None:
    """Against a list in order of use; one eviction removes a single block, as the bound is small."""
    chance, folder = random.Random(0), make_folder(tmp_path)
    used: list[bytes] = []
    for _ in range(400):
        key = sha(chance.randrange(25))
        if chance.random() < 0.3:
            folder.touch(key)
            if key in used:
                used = [*(other for other in used if other != key), key]
        elif chance.random() < 0.1:
            folder.remove(key)
            used = [other for other in used if other != key]
        elif folder.write(key, content(key)):
            assert key not in used
            used = [*used, key][-10:]
        assert size_of(tmp_path) == len(used) * FILE_BYTES
        assert [number for number in range(25) if found(folder, sha(number))] == [
            number for number in range(25) if sha(number) in used
        ]


def test_two_engines_share_a_folder_within_one_bound(tmp_path: Path) -> None:
    chance = random.Random(0)
    engines = [make_folder(tmp_path), make_folder(tmp_path)]
    for number in range(200):
        key = sha(chance.randrange(40))
        writer, reader = chance.sample(engines, 2)
        if chance.random() < 0.2:
            writer.remove(key)
        else:
            writer.write(key, content(key))
            reader.refresh()
            assert found(reader, key)
        assert size_of(tmp_path) <= 10 * FILE_BYTES, number


def test_a_block_that_another_engine_evicted_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = make_folder(tmp_path), make_folder(tmp_path)
    first.write(sha(0), content(sha(0)))
    second.refresh()
    second.remove(sha(0))
    assert first.has(sha(0)) and not found(first, sha(0)) and not first.has(sha(0))
    assert not caplog.records


def damaged(file: bytes, how: str) -> bytes:
    other = bytearray(file)
    other[200] ^= 1
    return {"flipped": bytes(other), "truncated": file[:-1], "empty": b"", "foreign": b"\0" * len(file)}[how]


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "foreign"])
def test_a_damaged_file_is_ignored_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    folder, key = make_folder(tmp_path), sha(0)
    folder.write(key, content(key))
    (file,) = tmp_path.glob("*.kv")
    file.write_bytes(damaged(file.read_bytes(), how))
    with caplog.at_level(logging.WARNING):
        assert not found(folder, key) and not found(folder, key)
    assert len(caplog.records) == 1 and str(file) in caplog.text and "--kv-offload-dir: ignored" in caplog.text
    assert folder.write(key, content(key)) and found(folder, key)  # a new copy takes its place


def test_a_file_under_another_models_name_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other, key = make_folder(tmp_path / "other", model="other weights"), sha(0)
    other.write(key, content(key))
    folder = make_folder(tmp_path / "own")
    folder.write(key, content(key))
    (theirs,), (ours,) = (tmp_path / "other").glob("*.kv"), (tmp_path / "own").glob("*.kv")
    theirs.rename(ours)
    assert not found(folder, key)
    assert "the block is of another model or other settings" in caplog.text


def test_a_lower_bound_holds_from_the_start(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for number in range(10):
        folder.write(sha(number), content(sha(number)))
    (tmp_path / "notes.txt").write_text("not ours")
    smaller = make_folder(tmp_path, num_blocks=3)
    assert size_of(tmp_path) == 3 * FILE_BYTES
    assert [found(smaller, sha(number)) for number in range(10)] == [False] * 7 + [True] * 3
    assert (tmp_path / "notes.txt").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path)
    write = block_folder.write_block_file

    def fill_the_disk(path: Path, *rest: object) -> None:
        write(path, *rest)  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_folder, "write_block_file", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        folder.write(sha(0), content(sha(0)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lock"]
    monkeypatch.undo()
    assert folder.write(sha(0), content(sha(0)))


WRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from tests.unit.server.engine.offload.test_block_folder import content, make_folder, sha
folder = make_folder(Path(sys.argv[1]))
print("started", flush=True)
for number in itertools.count():
    key = sha(number)
    folder.write(key, content(key))
"""


def test_a_kill_while_writing_harms_nothing(tmp_path: Path) -> None:
    """Twice: what is found afterwards is right (`found` compares it), and the bound holds again."""
    chance = random.Random(0)
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"started\n"
        time.sleep(chance.uniform(0.05, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        folder = make_folder(tmp_path)
        assert size_of(tmp_path) <= 10 * FILE_BYTES and 0 < folder.num_known <= 10
        keys = [bytes.fromhex(file.stem.split("-")[1]) for file in tmp_path.glob("*.kv")]
        assert all(found(folder, key) for key in keys)
        assert {file.name for file in tmp_path.iterdir() if file.suffix != ".kv"} == {"lock"}
        assert folder.write(sha("after"), content(sha("after")))
        assert size_of(tmp_path) <= 10 * FILE_BYTES
