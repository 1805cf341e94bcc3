"""Token shards as a torch dataset: rows of at most `sequence` tokens, read from memory-mapped files."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from stellarbyte.train.data.packing import Batch, packed_row
from stellarbyte.train.data.shards import ENDS_DTYPE, Split, ends_file, read_index, tokens_file
from stellarbyte.train.errors import TrainError

Layout = Literal["cut", "whole", "single"]


class TokenSequences(Dataset[Batch]):
    """The rows of one split. Every token is in one row, and rows follow the order of the documents.

    Layouts:
        cut: every row but the last has `sequence` tokens; documents go on in the next row.
        whole: a document that does not fit into the rest of a row starts the next one; only those longer than
            `sequence` are cut.
        single: a row holds one document or a part of one.

    A part of a cut document counts as a document. Copies of it in other processes map the files anew: its pickled form
    is a few hundred bytes.
    """

    def __init__(self, folder: Path, split: Split, sequence: int, layout: Layout = "cut") -> None:
        """Raises TrainError: the folder is not complete, or the split is empty."""
        if sequence < 2:
            raise TrainError(f"sequence ({sequence}) must be at least 2: a token predicts the next.")
        self.folder, self.split, self.sequence, self.layout = folder, split, sequence, layout
        self.index = read_index(folder)
        self.num_tokens = self.index.splits[split].tokens
        if not self.num_tokens:
            hint = "; prepare it with held_out above 0" if split == "held_out" else ""
            raise TrainError(f"{folder} has no documents in {split}{hint}.")
        self._mapped: _MappedSplit | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def __len__(self) -> int:
        return len(self._split().starts)

    def __getitem__(self, row: int) -> Batch:
        """Row `row` in the form of `packed_row`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        mapped = self._split()
        start = int(mapped.starts[row])
        end = int(mapped.starts[row + 1]) if row + 1 < len(self) else self.num_tokens
        ids = mapped.read(start, end)
        pieces = np.split(ids, mapped.ends_within(start, end) - start)
        padding = self.index.eos_token_id if self.index.pad_token_id is None else self.index.pad_token_id
        return packed_row([(piece, piece) for piece in pieces], self.sequence, padding)

    def _split(self) -> "_MappedSplit":
        if self._mapped is None:
            self._mapped = _MappedSplit(self)
        return self._mapped


class _MappedSplit:
    """The mapped files of a split, as one long array of tokens, and where its rows start."""

    def __init__(self, sequences: TokenSequences) -> None:
        folder, split, index = sequences.folder, sequences.split, sequences.index
        shards = index.splits[split].shards
        self._tokens = [np.memmap(tokens_file(folder, split, i), index.token_dtype, "r") for i in range(len(shards))]
        self._ends = [np.memmap(ends_file(folder, split, i), ENDS_DTYPE, "r") for i in range(len(shards))]
        self._shard_starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self.starts = self._row_starts(sequences)

    def read(self, start: int, end: int) -> np.ndarray:
        """The tokens [start, end)."""
        parts = []
        for shard in self._shards(start, end):
            first = self._shard_starts[shard]
            parts.append(self._tokens[shard][max(0, start - first) : end - first])
        return np.concatenate(parts)

    def ends_within(self, start: int, end: int) -> np.ndarray:
        """The ends of documents after `start` and before `end`."""
        parts = []
        for shard in self._shards(start, end):
            first, ends = self._shard_starts[shard], self._ends[shard]
            low = np.searchsorted(ends, max(0, start - first), "right")
            high = np.searchsorted(ends, end - first, "left")
            parts.append(ends[low:high] + first)
        return np.concatenate(parts)

    def _shards(self, start: int, end: int) -> range:
        return range(
            int(np.searchsorted(self._shard_starts, start, "right")) - 1,
            int(np.searchsorted(self._shard_starts, end, "left")),
        )

    def _row_starts(self, sequences: TokenSequences) -> "range | np.ndarray":
        length, num_tokens = sequences.sequence, sequences.num_tokens
        if sequences.layout == "cut":
            return range(0, num_tokens, length)
        ends = np.concatenate([ends + first for ends, first in zip(self._ends, self._shard_starts, strict=False)])
        if sequences.layout == "single":
            starts = np.concatenate(([0], ends[:-1]))
            num_rows = -(-(ends - starts) // length)
            within = np.arange(num_rows.sum()) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
            return np.repeat(starts, num_rows) + within * length
        rows = [0]
        while rows[-1] + length < num_tokens:
            last = np.searchsorted(ends, rows[-1] + length, "right") - 1  # the last document that ends in the row
            fits = last >= 0 and ends[last] > rows[-1]
            rows.append(int(ends[last]) if fits else rows[-1] + length)
        return np.array(rows)
