"""Where adapters may be read from, and what looks like one but lies elsewhere."""

import os
from pathlib import Path

import pytest

from server.engine.adapter_folder import AdapterFolder
from tests.adapters import touch_adapter


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
