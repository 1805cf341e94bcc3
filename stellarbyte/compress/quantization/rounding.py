"""One matrix, rounded by a method, and how much that changes its products."""

from dataclasses import dataclass

import torch

from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.quantization.gptq import Rounded, gptq
from stellarbyte.compress.quantization.grid import Grid, Levels
from stellarbyte.compress.quantization.settings import Quantization
from stellarbyte.compress.quantization.statistics import InputStatistics, product_errors

# N outputs, K inputs, G groups


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """Attributes: name: of a matrix, or of those that read one input; method: which was used; num_rows: inputs seen;
    error: ‖(W - Ŵ) X‖² as a share of ‖W X‖²; error_of_rounding: that of the nearest numbers, with the same factors
    folded in. Both None without inputs."""

    name: str
    method: str
    num_rows: int
    error: float | None
    error_of_rounding: float | None


@dataclass(frozen=True, kw_only=True)
class RoundedMatrix:
    """Attributes: numbers_NK: float32, those of `stored`."""

    stored: QuantizedMatrix
    numbers_NK: torch.Tensor
    report: MatrixReport

    def rows(self, rows: slice) -> "QuantizedMatrix":
        """Some of the outputs."""
        kept = self.stored
        zeros = None if kept.zeros is None else kept.zeros[rows]
        return QuantizedMatrix(kind=kept.kind, codes=kept.codes[rows], scales=kept.scales[rows], zeros=zeros)


def round_matrix(
    name: str, weight_NK: torch.Tensor, inputs: InputStatistics | None, grid: Grid, settings: Quantization
) -> RoundedMatrix:
    """Round one matrix.

    With GPTQ, an output takes the nearest numbers where these change its product less: an error is never larger than
    that of rounding. Without inputs, matrices are rounded.

    Raises:
        CompressError: the message names the matrix.
    """
    grid.check(name, weight_NK.shape[1])
    weight_NK = weight_NK.float()
    levels = grid.fit(weight_NK)
    nearest = chosen = Rounded(grid.codes(weight_NK, levels), levels)
    if inputs is None or settings.method in ("round", "smoothquant"):
        method = "round" if inputs is None else settings.method
    elif settings.method == "awq":
        method, levels = "awq", grid.fit_clipped(weight_NK, inputs.gram_KK)
        chosen = _better_rows(weight_NK, nearest, Rounded(grid.codes(weight_NK, levels), levels), inputs, grid)
    else:
        method = "gptq"
        try:
            found = gptq(weight_NK, inputs.gram_KK, grid, keeps_zeros=settings.keeps_zeros)
        except CompressError as failure:
            raise CompressError(f"{name}: {failure}") from failure
        chosen = _better_rows(weight_NK, nearest, found, inputs, grid)
    numbers_NK = grid.numbers(*chosen)
    error = error_of_rounding = None
    if inputs is not None:
        whole = float(product_errors(weight_NK, inputs.gram_KK).sum()) or 1.0
        error = float(product_errors(weight_NK - numbers_NK, inputs.gram_KK).sum()) / whole
        rounded_NK = grid.numbers(*nearest)
        error_of_rounding = float(product_errors(weight_NK - rounded_NK, inputs.gram_KK).sum()) / whole
    report = MatrixReport(
        name=name,
        method=method,
        num_rows=0 if inputs is None else inputs.num_rows,
        error=error,
        error_of_rounding=error_of_rounding,
    )
    return RoundedMatrix(stored=grid.stored(*chosen), numbers_NK=numbers_NK, report=report)


def _better_rows(
    weight_NK: torch.Tensor, first: Rounded, second: Rounded, inputs: InputStatistics, grid: Grid
) -> Rounded:
    """Each output from the one of two that changes its product less."""
    errors = [product_errors(weight_NK - grid.numbers(*each), inputs.gram_KK) for each in (first, second)]
    takes_first_N1 = (errors[0] < errors[1])[:, None]
    pairs = zip((first.codes, *first.levels), (second.codes, *second.levels), strict=True)
    codes, scales, zeros = (torch.where(takes_first_N1, one, other) for one, other in pairs)
    return Rounded(codes, Levels(scales, zeros))
