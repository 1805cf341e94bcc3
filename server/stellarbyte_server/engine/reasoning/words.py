"""Sets of tokens as words of a mask: bit v % 32 of the uint32 word v // 32 is token v."""

import functools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from stellarbyte_server.tokens.token_bytes import TokenBytes

Words = NDArray[np.uint32]


def allow_all(out: Words, vocab_size: int) -> None:
    out[:] = np.uint32(0xFFFFFFFF)
    if vocab_size % 32:
        out[-1] = np.uint32((1 << vocab_size % 32) - 1)


def allow_only(out: Words, token_ids: Iterable[int]) -> None:
    out[:] = 0
    allow(out, token_ids)


def allow(out: Words, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        out[token_id // 32] |= np.uint32(1 << token_id % 32)


def forbid(out: Words, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        out[token_id // 32] &= ~np.uint32(1 << token_id % 32)


@functools.lru_cache(maxsize=64)
def going_past(token_bytes: TokenBytes, mark: bytes, num_matched: int, vocab_size: int) -> frozenset[int]:
    """The tokens with text after the mark that they complete, where so many of its bytes were matched."""
    rest = mark[num_matched:]
    return frozenset(
        token_id
        for token_id, data in token_bytes.with_special().items()
        if token_id < vocab_size and ((data.startswith(rest) and len(data) > len(rest)) or mark in data[:-1])
    )
