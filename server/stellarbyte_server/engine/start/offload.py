"""From settings to the tiers below the pool of blocks, and what the content of their blocks depends on."""

import hashlib
import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.offload.block_file import HEADER_BYTES
from stellarbyte_server.engine.offload.block_folder import BlockFolder
from stellarbyte_server.engine.offload.copies import make_copies
from stellarbyte_server.engine.offload.offload import Offload
from stellarbyte_server.engine.start.machine import dtype_name
from stellarbyte_server.engine.start.serving_plan import ServingPlan, StartupError

logger = logging.getLogger("server.engine")

BUFFER_BYTES = 64 * 2**20  # of host memory for blocks on their way to the folder, without --kv-offload-memory


@dataclass(frozen=True, kw_only=True)
class CacheOrigin:
    """What keys and values are computed from and with. Blocks of one origin are of no use to another."""

    weights_hash: str
    quantization: str  # of the weights as they are served
    dtype: torch.dtype
    device: str
    processor: str
    deterministic: bool

    def identity(self, serving: ServingPlan, cache: PagedKVCache) -> bytes:
        """A hash of it, with the config as it is served, the cache's layout and the release: 32 bytes."""
        layout = serving.cache.layout
        parts = {
            "release": version("stellarbyte"),
            "weights": self.weights_hash,
            "quantization": self.quantization,
            "dtype": dtype_name(self.dtype),
            "device": self.device,
            "processor": self.processor,
            "deterministic": self.deterministic,
            "config": serving.config.to_dict(),
            "cache": [dtype_name(cache.keys_LBSKD.dtype), *cache.keys_LBSKD.shape[2:], len(cache.keys_LBSKD)],
            "layout": [layout.block_size, layout.window, layout.sink_tokens],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def make_offload(
    settings: EngineSettings, origin: CacheOrigin, serving: ServingPlan, cache: PagedKVCache
) -> Offload | None:
    """The tiers of --kv-offload-memory and --kv-offload-dir, started; None: neither is given.

    Raises:
        StartupError: they are too small, or the folder cannot be used.
    """
    if settings.kv_offload_memory is None and settings.kv_offload_dir is None:
        return None
    copies = make_copies(cache)
    memory = BUFFER_BYTES if settings.kv_offload_memory is None else settings.kv_offload_memory
    num_slots = memory // copies.num_bytes
    if not num_slots and settings.kv_offload_memory is not None:
        raise StartupError(f"--kv-offload-memory: {memory} bytes are less than one block of {copies.num_bytes}.")
    folder = None
    if settings.kv_offload_dir is not None:
        assert settings.kv_offload_bytes is not None  # settings see to it
        folder = _open_folder(
            Path(settings.kv_offload_dir), settings.kv_offload_bytes, origin.identity(serving, cache), copies.num_bytes
        )
    offload = Offload(copies, max(1, num_slots), folder)
    offload.start()
    if settings.kv_offload_memory is not None:
        logger.info("KV cache in host memory: %d blocks (%.2f GiB)", num_slots, num_slots * copies.num_bytes / 2**30)
    if folder is not None:
        logger.info("KV cache on disk: %s, with %d blocks of this model", settings.kv_offload_dir, folder.num_known)
    return offload


def _open_folder(path: Path, max_bytes: int, identity: bytes, block_bytes: int) -> BlockFolder:
    file_bytes = block_bytes + HEADER_BYTES
    if max_bytes < file_bytes:
        raise StartupError(f"--kv-offload-bytes: {max_bytes} bytes are less than one block's file of {file_bytes}.")
    try:
        return BlockFolder(path, max_bytes, identity, block_bytes)
    except OSError as error:
        raise StartupError(f"--kv-offload-dir {path}: cannot be used: {error.strerror}.") from error
