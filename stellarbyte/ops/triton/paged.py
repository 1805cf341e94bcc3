"""Arguments of paged attention, and the place of a token in the cache."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# T tokens, N sequences, E entries of a block table, O distances, D head dim

UNLIMITED = 2**30  # a window larger than any distance


class Rotations(NamedTuple):
    """cos and sin of distance · θ_j for distances 0..O-1, float32 [O, D/2]; log ζ_j / b, float32 [D/2], None: RoPE.

    The gain is a factor of the pairs of queries, float32 [D/2]; None: 1.
    """

    cos_OD: torch.Tensor
    sin_OD: torch.Tensor
    log_decay_D: torch.Tensor | None
    query_gain_D: torch.Tensor | None


class HeadShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int  # even


class PagedRows(NamedTuple):
    """The tokens of a step, all int32 on the device.

    A block table begins with the sequence's ceil(sinks / block size) sink blocks. Its other entries, at least one,
    are a ring: of the blocks after the sinks, number b is at b % (length of the ring), so that a table changes only
    when a block is added. Entries of blocks that no query of the step sees are arbitrary.
    """

    positions_T: torch.Tensor  # in the token's own sequence
    sequences_T: torch.Tensor  # the token's row of tables_NE
    tables_NE: torch.Tensor  # block ids; rows may have any stride, entries are contiguous


def ring_length(rows: PagedRows, block_size: int, sink_tokens: int) -> int:
    return rows.tables_NE.shape[1] - -(-sink_tokens // block_size)


@triton.jit
def table_entry(number, is_sink, ring, SINKS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Index of a block in its table; sink blocks and later blocks are both numbered from 0."""
    return tl.where(is_sink, number, (SINKS + BLOCK_SIZE - 1) // BLOCK_SIZE + number % ring)


@triton.jit
def locate(position, table, ring, SINKS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The block (int64) of a token, and the token's offset in it."""
    is_sink = position < SINKS
    along = tl.where(is_sink, position, position - SINKS)
    entry = table_entry(along // BLOCK_SIZE, is_sink, ring, SINKS, BLOCK_SIZE)
    return tl.load(table + entry).to(tl.int64), along % BLOCK_SIZE
