"""What a run learns from: rows of tokens, where they come from, and the order in which they are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from stellarbyte.train.data.packing import NO_LABEL, Batch

Collate = Callable[[Sequence[Batch]], Batch]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of one run.

    Attributes:
        train, held_out: of rows as `stellarbyte.train.data.packing` has them; None: nothing is held out.
        collate: rows → batch of the same names, [B, T].
        fingerprint: SHA-256 of what the rows are made of; equal rows have equal fingerprints.
        licenses: of the texts, without repetitions.
        bytes_per_token: UTF-8 bytes of the held-out text for each of its tokens; None: not known.
        tokenizer: the folder with its files.
        vocab_size, special_ids: of the tokenizer, as the fields of a model's config.
        invocation: the tokens from which on an activated adapter acts; None: the adapter acts on all.
    """

    train: Dataset[Batch]
    held_out: Dataset[Batch] | None
    collate: Collate
    fingerprint: str
    licenses: tuple[str, ...]
    bytes_per_token: float | None
    tokenizer: Path
    vocab_size: int
    special_ids: Mapping[str, int | None]
    invocation: tuple[int, ...] | None = None


class ShuffledStream(Sampler[int]):
    """Indices of `num_rows` rows, epoch after epoch, each in an order of its own that only the seed decides.

    A batch may end one epoch and begin the next, so every epoch reads every row once, whatever the batch size.
    """

    def __init__(self, num_rows: int, length: int, seed: int) -> None:
        self.num_rows = num_rows
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        left, epoch = self.length, 0
        while left > 0:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_rows, generator=generator)[:left]
            for part in order.split(1 << 16):
                yield from part.tolist()
            left -= len(order)
            epoch += 1


class RankBatches(Sampler[list[int]]):
    """The batches of one of `ranks` ranks: batch b of the stream is that of rank b mod `ranks`.

    A step reads the same rows on any number of ranks. The stream must have a multiple of size · ranks rows.
    """

    def __init__(self, stream: ShuffledStream, *, size: int, rank: int, ranks: int) -> None:
        self.stream, self.size, self.rank, self.ranks = stream, size, rank, ranks

    def __len__(self) -> int:
        return len(self.stream) // (self.size * self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        rows = iter(self.stream)
        for number in range(len(self) * self.ranks):
            batch = list(islice(rows, self.size))
            if number % self.ranks == self.rank:
                yield batch


class ShiftedRows(Dataset[Batch]):
    """The rows of `dataset`, the positions of each counted from a number in [0, largest] that its own number and the
    seed decide."""

    def __init__(self, dataset: Dataset[Batch], *, largest: int, seed: int) -> None:
        self.dataset, self.largest, self.seed = dataset, largest, seed

    def __len__(self) -> int:
        return num_rows(self.dataset)

    def __getitem__(self, row: int) -> Batch:
        content = self.dataset[row]
        shift = int(np.random.default_rng((self.seed, row)).integers(self.largest + 1))
        return Batch(**{**content, "position_ids": content["position_ids"] + shift})


class RankRows(Dataset[Batch]):
    """Every row of `dataset` on one of `ranks` ranks, and on each rank as many: the missing are rows without labels."""

    def __init__(self, dataset: Dataset[Batch], *, rank: int, ranks: int) -> None:
        self.dataset, self.rank, self.ranks = dataset, rank, ranks

    def __len__(self) -> int:
        return -(-num_rows(self.dataset) // self.ranks)

    def __getitem__(self, index: int) -> Batch:
        number = index * self.ranks + self.rank
        if number < num_rows(self.dataset):
            return self.dataset[number]
        row = self.dataset[0]
        return Batch(**{**row, "labels": torch.full_like(row["labels"], NO_LABEL)})


def num_rows(dataset: Any) -> int:
    return len(dataset)
