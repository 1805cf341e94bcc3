"""Singular values of weight matrices.

Matrices with a smaller side up to EXACT_SIDE: all singular values, as square roots of the eigenvalues of the smaller
Gram matrix, which is summed in float64 from chunks of rows; those below 1e-8 of the largest are rounding. Larger ones:
the first RANDOMIZED_VALUES, by the randomized range finder with power iterations (Halko, Martinsson & Tropp 2011,
algorithms 4.4 and 5.1). Neither holds the matrix in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from stellarbyte.analysis.parameters import Parameter

EXACT_SIDE = 2048
RANDOMIZED_VALUES = 64
EXPERTS_PER_STACK = 4  # evenly spaced ones
CURVE_POINTS = 64
_OVERSAMPLING, _POWER_ITERATIONS = 16, 6
_CHUNK_NUMBERS = 1 << 22

# O rows, I columns, N the smaller of both, R vectors of the range finder


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values σ of one matrix, the largest first.

    Attributes:
        expert: number in its stack; None: no stack.
        num_values: of the matrix: its smaller side.
        stable_rank: ‖W‖_F² / σ_0² (Rudelson & Vershynin 2007); 0 of a zero matrix.
        effective_rank: exp of the entropy of σ / Σσ (Roy & Vetterli 2007); None: not all values are known.
        curve: (index, σ) at up to CURVE_POINTS evenly spaced indices of the known values.
    """

    name: str
    layer: int | None
    part: str
    expert: int | None
    method: Literal["exact", "randomized"]
    num_values: int
    largest: float
    stable_rank: float
    effective_rank: float | None
    curve: tuple[tuple[int, float], ...]


def spectra(parameter: Parameter, tensor: torch.Tensor, *, exact_side: int = EXACT_SIDE) -> Iterator[Spectrum]:
    """Of a matrix [O, I], or of evenly spaced ones of a stack [E, O, I]; nothing of vectors."""
    if not parameter.is_matrix:
        return
    experts: Sequence[int | None] = [None] if tensor.dim() == 2 else evenly_spaced(len(tensor), EXPERTS_PER_STACK)
    for expert in experts:
        matrix_OI = tensor if expert is None else tensor[expert]
        is_exact = min(matrix_OI.shape) <= exact_side
        values_N = singular_values(matrix_OI) if is_exact else first_singular_values(matrix_OI, RANDOMIZED_VALUES)
        squares = float(values_N.square().sum()) if is_exact else _squares(matrix_OI)
        largest = float(values_N[0])
        kept = evenly_spaced(len(values_N), CURVE_POINTS)
        yield Spectrum(
            name=parameter.name,
            layer=parameter.layer,
            part=parameter.part,
            expert=expert,
            method="exact" if is_exact else "randomized",
            num_values=min(matrix_OI.shape),
            largest=largest,
            stable_rank=squares / largest**2 if largest > 0 else 0.0,
            effective_rank=effective_rank(values_N) if is_exact else None,
            curve=tuple((index, float(values_N[index])) for index in kept),
        )


def singular_values(matrix_OI: torch.Tensor) -> torch.Tensor:
    """[N] float64, all of them, the largest first."""
    wide_NI = matrix_OI if matrix_OI.shape[0] <= matrix_OI.shape[1] else matrix_OI.T
    gram_NN = torch.zeros(wide_NI.shape[0], wide_NI.shape[0], dtype=torch.float64)
    for chunk_NI in wide_NI.split(max(1, _CHUNK_NUMBERS // wide_NI.shape[0]), dim=1):
        chunk_NI = chunk_NI.double()
        gram_NN.addmm_(chunk_NI, chunk_NI.T)
    return torch.linalg.eigvalsh(gram_NN).clamp_(min=0).sqrt_().flip(0)


def first_singular_values(matrix_OI: torch.Tensor, count: int) -> torch.Tensor:
    """[count] float64, approximately: never above the true ones."""
    numbers = torch.Generator().manual_seed(0)
    width = min(count + _OVERSAMPLING, *matrix_OI.shape)
    test_IR = torch.randn(matrix_OI.shape[1], width, generator=numbers, dtype=torch.float64)
    range_OR = torch.linalg.qr(_product(matrix_OI, test_IR)).Q
    for _ in range(_POWER_ITERATIONS):
        range_IR = torch.linalg.qr(_product(matrix_OI.T, range_OR)).Q
        range_OR = torch.linalg.qr(_product(matrix_OI, range_IR)).Q
    return torch.linalg.svdvals(_product(matrix_OI.T, range_OR))[:count]


def effective_rank(values_N: torch.Tensor) -> float:
    """exp(-Σ p log p) of p = σ / Σσ; 0 if all are 0."""
    if not values_N.any():
        return 0.0
    shares_N = values_N / values_N.sum()
    return float(torch.special.entr(shares_N).sum().exp())


def evenly_spaced(length: int, count: int) -> list[int]:
    """Up to `count` of the indices 0 to length - 1, the first and the last among them."""
    if length <= count:
        return list(range(length))
    return [0] if count == 1 else [round(i * (length - 1) / (count - 1)) for i in range(count)]


def _product(matrix_OI: torch.Tensor, vectors_IR: torch.Tensor) -> torch.Tensor:
    """[O, R] float64."""
    rows = max(1, _CHUNK_NUMBERS // matrix_OI.shape[1])
    return torch.cat([chunk.double() @ vectors_IR for chunk in matrix_OI.split(rows)])


def _squares(matrix_OI: torch.Tensor) -> float:
    rows = max(1, _CHUNK_NUMBERS // matrix_OI.shape[1])
    return sum(float(chunk.double().square().sum()) for chunk in matrix_OI.split(rows))
