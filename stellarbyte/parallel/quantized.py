"""Quantized matrices cut alike: the piece of a rank, as a checkpoint keeps it."""

from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.ops.triton.grouped.weights import takes
from stellarbyte.parallel.shares import Index, UndividedError


def cut_matrix(name: str, matrix: QuantizedMatrix, index: Index, ranks: int) -> QuantizedMatrix:
    """A rank's piece of a matrix, or of a stack of them; groups that are cut become smaller ones.

    Raises:
        UndividedError: the GPU kernels take the groups of the matrix, but not those of its piece.
    """
    full = [*index, *[slice(None)] * (matrix.codes.dim() - len(index))]
    part = matrix[full[0]]
    assert all(one == slice(None) for one in full[1:-1]), "rows of a stack's matrices are not cut"
    start, stop, _ = full[-1].indices(matrix.num_columns)
    if (start, stop) == (0, matrix.num_columns):
        return part
    is_whole = matrix.kind != "int4" or not (start % 2 or stop % 2)  # bytes
    part = part.columns(start, stop) if is_whole else part
    if not is_whole or (takes(matrix) and not takes(part)):
        raise UndividedError(
            f"{ranks} ranks cannot divide {name}, of which one would have the inputs {start} to {stop}: groups of"
            f" {matrix.group_size} in {matrix.kind} are cut at multiples of 32 only"
        )
    return part
