"""Chats in JSON files as rows of tokens for supervised fine-tuning.

An object has `messages`, and `tools` if the chat template shows them.
"""

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from stellarbyte.lora.invocation import activated
from stellarbyte.train.config.sources import Source
from stellarbyte.train.data.chat_labels import ChatLabels
from stellarbyte.train.data.files import files_of
from stellarbyte.train.data.packing import PackedDocuments
from stellarbyte.train.data.prepare import split_of
from stellarbyte.train.data.shards import SPLITS, Split, sha256_of
from stellarbyte.train.data.sources import DocumentReader
from stellarbyte.train.errors import TrainError


class Chats(NamedTuple):
    """Attributes: ids: of all chats, one after the other; is_learned: has their form; ends: of the chats."""

    ids: np.ndarray
    is_learned: np.ndarray
    ends: np.ndarray

    @property
    def fingerprint(self) -> str:
        return sha256_of(each.tobytes() for each in self)

    def rows(self, tokenizer: PreTrainedTokenizerFast, *, length: int, packing: bool) -> PackedDocuments:
        """Rows of `length` tokens, at least as many as the longest chat has."""
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return PackedDocuments(*self, length=length, padding_id=padding, packing=packing)


def read_chats(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    held_out: float = 0.0,
    invocation: tuple[int, ...] | None = None,
) -> dict[Split, Chats]:
    """The chats of JSON or JSONL files, cut after `max_length` tokens; 5 bytes of memory for each token.

    With an `invocation`, each must contain it, and only tokens after its last occurrence are learned.

    Raises TrainError: there is no chat template, or a line cannot be used, or nothing of its answers is left.
    """
    if tokenizer.chat_template is None:
        raise TrainError("The tokenizer has no chat template; its folder needs a chat_template.jinja.")
    labels = ChatLabels(tokenizer)
    made = {split: (array("i"), array("b"), array("q")) for split in SPLITS}
    for file in files_of([Source(files=[str(path) for path in files])]):
        if file.format not in ("json", "jsonl"):
            raise TrainError(f"{file.path} must be a .json or .jsonl file.")
        with DocumentReader(file) as reader:
            for record, place in reader.objects():
                try:
                    ids, is_learned = labels.of(_messages(record), record.get("tools"))
                    ids, is_learned = ids[:max_length], is_learned[:max_length]
                    if not is_learned[1:].any():
                        raise ValueError(f"no answer token is left of {max_length}")
                    if invocation is not None:
                        is_learned = is_learned & _follows(ids, invocation)
                        if not is_learned.any():
                            raise ValueError("has no answer after the last lora.invocation")
                except ValueError as error:
                    raise TrainError(f"{place}: {error}.") from error
                stored = np.array(ids, np.int32)
                all_ids, all_learned, ends = made[split_of(hashlib.sha256(stored.tobytes()).digest(), held_out)]
                all_ids.frombytes(stored.tobytes())
                all_learned.frombytes(is_learned.astype(np.int8).tobytes())
                ends.append(len(all_ids))
    return {split: _chats(*arrays) for split, arrays in made.items()}


def _follows(ids: Sequence[int], invocation: tuple[int, ...]) -> np.ndarray:
    """Whether each token is predicted from one that has the activated adapter. ValueError with the end of a sentence:
    none has it."""
    is_activated = activated(torch.tensor([ids]), invocation)[0].numpy()
    if not is_activated.any():
        raise ValueError(f"does not contain the tokens {list(invocation)} of lora.invocation")
    return np.concatenate([[False], is_activated[:-1]])


def _chats(ids: "array[int]", is_learned: "array[int]", ends: "array[int]") -> Chats:
    return Chats(np.array(ids, np.int32), np.array(is_learned, bool), np.array(ends, np.int64))


def _messages(record: Any) -> list[dict[str, Any]]:
    messages = record.get("messages") if isinstance(record, dict) else None
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
    ):
        raise ValueError('needs "messages": a list of objects with a role and content')
    return messages
