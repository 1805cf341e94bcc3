"""Allowed places of adapters: --adapter-dir, the paths of --lora-modules, and what was fetched from --adapter-source.

Paths are compared after resolving links, and a forbidden path gets the same error as an absent one. Functions that read
files may wait for a disk or a network: never call them on the engine's thread.
"""

import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from stellarbyte_server.config.adapter_source import folder_name, is_source
from stellarbyte_server.config.setting_values import is_adapter_name
from stellarbyte_server.engine.state.adapter_version import AdapterFiles
from stellarbyte_server.protocol.adapter_versions import StoredAdapter

logger = logging.getLogger("server.engine")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"  # found only so that reading it can be refused by name


class AdapterFolder:
    """Finds the files of adapters. Any thread.

    Args:
        folder: --adapter-dir.
        modules: --lora-modules, name → path.
        fetched: the cache folder of adapters of other hosts; None: there may be none.
        tuned: the folder of the results of fine-tuning; None: there are none.
    """

    def __init__(
        self, folder: str | None, modules: Mapping[str, str], fetched: Path | None = None, tuned: str | None = None
    ) -> None:
        self._folder = None if folder is None else Path(folder).resolve()
        self._modules = {name: Path(path).resolve() for name, path in modules.items()}
        self._fetched = None if fetched is None else fetched.resolve()
        self._tuned = None if tuned is None else Path(tuned).resolve()

    def module(self, name: str) -> AdapterFiles | None:
        """The files of an adapter of --lora-modules; None if absent."""
        root = self._modules[name]
        return _files(root, root, asked=str(root), shown=root.name, or_pickle=True)

    def is_module(self, name: str) -> bool:
        """Whether --lora-modules has this name."""
        return name in self._modules

    def may_offer(self, name: str) -> bool:
        """Whether a folder in --adapter-dir can have this name. Reads no files."""
        return self._folder is not None and is_adapter_name(name) and "/" not in name

    def offered(self, name: str) -> AdapterFiles | None:
        """The files of the folder with this name in --adapter-dir."""
        if self._folder is None or not self.may_offer(name):
            return None
        plain = _plain_files(self._folder, name)
        return _inside(self._folder, name, or_pickle=False) if plain is None else plain

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
        """The files at a path inside --adapter-dir, at exactly a module's path, or at an absolute path of a result of
        fine-tuning; None if absent.

        A source on another host, with its version, has them if the HTTP process fetched it, which also checks
        whether it is allowed.
        """
        if is_source(path):
            return self._of_source(path)
        if (files := _inside(self._folder, path, or_pickle=True)) is not None:
            return files
        if Path(path).is_absolute() and (files := _inside(self._tuned, path, or_pickle=False)) is not None:
            return files
        for root in self._modules.values():
            if path == str(root):
                return _files(root, root, asked=path, shown=root.name, or_pickle=True)
        return None

    def _of_source(self, source: str) -> AdapterFiles | None:
        if self._fetched is None:
            return None
        root = self._fetched / folder_name(source)
        return _files(root, root, asked=source, shown=source, or_pickle=False)


def _inside(root: Path | None, path: str, *, or_pickle: bool) -> AdapterFiles | None:
    """The files at `path`, relative to `root` or absolute, if they are inside it."""
    if root is None or ".." in Path(path).parts:
        return None
    try:
        folder = (root / path).resolve()
        return _files(folder, root, asked=path, shown=str(folder.relative_to(root)), or_pickle=or_pickle)
    except (OSError, ValueError, RuntimeError):  # too long, a cycle of links; a NUL, outside root
        return None


def stored_files(stored: StoredAdapter) -> AdapterFiles:
    """The server's own copy of an adapter's files, which reading checks."""
    folder = Path(stored.folder)
    return AdapterFiles(
        config=folder / CONFIG_FILE,
        weights=folder / WEIGHTS_FILE,
        root=folder,
        asked=stored.folder,
        shown=stored.root,
        is_stored=True,
    )


def _plain_files(root: Path, name: str) -> AdapterFiles | None:
    """The files of a folder in `root`; None if anything is a link. Fast, as thousands are listed at a time."""
    folder = f"{root}/{name}"
    config, weights = f"{folder}/{CONFIG_FILE}", f"{folder}/{WEIGHTS_FILE}"
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode) or not all(
            stat.S_ISREG(os.lstat(file).st_mode) for file in (config, weights)
        ):
            return None
    except (OSError, ValueError):
        return None
    return AdapterFiles(config=Path(config), weights=Path(weights), root=root, asked=name, shown=name)


def _files(folder: Path, root: Path, *, asked: str, shown: str, or_pickle: bool) -> AdapterFiles | None:
    """Config and weights of a folder, if they are plain files inside `root`.

    With `or_pickle`, the weights may be a pickle if there are no others.
    """
    config, weights = (_file(folder / name, root) for name in (CONFIG_FILE, WEIGHTS_FILE))
    if weights is None and or_pickle:
        weights = _file(folder / PICKLE_FILE, root)
    if config is None or weights is None:
        return None
    return AdapterFiles(config=config, weights=weights, root=root, asked=asked, shown=shown)


def _file(path: Path, root: Path) -> Path | None:
    file = path.resolve()
    return file if file.is_file() and file.is_relative_to(root) else None
