"""The distribution of a checkpoint's weights: sparsity and outliers, in float64, read tensor by tensor.

Nothing is kept but sums: beside the file's own pages, memory holds CHUNK_NUMBERS numbers and one sum for each channel.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from stellarbyte.analysis.errors import AnalysisError
from stellarbyte.analysis.parameters import Parameter
from stellarbyte.checkpoint.errors import CheckpointError, one_line
from stellarbyte.checkpoint.native import Checkpoint

SMALL = 0.01  # a weight is small up to this share of the root mean square of its tensor
OUTLIER_CHANNEL = 4.0  # a channel is an outlier if its root mean square is above this multiple of the channels' median
CHUNK_NUMBERS = 1 << 22

ReadTensor = Callable[[str], torch.Tensor]

# E matrices of a stack (1 of a single one), O rows (outputs), I columns (inputs)


@dataclass(frozen=True, kw_only=True)
class WeightStatistics:
    """Of one tensor, or of the whole stack of experts.

    Attributes:
        rms: sqrt(mean(w²)).
        zeros: share of numbers that are 0.
        small: share of |w| ≤ SMALL · rms, zeros among them.
        peak: max |w| / rms; 0 if all are 0.
        kurtosis: mean((w - mean)⁴) / variance²: 3 of a normal distribution; None: all numbers are equal.
        num_channels / num_outlier_channels: input channels of a matrix (of each expert), and those whose root mean
            square is above OUTLIER_CHANNEL times the median's; None: no matrix.
        largest_channel: (expert or None, channel, its root mean square / the median's); None: no matrix, or median 0.
    """

    name: str
    layer: int | None
    part: str
    num_elements: int
    rms: float
    zeros: float
    small: float
    peak: float
    kurtosis: float | None
    num_channels: int | None
    num_outlier_channels: int | None
    largest_channel: tuple[int | None, int, float] | None

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return self.rms * math.sqrt(self.num_elements)


@contextmanager
def open_weights(checkpoint: Checkpoint) -> Iterator[ReadTensor]:
    """A function that reads one tensor by name, as stored; on the CPU it is a memory map of the file.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with ExitStack() as stack:
        try:
            files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in checkpoint.files}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"The weights of {checkpoint.path} cannot be read: {one_line(error)}.") from error

        def read(name: str) -> torch.Tensor:
            file = checkpoint.tensors[name].file
            try:
                tensor: torch.Tensor = files[file].get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {one_line(error)}.") from error
            return tensor

        yield read


def weight_statistics(parameter: Parameter, tensor: torch.Tensor) -> WeightStatistics:
    """Read `tensor` twice, in chunks.

    Raises:
        AnalysisError: it holds NaN or infinity.
    """
    count = tensor.numel()
    total = squares = largest = 0.0
    channels = _ChannelSums(tensor.shape) if parameter.is_matrix else None
    for expert, chunk_OI in _chunks(tensor):
        total += float(chunk_OI.sum())
        squared_OI = chunk_OI.square()
        squares += float(squared_OI.sum())
        largest = max(largest, float(chunk_OI.abs().max()))
        if channels is not None:
            channels.sums_EI[expert] += squared_OI.sum(dim=0)
    if not math.isfinite(squares):
        raise AnalysisError(f"{parameter.name} holds NaN, infinity or numbers whose squares overflow float64.")
    mean, rms = total / count, math.sqrt(squares / count)
    second = fourth = 0.0
    num_zeros = num_small = 0
    for _, chunk_OI in _chunks(tensor):
        num_zeros += int((chunk_OI == 0).sum())
        num_small += int((chunk_OI.abs() <= SMALL * rms).sum())
        deviation_OI = (chunk_OI - mean).square_()
        second += float(deviation_OI.sum())
        fourth += float(deviation_OI.square_().sum())
    variance = second / count
    is_constant = variance <= (1e-9 * mean) ** 2  # but for rounding
    return WeightStatistics(
        name=parameter.name,
        layer=parameter.layer,
        part=parameter.part,
        num_elements=count,
        rms=rms,
        zeros=num_zeros / count,
        small=num_small / count,
        peak=largest / rms if rms > 0 else 0.0,
        kurtosis=None if is_constant else fourth / count / variance**2,
        num_channels=None if channels is None else channels.sums_EI.numel(),
        num_outlier_channels=None if channels is None else channels.num_outliers(),
        largest_channel=None if channels is None else channels.largest(),
    )


class _ChannelSums:
    """Sums of squares of input channels, by expert."""

    def __init__(self, shape: torch.Size) -> None:
        self.is_stack = len(shape) == 3
        self.num_rows = shape[-2]
        self.sums_EI = torch.zeros(shape[0] if self.is_stack else 1, shape[-1], dtype=torch.float64)

    def _ratios_EI(self) -> torch.Tensor | None:
        rms_EI = (self.sums_EI / self.num_rows).sqrt()
        median = float(np.median(rms_EI.numpy()))
        return rms_EI / median if median > 0 else None

    def num_outliers(self) -> int:
        ratios_EI = self._ratios_EI()
        return 0 if ratios_EI is None else int((ratios_EI > OUTLIER_CHANNEL).sum())

    def largest(self) -> tuple[int | None, int, float] | None:
        ratios_EI = self._ratios_EI()
        if ratios_EI is None:
            return None
        expert, channel = divmod(int(ratios_EI.argmax()), ratios_EI.shape[1])
        return expert if self.is_stack else None, channel, float(ratios_EI.max())


def _chunks(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(number in the stack, [O, I] float64) of at most CHUNK_NUMBERS numbers, or one row; a vector is a row."""
    stack_EOI = tensor if tensor.dim() == 3 else tensor[None] if tensor.dim() == 2 else tensor[None, None]
    rows = max(1, CHUNK_NUMBERS // stack_EOI.shape[2])
    for number, matrix_OI in enumerate(stack_EOI):
        for part_OI in matrix_OI.split(rows):
            yield number, part_OI.double()
