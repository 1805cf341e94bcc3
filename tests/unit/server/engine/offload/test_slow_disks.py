"""Files that take too long: requests read their prompts themselves, and memory goes on."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stellarbyte_server.engine.offload import block_loads
from stellarbyte_server.engine.offload.block_folder import BlockFolder
from tests.support.engines.engine import generated, make_request
from tests.support.engines.symbolic_cache import continuation
from tests.support.tiers.offload_engine import Engines, run_one


@pytest.fixture
def hanging(tmp_path: Path, make_engine: Engines) -> Iterator[Path]:
    """A folder with the ten blocks of [1] * 40, whose fifth hangs: a pipe that nobody writes to."""
    engine = make_engine(tmp_path)
    run_one(engine, [1] * 40)
    engine.wait_stored()
    files = sorted(tmp_path.glob("*.kv"), key=lambda file: file.stat().st_mtime_ns)  # last blocks first: see `touch`
    files[5].unlink()
    os.mkfifo(files[5])
    yield files[5]
    if files[5].exists():
        let_go(files[5])


def let_go(pipe: Path) -> None:
    """End what hangs at the opening of a pipe; it reads an empty file."""
    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


def test_a_request_does_not_wait_for_a_file_that_hangs(
    make_engine: Engines, hanging: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(hanging.parent)
    run_one(engine, [2] * 40)
    engine.wait_stored()
    engine.forget_pool()
    monkeypatch.setattr(block_loads, "FILE_LIMIT_S", 3.0)
    with caplog.at_level(logging.INFO):
        assert run_one(engine, [1] * 40).num_cached == 16  # up to the fifth
        assert run_one(engine, [2] * 40).num_cached == 36  # from memory, meanwhile
        engine.wait_until(lambda: not engine.offload.num_uncopied)
        engine.forget_pool()
        assert run_one(engine, [1] * 40).num_cached == 36  # what was computed is in memory now
        assert [record.message for record in caplog.records] == [
            "--kv-offload-dir: a file was not read within 3 s; until it is, no other is read"
        ]
        assert engine.scheduler.pool.num_used == 0
        let_go(hanging)
        engine.wait_until(lambda: "files are read again" in caplog.text)
    assert engine.offload.has(b"k" * 32) is False and engine.scheduler.pool.num_used == 0


def test_other_requests_of_the_disk_go_on_when_a_file_no_longer_hangs(
    make_engine: Engines, hanging: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_engine(hanging.parent)
    run_one(other, [2] * 40)
    other.wait_stored()
    engine = make_engine(hanging.parent)
    monkeypatch.setattr(block_loads, "FILE_LIMIT_S", 3.0)
    first, second = (engine.scheduler.add(make_request([token] * 40, 3, str(token))) for token in (1, 2))
    engine.run()
    assert first.num_cached == 16 and second.num_cached == 0  # the second waited for the same disk
    assert generated(second) == continuation(second.request)
    with caplog.at_level(logging.INFO):
        let_go(hanging)
        engine.wait_until(lambda: "files are read again" in caplog.text)
    restarted = make_engine(hanging.parent)
    assert run_one(restarted, [2] * 40).num_cached == 36


def test_a_slow_disk_is_waited_for_as_long_as_a_load_may_take(
    make_engine: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is fast enough, but there are too many."""
    read = BlockFolder.read

    def read_slowly(self: BlockFolder, key: bytes, out: Any) -> bool:
        time.sleep(0.05)
        return read(self, key, out)

    engine = make_engine(tmp_path)
    run_one(engine, [1] * 160)
    engine.wait_stored()
    monkeypatch.setattr(block_loads, "LOAD_LIMIT_S", 1.0)
    monkeypatch.setattr(BlockFolder, "read", read_slowly)
    restarted = make_engine(tmp_path)
    assert 0 < run_one(restarted, [1] * 160).num_cached <= 80  # at most twenty files of forty
    restarted.wait_until(lambda: not len(restarted.scheduler.loading))
    assert restarted.scheduler.pool.num_used == 0
