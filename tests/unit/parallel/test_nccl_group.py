"""Which sums of ranks on GPUs go where; the sums themselves need several GPUs (tests/gpu/test_ranks.py)."""

import pytest

from stellarbyte.parallel.nccl_group import ONE_SHOT_BYTES, SYMMETRIC_BYTES, path_of


@pytest.mark.parametrize("ranks", range(2, 9))
def test_two_shots_are_for_numbers_of_ranks_that_torch_has_a_kernel_for(ranks: int) -> None:
    unit = 16 * ranks
    small, large = ONE_SHOT_BYTES // unit * unit, SYMMETRIC_BYTES // unit * unit
    assert path_of(unit, ranks) == path_of(small, ranks) == "one shot"
    expected = "two shots" if ranks in (2, 4, 8) else "nccl"
    assert path_of(small + unit, ranks) == path_of(large, ranks) == expected
    assert path_of(large + unit, ranks) == "nccl"
    assert path_of(unit - 8, ranks) == path_of(small + unit + 8, ranks) == "nccl"  # parts would not be aligned
