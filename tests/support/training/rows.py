"""Small data for training runs: token shards of random documents, and rows in memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch.utils.data import Dataset

from stellarbyte.train.data.packing import Batch, collate, packed_row
from stellarbyte.train.rows import RunData
from tests.support.models.byte_transformer import VOCABULARY, random_tokens


class Rows(Dataset[Batch]):
    """Rows of `sequence` tokens, each of documents of random tokens."""

    def __init__(self, documents: list[list[list[int]]], sequence: int) -> None:
        self.documents = documents
        self.sequence = sequence

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, row: int) -> Batch:
        arrays = [np.array(document) for document in self.documents[row]]
        return packed_row([(array, array) for array in arrays], self.sequence, 0)


def random_rows(num_rows: int, sequence: int, seed: int = 0) -> Rows:
    """Rows of two documents and padding, of different lengths."""
    rows = []
    for number in range(num_rows):
        first = 3 + (number * 5 + seed) % (sequence - 8)
        second = 2 + (number * 3) % (sequence - first - 2)
        lengths = (first, second)
        rows.append([random_tokens(length, seed=seed * 1000 + 2 * number + i) for i, length in enumerate(lengths)])
    return Rows(rows, sequence)


def byte_tokenizer(folder: Path, vocab_size: int = VOCABULARY) -> Path:
    """A tokenizer of single characters with an end and a padding token, in transformers' files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["<pad>", "<eos>", *(chr(33 + number) for number in range(vocab_size - 2))]
    Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="!")).save(
        str(folder / "tokenizer.json")
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def run_data(folder: Path, *, num_rows: int = 40, sequence: int = 24, held_out: int = 0, **changes: Any) -> RunData:
    """Rows in memory with a tokenizer in `folder`."""
    fields: dict[str, Any] = {
        "train": random_rows(num_rows, sequence),
        "held_out": random_rows(held_out, sequence, seed=1) if held_out else None,
        "collate": collate,
        "fingerprint": "f" * 64,
        "licenses": ("MIT",),
        "bytes_per_token": 2.0 if held_out else None,
        "tokenizer": byte_tokenizer(folder / "tokenizer"),
        "vocab_size": VOCABULARY,
        "special_ids": {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1},
    }
    return RunData(**(fields | changes))


def hash_of(tensors: dict[str, torch.Tensor]) -> str:
    """Of names and bits."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
