"""The matrices of a model, each as the GPU kernels multiply with it: plain, quantized now, or as a checkpoint keeps
them."""

from collections.abc import Mapping, Sequence

import torch

from stellarbyte.backends.gpu.products import PackedWeight
from stellarbyte.checkpoint.quantized.matrix import Kind, QuantizedMatrix
from stellarbyte.checkpoint.shapes import matrix_names
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.ops.triton.grouped.weights import grouped, takes
from stellarbyte.ops.triton.weights import ExpertWeight, Weight, dequantized, quantize, quantize_experts

# E experts, N outputs, K inputs

HEAD = "lm_head.weight"
_INT4 = Grid(kind="int4", zero_points="real")


class GpuMatrices:
    """Matrices by the names of their parameters.

    All of them but the head have one form, `quantization`: that of `kept` where "none" is asked for, or the same, and
    the kernels have all of those in that form; else they are dequantized, and then quantized as asked.

    Args:
        kept: the quantized matrices of a checkpoint, on any device. Other matrices are the model's.
    """

    def __init__(
        self,
        model: ByteLanguageModel,
        config: ByteModelConfig,
        kept: Mapping[str, QuantizedMatrix],
        quantization: str,
    ) -> None:
        self._model, self._kept = model, kept
        embedding_VC = model.model.embed_tokens.weight
        self._device, self.dtype = embedding_VC.device, embedding_VC.dtype
        form = _common_form(config, kept)
        self.is_kept = form is not None and quantization in ("none", form)
        self.quantization: str = form if form is not None and self.is_kept else quantization
        # The head's rounding errors reach the logits directly, and those of int4 and fp8 are larger.
        self._of_head = "none" if quantization == "none" else "int8"
        kept_head = kept.get(HEAD)
        self.keeps_head = kept_head is not None and _fits(kept_head) and self._of_head in ("none", kept_head.kind)

    def packed(self, names: Sequence[str], bias_N: torch.Tensor | None = None) -> PackedWeight:
        """Matrices with one input, below each other.

        Raises:
            ValueError: the quantization does not fit the shape or the numbers.
        """
        if self.is_kept:
            return _as_kept([self._kept[name].to(self._device) for name in names], bias_N)
        matrices = [self._numbers(name) for name in names]
        if self.quantization == "int4":
            return grouped([_rounded(*each) for each in zip(names, matrices, strict=True)], bias_N)
        weight = Weight(matrix_NK=matrices[0] if len(matrices) == 1 else torch.cat(matrices), bias_N=bias_N)
        return weight if self.quantization == "none" else quantize(weight, self.quantization)

    def experts(self, name: str, bias_EN: torch.Tensor | None = None) -> ExpertWeight:
        """A stack.

        Raises:
            ValueError: there is no kernel for experts in this form.
        """
        if self.is_kept:
            matrix = self._kept[name].to(self._device)
            return ExpertWeight(matrix_ENK=matrix.codes, scales_EN=matrix.scales[..., 0].float(), bias_EN=bias_EN)
        if self.quantization == "int4":
            raise ValueError("the GPU kernels do not support experts in int4")
        weight = ExpertWeight(matrix_ENK=self._numbers(name), bias_EN=bias_EN)
        return weight if self.quantization == "none" else quantize_experts(weight, self.quantization)

    def head(self) -> PackedWeight:
        """The output head, without bias."""
        if self.keeps_head:
            return _as_kept([self._kept[HEAD].to(self._device)])
        weight = Weight(matrix_NK=self._numbers(HEAD))
        return weight if self._of_head == "none" else quantize(weight, self._of_head)

    def _numbers(self, name: str) -> torch.Tensor:
        kept = self._kept.get(name)
        if kept is None:
            return self._model.get_parameter(name).data
        return kept.to(self._device).dequantized().to(self.dtype)


def _common_form(config: ByteModelConfig, kept: Mapping[str, QuantizedMatrix]) -> Kind | None:
    """The form of all matrices of layers, if they have one that the kernels take."""
    matrices = [kept.get(name) for name in matrix_names(config) - {HEAD}]
    forms = {matrix.kind if matrix is not None and _fits(matrix) else None for matrix in matrices}
    return forms.pop() if len(forms) == 1 else None


def _fits(matrix: QuantizedMatrix) -> bool:
    return _has_scales_of_outputs(matrix) or (takes(matrix) and matrix.codes.dim() == 2)


def _has_scales_of_outputs(matrix: QuantizedMatrix) -> bool:
    """Whether it is in 8 bits with one scale for each output."""
    return matrix.kind != "int4" and matrix.scales.shape[-1] == 1


def _as_kept(matrices: Sequence[QuantizedMatrix], bias_N: torch.Tensor | None = None) -> PackedWeight:
    """The same numbers, below each other."""
    if not all(_has_scales_of_outputs(matrix) for matrix in matrices):
        return grouped(matrices, bias_N)
    codes_NK = torch.cat([matrix.codes for matrix in matrices])
    scales_N = torch.cat([matrix.scales[:, 0].float() for matrix in matrices])
    return Weight(matrix_NK=codes_NK, scales_N=scales_N, bias_N=bias_N)


def as_served(name: str, matrix_NK: torch.Tensor, quantization: str) -> torch.Tensor:
    """The numbers that products multiply by, once a matrix is quantized so; float32 unless "none"."""
    if quantization == "none":
        return matrix_NK
    if quantization == "int4":
        return _rounded(name, matrix_NK).dequantized()
    return dequantized(quantize(Weight(matrix_NK=matrix_NK), quantization), torch.float32)


def _rounded(name: str, matrix_NK: torch.Tensor) -> QuantizedMatrix:
    """In int4: the nearest numbers."""
    _INT4.check(name, matrix_NK.shape[1])
    numbers_NK = matrix_NK.float()
    levels = _INT4.fit(numbers_NK)
    return _INT4.stored(_INT4.codes(numbers_NK, levels), levels)
