"""The file of one block: a header with its identity, key and checksums, then its keys and values.

The identity is a hash of all that the content depends on besides the key (weights, dtypes, layout). A file that was cut
off, damaged, or renamed from another model's is recognised.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"sbytekv1"
_HEADER = struct.Struct("<8s32s32sQII")  # magic, identity, key, bytes, CRC-32 of the first half, of the second
HEADER_BYTES = _HEADER.size


class BlockFileError(ValueError):
    """A file is not that of the block; str() says why."""


@dataclass(frozen=True, kw_only=True)
class BlockName:
    """Which block a file has."""

    identity: bytes  # 32 bytes, like the key
    key: bytes

    @property
    def file_name(self) -> str:
        return f"{prefix_of(self.identity)}{self.key.hex()}.kv"


def prefix_of(identity: bytes) -> str:
    """How the names of all files of an identity begin."""
    return f"{identity[:8].hex()}-"


def write_block_file(path: Path, name: BlockName, content: np.ndarray) -> None:
    """Write a file of `content`, uint8 [N]; OSError."""
    header = _HEADER.pack(_MAGIC, name.identity, name.key, content.nbytes, *_checksums(content))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        for part in (header, content.data):
            while part := part[file.write(part) or 0 :]:  # a full disk may take a part of it
                pass


def read_block_file(path: Path, name: BlockName, out: np.ndarray) -> None:
    """Fill `out`, uint8 [N], from a block's file.

    Raises:
        BlockFileError: it is not that of this block, whole and undamaged. `out` is undefined then.
        OSError
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
        header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            raise BlockFileError("the file is truncated")
        magic, identity, key, num_bytes, *checksums = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise BlockFileError("the file has another format")
        if identity != name.identity:
            raise BlockFileError("the block is of another model or other settings")
        if key != name.key or num_bytes != out.nbytes:
            raise BlockFileError("the block is another one")
        rest = out.data
        while rest and (count := file.readinto(rest)):
            rest = rest[count:]
        if rest:
            raise BlockFileError("the file is truncated")
        if file.read(1):
            raise BlockFileError("the file is too long")
    if _checksums(out) != tuple(checksums):
        raise BlockFileError("the checksum is wrong")


def _checksums(content: np.ndarray) -> tuple[int, int]:
    half = content.nbytes // 2
    return zlib.crc32(content[:half].data), zlib.crc32(content[half:].data)
