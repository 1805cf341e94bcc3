"""The folder of adapters: a crash at any call of the system leaves each name as it was before a change, or after it."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from stellarbyte_server.protocol.adapter_versions import AdapterLocated, RecordedAdapters
from stellarbyte_server.registry.record import NameRecord, Version, next_number, with_version
from stellarbyte_server.registry.store import AdapterRegistry

CHANGES = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir", "close")  # calls of the system


class Killed(BaseException):
    """The process has ended; nothing of it runs any more."""


@contextmanager
def killed_at(count: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = Killed) -> Iterator[list[str]]:
    """Let the first `count` calls of the system through; the next, and with `Killed` all after it, do not happen. A
    write that does not happen has written half."""
    made: list[str] = []

    def patched(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            if len(made) >= count and (error is Killed or len(made) == count):
                if name == "write" and len(made) == count:
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                made.append(name)
                if name == "close":
                    real(*arguments)  # the system closes the files of a process that has ended
                raise error(errno.ENOSPC, "No space left on device")
            made.append(name)
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, patched(name))
        yield made


def make_files(folder: Path, content: str) -> AdapterLocated:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(f'{{"r": "{content}"}}')
    (folder / "adapter_model.safetensors").write_text(content * 10)
    config, weights = (str(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors"))
    return AdapterLocated(call_id="", config=config, weights=weights, root=str(folder.parent), shown=folder.name)


def add(registry: AdapterRegistry, name: str, located: AdapterLocated) -> NameRecord:
    """What a load does with the folder."""
    content, before = registry.keep(located), registry.record(name)
    version = Version(
        number=next_number(before),
        content_hash=located.shown * 32,
        folder=content.folder,
        file_hashes=content.file_hashes,
        source=content.source,
        created_at=1,
        created_by="ann",
    )
    record = with_version(before, version, name, registry.history)
    registry.write(record)
    return record


def restart(data: Path) -> AdapterRegistry:
    registry = AdapterRegistry(str(data), 10)
    registry.clean()
    return registry


def seen(registry: AdapterRegistry, name: str) -> tuple[NameRecord | None, list[str]]:
    """A name's record, and what its versions hold."""
    record = registry.record(name)
    folders = [] if record is None else [Path(registry.stored(version).folder) for version in record.versions]
    return record, [(folder / "adapter_model.safetensors").read_text() for folder in folders]


