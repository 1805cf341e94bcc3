"""The matrices of a model, each as the CPU kernels multiply with it: quantized now, or as a checkpoint keeps them."""

from collections.abc import Iterator, Mapping

import torch

from stellarbyte.checkpoint.quantized.matrix import Kind, QuantizedMatrix
from stellarbyte.checkpoint.shapes import matrix_names
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.ops.cpu.packing import Floats, QuantizedRows, quantized_rows
from stellarbyte.ops.cpu.panels.sizes import INT4_GROUP, INT8_GROUP

# N outputs, K inputs, G groups of inputs

HEAD = "lm_head.weight"
_GROUPS: Mapping[Kind, int] = {"int4": INT4_GROUP, "int8": INT8_GROUP, "fp8": INT8_GROUP}  # of the kernels


class CpuMatrices:
    """Matrices by the names of their parameters.

    All of them but the head have one form, `quantization`: that of `kept` where "none" is asked for, or the same, and
    the kernels have all of those in that form; else they are dequantized, and then quantized as asked.

    Args:
        kept: the quantized matrices of a checkpoint. Other matrices are the model's.
    """

    def __init__(
        self,
        model: ByteLanguageModel,
        config: ByteModelConfig,
        kept: Mapping[str, QuantizedMatrix],
        quantization: str,
    ) -> None:
        self._model, self._kept = model, kept
        form = _common_form(config, kept)
        self.is_kept = form is not None and quantization in ("none", form)
        self.quantization: str = form if form is not None and self.is_kept else quantization
        # The head's rounding errors reach the logits directly: int4 would cost more quality than it saves memory.
        self._of_head = "int8" if quantization == "int4" else quantization

    def rows(self, name: str) -> QuantizedRows:
        """Raises ValueError: the quantization does not fit the shape."""
        kept = self._kept.get(name)
        if kept is not None and self.is_kept:
            return _kernel_rows(kept)
        return quantized_rows(self._numbers(name), self.quantization)

    def stack(self, name: str) -> Iterator[QuantizedRows]:
        """Each matrix of a stack of experts."""
        kept = self._kept.get(name)
        if kept is None:
            for matrix in self._model.get_parameter(name):
                yield quantized_rows(numpy_float32(matrix), self.quantization)
            return
        for expert in range(len(kept.codes)):
            one = kept[expert]
            yield _kernel_rows(one) if self.is_kept else quantized_rows(_dequantized(one), self.quantization)

    def head(self) -> QuantizedRows:
        """Raises ValueError: the quantization does not fit the shape."""
        kept = self._kept.get(HEAD)
        if kept is not None and _fits(kept) and self._of_head in ("none", kept.kind):
            return _kernel_rows(kept)
        return quantized_rows(self._numbers(HEAD), self._of_head)

    def _numbers(self, name: str) -> Floats:
        kept = self._kept.get(name)
        return numpy_float32(self._model.get_parameter(name)) if kept is None else _dequantized(kept)


def _common_form(config: ByteModelConfig, kept: Mapping[str, QuantizedMatrix]) -> Kind | None:
    """The form of all matrices of layers, if they have one that the kernels take."""
    matrices = [kept.get(name) for name in matrix_names(config) - {HEAD}]
    forms = {matrix.kind if matrix is not None and _fits(matrix) else None for matrix in matrices}
    return forms.pop() if len(forms) == 1 else None


def _fits(matrix: QuantizedMatrix) -> bool:
    return matrix.group_size % _GROUPS[matrix.kind] == 0


def _kernel_rows(matrix: QuantizedMatrix) -> QuantizedRows:
    """The same numbers: int4 as code · scale + minimum, groups in parts of the kernels' size."""
    repeats = matrix.group_size // _GROUPS[matrix.kind]
    scales = matrix.scales.float()
    codes, minima = matrix.codes, torch.zeros(len(scales), 0)
    if matrix.zeros is not None:
        minima = (-matrix.zeros.float() * scales).repeat_interleave(repeats, 1)
    if matrix.kind == "fp8":
        codes, minima = codes.view(torch.uint8), minima.to(torch.uint8)
    return QuantizedRows(codes.numpy(), scales.repeat_interleave(repeats, 1).numpy(), minima.numpy())


def _dequantized(matrix: QuantizedMatrix) -> Floats:
    return matrix.dequantized().numpy()


def numpy_float32(tensor: torch.Tensor) -> Floats:
    return tensor.detach().float().contiguous().numpy()
