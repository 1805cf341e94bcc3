"""An adapter found on another host, not yet downloaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)  # no others are downloaded


@dataclass(frozen=True, kw_only=True)
class RemoteAdapter:
    version: str  # the files of a version never change
    sizes: Mapping[str, int]  # bytes of each of FILES, as reported by the host
    download: Callable[[str, Path], Path]  # of one of FILES into a folder; FetchError
