"""Where adapters may be read from: --adapter-dir and the places --lora-modules names. Knows no formats.

A path is resolved, links included, before it is compared, and what is absent and what is forbidden look the same.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from server.engine.adapter_version import AdapterFiles
from server.setting_values import is_adapter_name

logger = logging.getLogger("server.engine")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class AdapterFolder:
    """Finds the files of adapters.

    Args:
        folder: --adapter-dir.
        modules: --lora-modules, name → path.
    """

    def __init__(self, folder: str | None, modules: Mapping[str, str]) -> None:
        self._folder = None if folder is None else Path(folder).resolve()
        self._modules = {name: Path(path).resolve() for name, path in modules.items()}

    def module(self, name: str) -> AdapterFiles | None:
        """The files of an adapter given with --lora-modules; None if they are not there."""
        root = self._modules[name]
        return _files(root, root, root.name)

    def offered(self, name: str) -> AdapterFiles | None:
        """The files of the folder in --adapter-dir that has this name."""
        if self._folder is None or not is_adapter_name(name) or "/" in name:
            return None
        return self._inside(name)

    def all_offered(self) -> list[tuple[str, AdapterFiles]]:
        """Name and files of every adapter in --adapter-dir."""
        if self._folder is None:
            return []
        try:
            names = sorted(os.listdir(self._folder))
        except OSError as error:
            logger.warning("--adapter-dir cannot be listed: %s", error.strerror)
            return []
        return [(name, files) for name in names if (files := self.offered(name)) is not None]

    def at(self, path: str) -> AdapterFiles | None:
        """The files at a path inside --adapter-dir, or at the very path of a module; None if they are not there."""
        if (files := self._inside(path)) is not None:
            return files
        for root in self._modules.values():
            if path == str(root):
                return _files(root, root, root.name)
        return None

    def _inside(self, path: str) -> AdapterFiles | None:
        """The files at `path`, relative to --adapter-dir or absolute, if they lie in it."""
        root = self._folder
        if root is None or ".." in Path(path).parts:
            return None
        try:
            folder = (root / path).resolve()
            return _files(folder, root, str(folder.relative_to(root)))
        except (OSError, ValueError, RuntimeError):  # too long, links in a circle; a NUL, not inside root
            return None


def _files(folder: Path, root: Path, shown: str) -> AdapterFiles | None:
    """Both files of a folder, if they are plain files that lie inside `root` themselves."""
    found = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        file = (folder / name).resolve()
        if not file.is_file() or not file.is_relative_to(root):
            return None
        found.append(file)
    config, weights = found
    return AdapterFiles(config=config, weights=weights, shown=shown)
