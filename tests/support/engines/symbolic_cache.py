"""A runner without a model, whose cache holds names instead of numbers: it sees when a block holds something else."""

from typing import Protocol

from stellarbyte_server.engine.state.block_pool import CacheLayout
from stellarbyte_server.engine.state.sequence import Chunk
from stellarbyte_server.protocol.request import GenerationRequest


class Slots(Protocol):
    """Where names are written, by block and offset."""

    def __setitem__(self, slot: tuple[int, int], name: int, /) -> None: ...

    def __getitem__(self, slot: tuple[int, int], /) -> int: ...


NUM_TOKENS = 3  # token ids it samples: few, so that sequences meet again


def names(salt: str, tokens: list[int]) -> list[int]:
    """One name a position, for the salt and all tokens up to there: what a model's keys there depend on."""
    found, last = [], hash(salt)
    for token in tokens:
        last = hash((last, token))
        found.append(last)
    return found


def next_token(salt: str, tokens: list[int]) -> int:
    return names(salt, tokens)[-1] % NUM_TOKENS


def continuation(request: GenerationRequest) -> list[int]:
    """The tokens the request must get."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.sampling.max_tokens):
        tokens.append(next_token(request.cache_salt, tokens))
    return tokens[len(request.prompt_token_ids) :]


class SymbolicRunner:
    """Checks for every chunk that all keys its queries see are in their places, and are those of this sequence."""

    def __init__(self, layout: CacheLayout, slots: Slots | None = None) -> None:
        self._layout = layout
        self._slots: Slots = {} if slots is None else slots  # (block, offset) → name
        self.num_computed = 0

    def run(self, chunks: list[Chunk]) -> list[list[int]]:
        """The tokens of each chunk."""
        written: set[tuple[int, int]] = set()
        for chunk in chunks:
            sequence = chunk.sequence
            expected = names(sequence.request.cache_salt, sequence.tokens.tolist())
            for position in range(chunk.start, chunk.start + chunk.length):
                slot = sequence.table.locate(position)
                assert slot not in written, "two tokens of a step in one slot"
                written.add(slot)
                self._slots[slot] = expected[position]
            self.num_computed += chunk.length
        for chunk in chunks:
            self._check(chunk)
        return [
            [next_token(chunk.sequence.request.cache_salt, chunk.sequence.tokens.tolist())] if chunk.samples else []
            for chunk in chunks
        ]

    def _check(self, chunk: Chunk) -> None:
        table, layout = chunk.sequence.table, self._layout
        expected = names(chunk.sequence.request.cache_salt, chunk.sequence.tokens.tolist())
        bases = dict(table.entries())
        assert len(bases) == len(table.entries()), "one block twice in a table"
        stop = chunk.start + chunk.length
        oldest = 0 if layout.window is None else max(0, chunk.start - layout.window + 1)
        for position in {*range(min(layout.sink_tokens, stop)), *range(oldest, stop)}:
            block, offset = table.locate(position)
            assert bases[block] + offset == position
            assert self._slots[block, offset] == expected[position]
