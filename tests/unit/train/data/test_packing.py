"""Packing: every document is in one row, as dense as best fit makes it, and means the same as alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellarbyte.train.data.packing import NO_LABEL, PADDING, PackedDocuments, best_fit, collate, packed_row
from tests.support.models.byte_transformer import VARIANTS, make_model, random_tokens

CAPACITIES = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))
)


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Rooms that are left, by the definition: the longest document first, into the fullest row that takes it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


@settings(max_examples=60)
@given(CAPACITIES)
def test_rows_are_those_of_best_fit(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = best_fit(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[number] for number in row) for row in rows]
    assert sorted(rooms) == slow_best_fit(lengths, capacity)
    assert all(room >= 0 for room in rooms)


def dataset(lengths: list[int], capacity: int, *, packing: bool) -> PackedDocuments:
    rng = np.random.default_rng(0)
    ends = np.cumsum(lengths, dtype=np.int64)
    ids = rng.integers(5, 1000, ends[-1]).astype(np.int32)
    return PackedDocuments(ids, rng.random(ends[-1]) < 0.5, ends, length=capacity, padding_id=3, packing=packing)


@settings(max_examples=40)
@given(CAPACITIES.filter(lambda case: len(case[1]) > 0))
def test_packed_documents_are_those_of_rows_of_their_own(case: tuple[int, list[int]]) -> None:
    """The predictions of a row are its pairs (what is read up to t, label at t + 1) within each document."""
    capacity, lengths = case

    def predictions(rows: PackedDocuments) -> list[tuple[tuple[int, ...], list[int], int]]:
        found = []
        for number in range(len(rows)):
            row = {name: tensor.tolist() for name, tensor in rows[number].items()}
            for at in range(1, capacity):
                if row["labels"][at] != NO_LABEL:
                    seen = [i for i in range(at) if row["document_ids"][i] == row["document_ids"][at - 1]]
                    assert row["document_ids"][at] == row["document_ids"][at - 1]
                    positions = [row["position_ids"][i] for i in seen]
                    found.append((tuple(row["input_ids"][i] for i in seen), positions, row["labels"][at]))
        return sorted(found)

    packed, alone = (dataset(lengths, capacity, packing=packing) for packing in (True, False))
    assert len(packed) <= len(alone) == len(lengths)
    assert predictions(packed) == predictions(alone)


def test_learned_tokens_are_the_labels() -> None:
    ids = np.arange(10, 20, dtype=np.int32)
    is_learned = np.array([0, 0, 1, 1, 1, 1, 0, 1, 1, 1], bool)  # documents of 4 and 6 tokens
    rows = PackedDocuments(ids, is_learned, np.array([4, 10]), length=12, padding_id=3, packing=True)
    (row,) = (rows[number] for number in range(len(rows)))
    assert row["input_ids"].tolist() == [14, 15, 16, 17, 18, 19, 10, 11, 12, 13, 3, 3]
    x = NO_LABEL
    assert row["labels"].tolist() == [x, 15, x, 17, 18, 19, x, x, 12, 13, x, x]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 0]
    assert row["document_ids"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, PADDING, PADDING]


def test_batches_leave_out_padding_that_all_rows_have() -> None:
    documents = [np.arange(length) for length in (3, 5, 2)]
    rows = [packed_row([(document, document)], 8, 9) for document in documents]
    batch = collate(rows)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (3, 5))
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert torch.equal(batch[name], torch.stack([row[name] for row in rows])[:, :5])
    assert batch["document_ids"].dtype == torch.int32


@pytest.mark.parametrize("variant", ["llama", "xpos window sinks"])
def test_rows_of_one_document_need_ids_and_labels_only(variant: str) -> None:
    documents = [np.array(random_tokens(20, seed=seed)) for seed in range(3)]
    rows = [packed_row([(document, document)], 20, 0) for document in documents]
    batch = collate(rows)
    assert set(batch) == {"input_ids", "labels"}
    found = []
    for inputs in (batch, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}):
        model = make_model(**VARIANTS[variant])
        loss = model(**inputs).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert len(found[0]) > 20
    torch.testing.assert_close(found[0], found[1])
