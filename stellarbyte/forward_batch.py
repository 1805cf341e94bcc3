"""One serving step as the model sees it: tokens of many sequences in a flat row."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# T tokens of this step, N sequences, M blocks of the longest table, R rows that sample


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """T tokens of N sequences, one sequence after the other, positions rising within each.

    A sequence's block table lists its sink blocks first, then its other live blocks in order. Positions may be any
    size; only distances enter the arithmetic.
    """

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, in the token's own sequence
    slots_T: torch.Tensor  # int64, block · block_size + offset: where the token's key and value are written
    offsets_T: torch.Tensor  # int64, position - base of its block
    query_starts: tuple[int, ...]  # N + 1: tokens of sequence i are query_starts[i]:query_starts[i + 1]
    block_tables_NM: torch.Tensor  # int64, block ids
    block_bases_NM: torch.Tensor  # int64, position of each block's first token
    num_blocks: tuple[int, ...]  # N: valid entries of each table
    num_sink_blocks: tuple[int, ...]  # N: sink blocks at the front of each table
    reach: int  # largest distance between a query and a block's base, in tokens
    logits_rows: torch.Tensor  # int64 [R], tokens that need logits
    adapter_slots: tuple[int, ...] = ()  # N: slots of the bank, 0: no adapter; (): no sequence has one
    adapter_scales: tuple[float, ...] = ()  # N: factors on top of the adapter's own alpha / r
    num_plain: tuple[int, ...] = ()  # N: tokens at a sequence's start of this step without its adapter; (): none

    def adapted(self) -> Iterator[tuple[slice, int, float]]:
        """The tokens of each sequence that have its adapter, with its slot and scale."""
        for i, slot in enumerate(self.adapter_slots):
            if slot:
                start = self.query_starts[i] + (self.num_plain[i] if self.num_plain else 0)
                yield slice(start, self.query_starts[i + 1]), slot, self.adapter_scales[i]
