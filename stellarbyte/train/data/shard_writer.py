"""Appends documents to the shards of a split."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stellarbyte.train.data.shards import ENDS_DTYPE, Shard, Split, ends_file, tokens_file


class ShardWriter:
    """Continues after the shards of `counts`: what files hold beyond them is removed. Raises OSError.

    Attributes:
        num_documents, num_tokens: of all shards.
    """

    def __init__(
        self, folder: Path, split: Split, dtype: np.dtype[Any], shard_tokens: int, counts: list[list[int]]
    ) -> None:
        """`counts`, of documents and tokens by shard, is kept up to date."""
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._counts = counts
        self.num_documents, self.num_tokens = (sum(each[i] for each in counts) for i in (0, 1))
        self._files: tuple[BinaryIO, BinaryIO] | None = None  # of the last shard: tokens, ends
        for file in folder.glob(f"{split}-*.*"):
            if int(file.stem.rpartition("-")[2]) >= len(counts):
                file.unlink()
        if counts:
            documents, tokens = counts[-1]
            self._open()
            sizes = tokens * dtype.itemsize, documents * ENDS_DTYPE.itemsize
            for file, size in zip(self._files or (), sizes, strict=True):
                if file.tell() < size:  # truncate would fill it with zeros
                    raise OSError(f"{file.name} is shorter than it was")
                file.truncate(size)

    @property
    def shards(self) -> list[Shard]:
        return [Shard(documents=documents, tokens=tokens) for documents, tokens in self._counts]

    def append(self, ids: np.ndarray) -> None:
        """Add a document of at least one token."""
        if not self._counts or self._counts[-1][1] >= self._shard_tokens:
            self.close()
            self._counts.append([0, 0])
            self._open()
        assert self._files is not None
        last = self._counts[-1]
        last[0] += 1
        last[1] += len(ids)
        self.num_documents += 1
        self.num_tokens += len(ids)
        tokens, ends = self._files
        tokens.write(ids.astype(self._dtype).tobytes())
        ends.write(np.array(last[1], ENDS_DTYPE).tobytes())

    def flush(self) -> None:
        """Everything appended is on the disk afterwards."""
        for file in self._files or ():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self.flush()
        for file in self._files or ():
            file.close()
        self._files = None

    def _open(self) -> None:
        number = len(self._counts) - 1
        self._files = (
            tokens_file(self._folder, self._split, number).open("ab", buffering=1 << 20),
            ends_file(self._folder, self._split, number).open("ab", buffering=1 << 16),
        )
