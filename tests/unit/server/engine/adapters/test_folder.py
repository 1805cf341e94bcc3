"""Where adapters may be read from, and what looks like one but lies elsewhere."""

import os
from pathlib import Path

import pytest

from stellarbyte_server.config.adapter_source import folder_name
from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.opening import open_inside
from tests.support.models.adapters import touch_adapter


@pytest.mark.parametrize(
    "path",
    ["../outside", "a/../../outside", "/etc", "a\0b", "x" * 5000, "http://example.com/a", "file:///etc", "link", "loop",
     "linked file", "pipe", ".", "", "a/adapter_config.json", "a/../b"],
)  # fmt: skip
def test_nothing_outside_the_allowed_folders_is_found(tmp_path: Path, path: str) -> None:
    inside = tmp_path / "inside"
    touch_adapter(inside / "a")
    touch_adapter(inside / "b")
    outside = touch_adapter(tmp_path / "outside")
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "linked file").mkdir()
    for file in outside.iterdir():
        (inside / "linked file" / file.name).symlink_to(file)
    (inside / "pipe").mkdir()
    os.mkfifo(inside / "pipe" / "adapter_config.json")
    os.mkfifo(inside / "pipe" / "adapter_model.safetensors")
    assert AdapterFolder(str(inside), {}).at(path) is None
    assert AdapterFolder(str(inside), {}).at(str(outside)) is None


def test_a_source_is_found_where_it_was_fetched_to_and_only_by_its_whole_name(tmp_path: Path) -> None:
    source = "hf://org/x@0123"
    fetched = touch_adapter(tmp_path / "cache" / folder_name(source))
    folder = AdapterFolder(None, {}, tmp_path / "cache")
    found = folder.at(source)
    assert found is not None and (found.config.parent, found.shown, found.asked) == (fetched, source, source)
    for path in ("hf://org/x", "hf://org/x@012", fetched.name, str(fetched), f"hf://../cache/{fetched.name}"):
        assert folder.at(path) is None
    assert AdapterFolder(str(tmp_path), {}).at(source) is None
    outside = touch_adapter(tmp_path / "outside")
    (tmp_path / "cache" / folder_name("hf://org/y@1")).symlink_to(outside)
    assert folder.at("hf://org/y@1") is None


def test_links_within_and_modules_given_at_the_start_are_found(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", touch_adapter(tmp_path / "outside")
    touch_adapter(inside / "deep" / "a")
    (inside / "link").symlink_to(inside / "deep" / "a")
    folder = AdapterFolder(str(inside), {"mine": str(outside)})
    assert folder.at("deep/a").shown == "deep/a"
    assert folder.at("link").config == inside / "deep" / "a" / "adapter_config.json"
    assert folder.at(str(outside)).shown == "outside"
    assert folder.module("mine").weights.parent == outside
    assert [name for name, _ in folder.all_offered()] == ["link"]
    assert folder.offered("deep") is None and folder.offered("link") is not None


def test_what_lies_in_a_module_given_at_the_start_is_not_offered(tmp_path: Path) -> None:
    outside = touch_adapter(tmp_path / "outside")
    touch_adapter(outside / "checkpoint-500")
    folder = AdapterFolder(str(tmp_path / "inside"), {"mine": str(outside)})
    assert folder.offered("checkpoint-500") is None
    for path in ("checkpoint-500", str(outside / "checkpoint-500"), ".", "outside"):
        assert folder.at(path) is None


def test_a_pickle_is_found_only_where_an_operator_asks_for_it(tmp_path: Path) -> None:
    """So that its refusal can say why; it is never offered."""
    only_pickle = touch_adapter(tmp_path / "a")
    (only_pickle / "adapter_model.safetensors").rename(only_pickle / "adapter_model.bin")
    folder = AdapterFolder(str(tmp_path), {"mine": str(only_pickle)})
    assert folder.at("a").weights == folder.module("mine").weights == only_pickle / "adapter_model.bin"
    assert folder.offered("a") is None and folder.all_offered() == []
    (only_pickle / "adapter_model.safetensors").touch()
    assert folder.at("a").weights.suffix == ".safetensors"


def swap(path: Path, for_link_to: Path) -> None:
    """What an attacker does who may write into the folder."""
    path.rename(path.with_name(path.name + ".old"))
    path.symlink_to(for_link_to)


@pytest.mark.parametrize("swapped", ["a/adapter_config.json", "a/adapter_model.safetensors", "a", "."])
def test_a_link_that_replaces_what_was_found_is_not_followed(tmp_path: Path, swapped: str) -> None:
    """Whether it leads out or not: what is opened is what was checked."""
    inside, outside = tmp_path / "inside", touch_adapter(tmp_path / "outside")
    touch_adapter(inside / "a")
    touch_adapter(outside / "a")
    files = AdapterFolder(str(inside), {}).offered("a")
    for file in (files.config, files.weights):
        os.close(open_inside(files.root, str(file), os.O_RDONLY))
    swap((inside / swapped).resolve(), outside / swapped if swapped in ("a", ".") else next(outside.glob("adapter_*")))
    refused = 0
    for file in (files.config, files.weights):
        try:
            os.close(open_inside(files.root, str(file), os.O_RDONLY))
        except OSError:
            refused += 1
    assert refused == (1 if swapped.startswith("a/") else 2)


def test_nothing_outside_is_opened_and_no_descriptor_is_left(tmp_path: Path) -> None:
    touch_adapter(tmp_path / "inside" / "deep" / "a")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for path in (tmp_path / "outside", tmp_path / "inside" / "deep" / "none" / "x", tmp_path / "inside" / "x"):
        with pytest.raises(OSError):
            open_inside(tmp_path / "inside", str(path), os.O_RDONLY)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_thousands_of_folders_are_listed_with_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolving every path took half a second for 2,000; a call for each part of each path is what that costs."""
    for i in range(50):
        touch_adapter(tmp_path / f"a{i:02}")
    (tmp_path / "b").symlink_to(tmp_path / "a00")
    folder = AdapterFolder(str(tmp_path), {})
    calls = []
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda *arguments, **options: calls.append(1) or lstat(*arguments, **options))
    assert [name for name, _ in folder.all_offered()] == [*(f"a{i:02}" for i in range(50)), "b"]
    assert len(calls) < 51 * 3 + 100


def test_a_result_of_fine_tuning_is_found_by_its_absolute_path_only(tmp_path: Path) -> None:
    tuned, outside = tmp_path / "tuned", touch_adapter(tmp_path / "outside")
    adapter = touch_adapter(tuned / "job" / "adapter")
    (tuned / "link").symlink_to(outside)
    folder = AdapterFolder(None, {}, None, str(tuned))
    found = folder.at(str(adapter))
    assert found is not None and (found.shown, found.root) == ("job/adapter", tuned)
    for path in ("job/adapter", str(tuned / "link"), str(outside), f"{tuned}/../outside", str(tuned)):
        assert folder.at(path) is None
    assert not folder.may_offer("job") and folder.all_offered() == []
    assert AdapterFolder(str(tmp_path / "outside"), {}).at(str(adapter)) is None
