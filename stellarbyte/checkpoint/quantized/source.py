"""Quantized matrices of a Hugging Face folder, not yet read: what all formats have in common."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.quantized.matrix import Kind, QuantizedMatrix
from stellarbyte.checkpoint.safetensors_file import DTYPES, TensorInfo, read_tensor

# N outputs, K inputs, G groups of inputs

Read = Callable[[], torch.Tensor]
FLOATS = ("F16", "BF16", "F32")
KEPT_SCALES = {name: DTYPES[name] for name in FLOATS}  # dtypes of scales that are kept as they are


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A matrix in a form that checkpoints keep; functions return the tensors of `QuantizedMatrix`."""

    kind: Kind
    num_groups: int
    scale_dtype: torch.dtype
    codes: Read
    scales: Read
    zeros: Read | None = None

    def dequantized(self) -> torch.Tensor:
        zeros = None if self.zeros is None else self.zeros()
        return QuantizedMatrix(kind=self.kind, codes=self.codes(), scales=self.scales(), zeros=zeros).dequantized()


@dataclass(frozen=True, kw_only=True)
class SourceMatrix:
    """The weight of a linear.

    Attributes:
        shape: [N, K].
        dequantized: reads it as float32 [N, K].
        parts: the same numbers in a form that is kept; None: there is none.
    """

    shape: tuple[int, int]
    dequantized: Read
    parts: Parts | None = None


def kept(shape: tuple[int, int], parts: Parts) -> SourceMatrix:
    return SourceMatrix(shape=shape, dequantized=parts.dequantized, parts=parts)


@dataclass(frozen=True, kw_only=True)
class QuantizedSource:
    """What a folder holds.

    Attributes:
        format: for people, such as "GPTQ, 4 bits".
        matrices: by the names that the weights would have without quantization.
        plain: the other tensors.
        notes: sentences about what is not served as the folder says.
    """

    format: str
    matrices: Mapping[str, SourceMatrix]
    plain: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()


@dataclass
class Entries:
    """The tensors of a folder, taken out one by one by the reader of a format. Errors name the file and the tensor."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    taken: set[str] = field(default_factory=set)

    def modules(self, ending: str) -> list[str]:
        """The modules with a tensor of this ending."""
        return [name.removesuffix(ending) for name in self.tensors if name.endswith(ending)]

    def take(self, name: str, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> TensorInfo:
        """A tensor that must be there, in one of the dtypes and, if given, of one of the shapes."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}, which its quantization needs.")
        info = self.tensors[name]
        if info.dtype not in dtypes or (shapes and info.shape not in shapes):
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(
                f"{info.file} holds {name} as {info.dtype} {list(info.shape)}; it must be {' or '.join(dtypes)}"
                f"{' ' + wanted if wanted else ''}."
            )
        self.taken.add(name)
        return info

    def has(self, name: str) -> bool:
        return name in self.tensors

    def ignore(self, endings: tuple[str, ...]) -> bool:
        """Leave out the tensors with these endings; returns whether there were some."""
        found = {name for name in self.tensors if name.endswith(endings)}
        self.taken |= found
        return bool(found)

    def plain(self) -> dict[str, TensorInfo]:
        """The tensors that were not taken."""
        return {name: info for name, info in self.tensors.items() if name not in self.taken}


def read_scales(name: str, info: TensorInfo) -> torch.Tensor:
    """Scales as stored if checkpoints keep their dtype, else as float32.

    Raises:
        CheckpointError: one of them is not finite.
    """
    scales = read_tensor(name, info)
    if info.dtype not in KEPT_SCALES:
        scales = scales.float()
    if not scales.isfinite().all():
        raise CheckpointError(f"{info.file} cannot be decoded: {name} holds NaN or infinity.")
    return scales


def scale_dtype(info: TensorInfo) -> torch.dtype:
    """Of `read_scales`."""
    return KEPT_SCALES.get(info.dtype, torch.float32)


def is_in_order(groups_K: torch.Tensor, num_groups: int) -> bool:
    """Whether the groups of the inputs are equally many neighbours, one group after the other."""
    size, rest = divmod(len(groups_K), num_groups)
    return rest == 0 and torch.equal(groups_K, torch.arange(len(groups_K)) // max(size, 1))


def corrupt(info: TensorInfo, name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{info.file} cannot be decoded: {name} {reason}.")
