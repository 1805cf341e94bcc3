"""Files of blocks: what was written is read; what is anything else is refused by name."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from stellarbyte_server.engine.offload.block_file import (
    HEADER_BYTES,
    BlockFileError,
    BlockName,
    read_block_file,
    write_block_file,
)


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


NAME = BlockName(identity=sha("model"), key=sha("block"))


def content(num_bytes: int = 1001) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)


def refusal(path: Path, name: BlockName = NAME, num_bytes: int = 1001) -> str:
    with pytest.raises(BlockFileError) as refused:
        read_block_file(path, name, np.zeros(num_bytes, np.uint8))
    return str(refused.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_block_file(tmp_path / "file", NAME, content())
    return tmp_path / "file"


def test_what_was_written_is_read(path: Path) -> None:
    out = np.zeros(1001, np.uint8)
    read_block_file(path, NAME, out)
    assert (out == content()).all()
    assert path.stat().st_size == HEADER_BYTES + 1001
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_flipped_bit_is_found(path: Path) -> None:
    whole = path.read_bytes()
    places = [*range(HEADER_BYTES), *range(HEADER_BYTES, len(whole), 97), len(whole) - 1]
    for place in places:
        for bit in (0, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert refusal(path)


def test_a_damaged_block_is_refused_by_its_checksum(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 4
    path.write_bytes(damaged)
    assert refusal(path) == "the checksum is wrong"


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 1000])
def test_a_truncated_file_is_refused(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    assert refusal(path) == "the file is truncated"


def test_a_longer_file_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    assert refusal(path) == "the file is too long"


def test_another_models_block_is_refused(path: Path) -> None:
    other = BlockName(identity=sha("other weights"), key=NAME.key)
    assert refusal(path, other) == "the block is of another model or other settings"


def test_another_block_is_refused(path: Path) -> None:
    assert refusal(path, BlockName(identity=NAME.identity, key=sha("other"))) == "the block is another one"
    assert refusal(path, num_bytes=1000) == "the block is another one"


def test_another_format_is_refused(path: Path) -> None:
    path.write_bytes(b"x" * 2000)
    assert refusal(path) == "the file has another format"


def test_links_are_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        read_block_file(tmp_path / "link", NAME, np.zeros(1001, np.uint8))
    with pytest.raises(OSError, match="symbolic"):
        write_block_file(tmp_path / "link", NAME, content())
