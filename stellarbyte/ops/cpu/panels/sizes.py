"""The sizes of panels, of the groups of columns that share a scale, and of tiles of tokens."""

from numba import njit

from stellarbyte.ops.cpu.instructions import LANES, host_has

PANEL_ROWS = LANES
INT8_GROUP = 64  # and of fp8
INT4_GROUP = 32

# How many tokens may share a vector of weights while it is in a register. AVX2 has 16 registers of half a vector, of
# which 12 hold the sums of 6 tokens. AVX-512 has 32 of a whole one: 24 for float32 sums of 12 tokens with two panels at
# a time, which need half as many loads as those of 24 tokens with one, or for two kinds of sums of 12 tokens.
HAS_LARGE_TILES = host_has("avx512f")
TILE_SIZES = (12, 8, 6, 5, 4, 3, 2, 1) if HAS_LARGE_TILES else (6, 5, 4, 3, 2, 1)
LARGEST_TILE = TILE_SIZES[0]

LINES_AHEAD = 64  # of memory: panels follow each other, and processors' own prefetching falls behind many tokens' sums


@njit(inline="always")
def tile_size(num_tokens):
    """Of so many tokens, how many the next tile takes."""
    for size in TILE_SIZES:
        if size <= num_tokens:
            return size
    return 0
