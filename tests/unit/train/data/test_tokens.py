"""Rows of token shards: every token is in one row, documents are apart, and copies in other processes are small."""

import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stellarbyte.train.config.prepare import Prepare
from stellarbyte.train.config.sources import Source
from stellarbyte.train.data.packing import NO_LABEL, PADDING, Batch, collate
from stellarbyte.train.data.prepare import prepare
from stellarbyte.train.data.tokens import Layout, TokenSequences
from stellarbyte.train.errors import TrainError
from stellarbyte.train.rows import ShuffledStream
from tests.support.training.byte_tokenizer import PAD_ID, document_ids_of, save_byte_tokenizer

LAYOUTS: tuple[Layout, ...] = ("cut", "whole", "single")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def shards_of(texts: list[str], folder: Path, tokenizer: Path, shard_tokens: int = 40) -> Path:
    (folder / "a.txt").write_text("|".join(texts))
    sources = [Source(files=[str(folder / "a.txt")], separator="|")]
    prepare(Prepare(output=folder / "out", tokenizer=tokenizer, sources=sources, shard_tokens=shard_tokens))
    return folder / "out"


def expected_rows(documents: list[list[int]], length: int, layout: Layout) -> list[list[list[int]]]:
    """Rows of parts of documents, by the rules, one document after the other."""
    rows: list[list[list[int]]] = [[]]
    for document in documents:
        rest = document
        used = sum(map(len, rows[-1]))
        if layout == "single" or (layout == "whole" and used and used + len(document) > length):
            rows.append([])
        while rest:
            room = length - sum(map(len, rows[-1]))
            if room == 0:
                rows.append([])
                continue
            rows[-1].append(rest[:room])
            rest = rest[room:]
    return [row for row in rows if row]


def check_row(row: Batch, parts: list[list[int]], length: int) -> None:
    ids, labels, positions, numbers = [], [], [], []
    for number, part in enumerate(parts):
        ids += part
        labels += [NO_LABEL, *part[1:]]
        positions += range(len(part))
        numbers += [number] * len(part)
    rest = length - len(ids)
    assert row["input_ids"].tolist() == ids + [PAD_ID] * rest
    assert row["labels"].tolist() == labels + [NO_LABEL] * rest
    assert row["position_ids"].tolist() == positions + [0] * rest
    assert row["document_ids"].tolist() == numbers + [PADDING] * rest
    assert [row[name].dtype for name in ("input_ids", "labels", "position_ids")] == [torch.int64] * 3
    assert row["document_ids"].dtype == torch.int32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_the_rules(layout: Layout, tokenizer: Path) -> None:
    @settings(max_examples=25)
    @given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(2, 40), st.integers(1, 90))
    def check(lengths: list[int], sequence: int, shard_tokens: int) -> None:
        texts = ["abcdefghij"[number % 10] * length for number, length in enumerate(lengths)]
        with tempfile.TemporaryDirectory() as folder:
            shards = shards_of(texts, Path(folder), tokenizer, shard_tokens)
            sequences = TokenSequences(shards, "train", sequence, layout)
            rows = expected_rows([document_ids_of(text) for text in texts], sequence, layout)
            assert len(sequences) == len(rows)
            for row, parts in zip(sequences, rows, strict=True):
                check_row(row, parts, sequence)

    check()


@pytest.fixture(scope="module")
def many(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"{number:06} " * (number % 9 + 1) for number in range(2000)]
    return shards_of(texts, tmp_path_factory.mktemp("many"), tokenizer, 20_000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_document_comes_back_once_an_epoch(layout: Layout, many: Path) -> None:
    sequences = TokenSequences(many, "train", 64, layout)
    num_rows = len(sequences)
    order = list(ShuffledStream(num_rows, 2 * num_rows, seed=7))
    orders = [order[:num_rows], order[num_rows:]]
    for epoch in orders:
        loader = DataLoader(sequences, batch_size=16, sampler=epoch, collate_fn=collate)
        ids = torch.cat([batch["input_ids"][batch["document_ids"] != PADDING] for batch in loader])
        assert len(ids) == sequences.num_tokens
        assert torch.equal(ids.bincount(), torch.tensor(every_token(many)).bincount())
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(num_rows))


def every_token(shards: Path) -> list[int]:
    sequences = TokenSequences(shards, "train", 1 << 20, "cut")
    return sequences[0]["input_ids"][: sequences.num_tokens].tolist()


def test_copies_are_small_and_workers_read_the_same_rows(many: Path) -> None:
    sequences = TokenSequences(many, "train", 64, "whole")
    assert len(sequences) > 500  # it has mapped its files
    assert len(pickle.dumps(sequences)) < 4096
    alone, with_workers = (
        list(
            DataLoader(sequences, batch_size=32, collate_fn=collate, num_workers=workers, multiprocessing_context=kind)
        )
        for workers, kind in ((0, None), (2, "spawn"))
    )
    assert len(alone) == len(with_workers)
    for one, other in zip(alone, with_workers, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_has_no_rows_is_refused(many: Path) -> None:
    with pytest.raises(TrainError, match="has no documents in held_out; prepare it with held_out above 0"):
        TokenSequences(many, "held_out", 64)
    with pytest.raises(TrainError, match=r"sequence \(1\) must be at least 2"):
        TokenSequences(many, "train", 1)
    sequences = TokenSequences(many, "train", 64)
    with pytest.raises(IndexError):
        sequences[len(sequences)]