@pytest.mark.parametrize("change", ["first load", "second load", "rollback", "split", "unload"])
def test_a_kill_at_any_call_leaves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Whatever call is the last one: after a restart the name is as before or as after, and no other file is left."""
    a, b, c = (make_files(tmp_path / "source" / text, text) for text in "abc")

    def do(registry: AdapterRegistry) -> None:
        record = registry.record("x")
        if "load" in change and change != "unload":
            add(registry, "x", c)
        elif change == "rollback":
            registry.write(record.rolled_back(1))
        elif change == "split":
            registry.write(record.split({"1": 0.5, "2": 0.5}))
        else:
            registry.remove("x")
            for version in record.versions:
                registry.discard(version.folder)

    outcomes = set()
    for count in range(1000):
        data = tmp_path / f"data{count}"
        data.mkdir()
        registry = restart(data)
        other = add(registry, "other", a)
        if change != "first load":
            add(registry, "x", a)
            add(registry, "x", b)
        before = seen(registry, "x")
        with killed_at(count, monkeypatch) as made:
            try:
                do(registry)
                was_killed = False
            except Killed:
                was_killed = True
        registry.close()
        registry = restart(data)
        after = seen(registry, "x")
        if was_killed and after[0] == before[0]:
            assert after == before
            outcomes.add("before")
        else:
            record, contents = after
            outcomes.add("after")
            if "load" in change and change != "unload":
                assert contents == [*before[1], "c" * 10] and record.current == len(contents)
            elif change == "unload":
                assert record is None
            else:
                assert contents == before[1]
                assert (record.current, record.shares) == (
                    (1, ()) if change == "rollback" else (2, ((1, 0.5), (2, 0.5)))
                )
        assert registry.record("other") == other
        used = {version.folder for record in (registry.record("x"), other) if record for version in record.versions}
        assert set(os.listdir(data / "adapters" / "contents")) == used
        assert os.listdir(data / "adapters" / "staged") == []
        assert {each.name for each in registry.recorded().adapters} == {"other"} | ({"x"} if after[0] else set())
        registry.close()
        if not was_killed:
            assert len(made) == count
            break
    assert outcomes == {"before", "after"}


def test_a_withdrawn_name_is_so_until_it_is_loaded_or_the_server_ends(tmp_path: Path) -> None:
    registry = restart(tmp_path)
    for name in ("x", "y", "x"):
        registry.withdraw(name)
    assert registry.recorded() == RecordedAdapters(withdrawn=("x", "y"))
    add(registry, "x", make_files(tmp_path / "source" / "a", "a"))
    assert registry.recorded().withdrawn == ("y",)
    registry.remove("x")
    assert registry.recorded() == RecordedAdapters(withdrawn=("y",))
    assert AdapterRegistry(tmp_path, 10).recorded().withdrawn == ("y",), "another process of the server"
    assert restart(tmp_path).recorded() == RecordedAdapters()


def test_files_that_the_disk_has_no_room_for_are_not_copied(tmp_path: Path) -> None:
    """Also where they take no room themselves, as they are holes."""
    registry, located = restart(tmp_path), make_files(tmp_path / "source" / "a", "a")
    disk = os.statvfs(tmp_path)
    os.truncate(located.weights, disk.f_blocks * disk.f_frsize)
    with pytest.raises(OSError, match="No space left"):
        registry.keep(located)
    assert os.listdir(tmp_path / "adapters" / "contents") == []


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (make_files(tmp_path / "source" / text, text) for text in "ab")
    registry = restart(tmp_path)
    add(registry, "x", a)
    before = seen(registry, "x")
    for count in range(1000):
        with killed_at(count, monkeypatch, OSError) as made:
            try:
                add(registry, "x", b)
                break
            except OSError:
                pass
        assert made[count] != "write" or seen(registry, "x") == before
    assert seen(registry, "x")[1][-1] == "b" * 10


@pytest.mark.parametrize("file", ["record", "config", "weights"])
def test_damaged_and_foreign_files_are_left_out_with_one_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    a = make_files(tmp_path / "source" / "a", "a")
    registry = restart(tmp_path)
    record, good = add(registry, "x", a), add(registry, "y", a)
    folder = Path(registry.stored(record.versions[0]).folder)
    if file == "record":
        (damaged,) = [path for path in (tmp_path / "adapters" / "names").iterdir() if b'"x"' in path.read_bytes()]
        damaged.write_bytes(damaged.read_bytes()[:-10])
    else:
        damaged = folder / ("adapter_config.json" if file == "config" else "adapter_model.safetensors")
        damaged.write_bytes(b"?" + damaged.read_bytes()[1:])
    registry.close()
    with caplog.at_level(logging.ERROR):
        registry = restart(tmp_path)
    assert [line.count("it is left out") for line in caplog.messages] == [1]
    assert [each.name for each in registry.recorded().adapters] == ["y"] and registry.record("x") is None
    assert registry.record("y") == good and folder.exists()  # somebody may want to look at it
    assert add(registry, "x", a).current == 1  # it can be loaded again


def test_links_are_not_followed(tmp_path: Path) -> None:
    a = make_files(tmp_path / "source" / "a", "a")
    registry = restart(tmp_path)
    record = add(registry, "x", a)
    weights = Path(registry.stored(record.versions[0]).folder) / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(a.weights)
    registry.close()
    assert restart(tmp_path).recorded() == RecordedAdapters()
    (tmp_path / "source" / "link").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "source" / "link" / name).symlink_to(tmp_path / "source" / "a" / name)
    linked = str(tmp_path / "source" / "link" / "adapter_config.json")
    with pytest.raises(OSError):
        restart(tmp_path).keep(msgspec.structs.replace(a, config=linked))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapters").symlink_to(moved)
    with pytest.raises(OSError):
        AdapterRegistry(str(tmp_path / "other"), 10)
