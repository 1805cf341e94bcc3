"""Token shards on disk: a folder of files of token ids and document ends, and its index.json.

train-00000.tokens   ids, little-endian uint16, or uint32 for vocabularies above 65,536
train-00000.ends     for each document the number of the shard's tokens up to its end, little-endian int64
held_out-00000.…     the same of the held-out documents
tokenizer/           the tokenizer that made the ids
index.json           written last: a folder without it is not complete
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stellarbyte.train.config.yaml_file import Section
from stellarbyte.train.errors import TrainError

INDEX = "index.json"
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
ENDS_DTYPE = np.dtype("<i8")


class Shard(Section):
    documents: int
    tokens: int


class SplitIndex(Section):
    """Attributes: text_bytes: of the documents in UTF-8, without special tokens; for bits per byte."""

    documents: int
    tokens: int
    text_bytes: int
    shards: list[Shard]


class SourceRecord(Section):
    kind: str
    license: str
    files: int
    documents: int
    text_bytes: int


class ShardIndex(Section):
    """The index of a folder of shards.

    Attributes:
        fingerprint: SHA-256 of the tokenizer, the documents in their order, and what decides where they are written.
            Equal fingerprints mean equal tokens.
        settings_sha256: of what `prepare` was told, and of the names of the files.
    """

    format: Literal[1]
    fingerprint: str
    settings_sha256: str
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None
    tokenizer_sha256: str
    held_out: float
    sources: list[SourceRecord]
    splits: dict[Split, SplitIndex]

    @property
    def token_dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.dtype == "uint16" else "<u4")


def tokens_file(folder: Path, split: Split, number: int) -> Path:
    return folder / f"{split}-{number:05}.tokens"


def ends_file(folder: Path, split: Split, number: int) -> Path:
    return folder / f"{split}-{number:05}.ends"


def read_index(folder: Path) -> ShardIndex:
    """The index of a complete folder, whose files have the sizes that it says. TrainError otherwise."""
    try:
        index = ShardIndex.model_validate_json((folder / INDEX).read_bytes())
    except OSError as error:
        raise TrainError(f"{folder} has no {INDEX}; make it with stellarbyte train prepare.") from error
    except ValueError as error:
        raise TrainError(f"{folder / INDEX} was not written by this version of stellarbyte train prepare.") from error
    for split, content in index.splits.items():
        for number, shard in enumerate(content.shards):
            for file, size in (
                (tokens_file(folder, split, number), shard.tokens * index.token_dtype.itemsize),
                (ends_file(folder, split, number), shard.documents * ENDS_DTYPE.itemsize),
            ):
                if not file.is_file() or file.stat().st_size != size:
                    raise TrainError(f"{file} must have {size:,} bytes, as {INDEX} says; prepare the folder again.")
    return index


def write_json(file: Path, content: Any) -> None:
    """Write a file whole or not at all, also if the machine stops."""
    partial = partial_of(file)
    with partial.open("w", encoding="utf-8") as opened:
        json.dump(content, opened, ensure_ascii=False, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(file)


def partial_of(file: Path) -> Path:
    """Where `write_json` writes until it renames."""
    return file.with_name(f".{file.name}.partial")


def sha256_of(parts: Iterable[bytes]) -> str:
    """Of the parts with their lengths, so that no other parts have the same."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
