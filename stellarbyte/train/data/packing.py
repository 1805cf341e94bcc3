"""Rows of several documents, with what keeps the documents apart.

    input_ids     int64
    labels        int64; -100 where nothing is learned: prompts, padding, and the first token of each document, which
                  would be predicted from the document before it
    position_ids  int64; from 0 in each document
    document_ids  int32; from 0 in each row, PADDING (-1) for padding

Labels are not shifted: the model compares its output at t with labels[t + 1]. So a row of several documents has the
same predictions and the same number of labels as the documents in rows of their own.
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

NO_LABEL, PADDING = -100, -1

Document = tuple[np.ndarray, np.ndarray]  # ids and labels of one document


class Batch(TypedDict):
    """A row [T] or a batch [B, T]. Rows have all of it; a batch whose rows are one document each needs no more than ids
    and labels, and then attention is plainly causal, which is the fastest."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: NotRequired[torch.Tensor]
    document_ids: NotRequired[torch.Tensor]


def packed_row(documents: Sequence[Document], length: int, padding_id: int) -> Batch:
    """One row of `length` tokens: the documents, then padding. They must fit."""
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    used = int(lengths.sum())
    assert used <= length, f"{used} tokens do not fit into {length}"
    starts = np.cumsum(lengths) - lengths
    ids_T = np.full(length, padding_id, np.int64)
    labels_T = np.full(length, NO_LABEL, np.int64)
    positions_T = np.zeros(length, np.int64)
    documents_T = np.full(length, PADDING, np.int32)
    ids_T[:used] = np.concatenate([ids for ids, _ in documents])
    labels_T[:used] = np.concatenate([labels for _, labels in documents])
    labels_T[starts] = NO_LABEL
    positions_T[:used] = np.arange(used) - np.repeat(starts, lengths)
    documents_T[:used] = np.repeat(np.arange(len(documents)), lengths)
    return Batch(
        input_ids=torch.from_numpy(ids_T),
        labels=torch.from_numpy(labels_T),
        position_ids=torch.from_numpy(positions_T),
        document_ids=torch.from_numpy(documents_T),
    )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of documents, by number: the longest first, each into the fullest row that has room for it.

    Needs at most 11/9 of the fewest possible rows. Every length must be at most `capacity`.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left
    rooms = 0  # bit r: there are rows with room r
    for number in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        length = lengths[number]
        assert 0 < length <= capacity
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


class PackedDocuments(Dataset[Batch]):
    """Documents in rows of `length` tokens: packed as densely as they fit, or one in each row.

    `ids` holds all documents one after the other; document i ends before `ends[i]`. Tokens are learned where
    `is_learned`, which has the form of `ids`.
    """

    def __init__(
        self, ids: np.ndarray, is_learned: np.ndarray, ends: np.ndarray, *, length: int, padding_id: int, packing: bool
    ) -> None:
        """Every document must have from 1 to `length` tokens."""
        self._ids, self._is_learned, self._ends = ids, is_learned, ends
        self._length, self._padding_id = length, padding_id
        lengths = np.diff(ends, prepend=0).tolist()
        self.rows = best_fit(lengths, length) if packing else [[number] for number in range(len(lengths))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Batch:
        return packed_row([self._document(number) for number in self.rows[row]], self._length, self._padding_id)

    def _document(self, number: int) -> Document:
        start = int(self._ends[number - 1]) if number else 0
        part = slice(start, int(self._ends[number]))
        return self._ids[part], np.where(self._is_learned[part], self._ids[part], NO_LABEL)


def collate(rows: Sequence[Batch]) -> Batch:
    """Rows of equal lengths [T] as a batch [B, T], without the padding that all of them end with."""
    documents_BT = torch.stack([row["document_ids"] for row in rows])
    used = int((documents_BT != PADDING).any(dim=0).sum())  # padding is at the end only
    ids_BT = torch.stack([row["input_ids"] for row in rows])[:, :used]
    labels_BT = torch.stack([row["labels"] for row in rows])[:, :used]
    if not documents_BT[:, :used].any():  # document 0 only: no other, and no padding
        return Batch(input_ids=ids_BT, labels=labels_BT)
    return Batch(
        input_ids=ids_BT,
        labels=labels_BT,
        position_ids=torch.stack([row["position_ids"] for row in rows])[:, :used],
        document_ids=documents_BT[:, :used],
    )
