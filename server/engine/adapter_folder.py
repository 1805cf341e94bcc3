"""Where adapters may be read from: --adapter-dir and the places --lora-modules names. Knows no formats.

A path is resolved, links included, before it is compared, and what is absent and what is forbidden look the same.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from server.engine.adapter_version import AdapterFiles
from server.settings import is_adapter_name

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
        return self.at(name)

    def names(self) -> list[str]:
        """Names of the adapters in --adapter-dir."""
        if self._folder is None:
            return []
        try:
            with os.scandir(self._folder) as entries:
                found = sorted(entry.name for entry in entries)
        except OSError as error:
            logger.warning("--adapter-dir cannot be listed: %s", error.strerror)
            return []
        return [name for name in found if self.offered(name) is not None]

    def at(self, path: str) -> AdapterFiles | None:
        """The files at `path`, relative to --adapter-dir or absolute; None unless they are there and allowed."""
        if ".." in Path(path).parts:
            return None
        for root in [self._folder, *self._modules.values()]:
            if root is None:
                continue
            try:
                folder = (root / path).resolve()
                if folder.is_relative_to(root) and (files := _files(folder, root, _shown(folder, root))) is not None:
                    return files
            except (OSError, ValueError, RuntimeError):  # too long, a NUL, links in a circle
                continue
        return None


def _shown(folder: Path, root: Path) -> str:
    return folder.name if folder == root else str(folder.relative_to(root))


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
