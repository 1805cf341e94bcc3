"""Quantizes a model layer by layer, and hands out its tensors in the order in which a checkpoint stores them."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from stellarbyte.checkpoint.quantized.matrix import CODES, SCALES, ZEROS, QuantizedMatrix
from stellarbyte.checkpoint.shapes import expected_shapes, matrix_names
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.compress.quantization.layers import LayerResult, quantize_layer
from stellarbyte.compress.quantization.rounding import round_matrix
from stellarbyte.compress.quantization.settings import Quantization
from stellarbyte.compress.quantization.statistics import InputStatistics
from stellarbyte.compress.stream import (
    Advance,
    AnyModel,
    Batches,
    attention_of,
    decoder_layers,
    embedded,
    finished,
    run_layer,
)
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import layer_parts, module_path, parameter_shapes

Tensors = dict[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class QuantizedModel:
    """The tensors of a model that is quantized while they are read. The model is used up: its layers lose their memory.

    Layer by layer, calibration and held-out contexts run through what is already quantized, so that each layer is
    calibrated with the errors of those before it.

    Args:
        config: of the model as it is stored.
        settings: None: nothing is quantized.
        calibration_BT, held_out_BT: contexts, int64; no calibration: matrices are rounded.
        advance: called after each layer.

    Attributes:
        result: what was done to the layers read so far.
        held_out: hidden states of the held-out contexts after the final norm, once all tensors are read.
        head: the head's numbers, float32 or as stored, once all tensors are read.
    """

    def __init__(
        self,
        model: AnyModel,
        config: ByteModelConfig,
        settings: Quantization | None,
        calibration_BT: torch.Tensor,
        held_out_BT: torch.Tensor,
        advance: Advance,
    ) -> None:
        self.model, self.config, self.settings, self.advance = model, config, settings, advance
        self.result = LayerResult()
        self.held_out: Batches = []
        self.head = model.lm_head.weight.data
        self._texts = calibration_BT, held_out_BT
        self._steps = self._run()
        self._ready: Tensors = {}

    def read(self, name: str) -> torch.Tensor:
        """One tensor; in the order of `expected_shapes`, each once.

        Raises:
            CheckpointError, CompressError: a layer cannot be quantized.
        """
        while name not in self._ready:
            self._ready |= next(self._steps)
        return self._ready.pop(name)

    @torch.no_grad()
    def _run(self) -> Iterator[Tensors]:
        model, config, settings = self.model, self.config, self.settings
        yield {EMBEDDING: model.model.embed_tokens.weight.data}
        calibration, self.held_out = (embedded(model, contexts_BT) for contexts_BT in self._texts)
        owners = config.expert_layers
        for number, (layer, _) in enumerate(decoder_layers(model)):
            stored = {name: parameter.data for name, parameter in layer.named_parameters()}
            layer.float()
            matrices: dict[str, QuantizedMatrix] = {}
            if settings is not None:
                attention = partial(attention_of, model, config)
                found = quantize_layer(layer, number, config, settings, calibration, attention)
                matrices = found.matrices
                self.result.reports += found.reports
                self.result.notes += found.notes
            calibration = run_layer(model, config, layer, calibration)
            self.held_out = run_layer(model, config, layer, self.held_out)
            yield self._tensors_of(layer, number, stored, matrices)
            if number not in owners[number + 1 :]:  # no later layer uses its experts
                layer.to("meta")
            self.advance(number)
        self.held_out = finished(model, self.held_out)
        last = {"model.norm.weight": model.model.norm.weight.data}
        if config.xpos_learnable_scale:
            last["model.rotary.raw_decay"] = model.get_parameter("model.rotary.raw_decay").data
        yield last
        yield self._head(finished(model, calibration))

    def _tensors_of(
        self, layer: nn.Module, number: int, stored: Tensors, matrices: dict[str, QuantizedMatrix]
    ) -> Tensors:
        """Those of a layer: unchanged ones as stored, in float32 where factors may be folded in."""
        changed = {name: parameter.data for name, parameter in layer.named_parameters()}
        found: Tensors = {}
        for part in layer_parts(self.config, number):
            for name in parameter_shapes(part, self.config, number):
                path = module_path(number, name)
                if path in matrices:
                    found |= parts_of(path, matrices[path])
                else:
                    folds = self.settings is not None and self.settings.folds
                    found[path] = changed[name] if folds else stored[name]
        return found

    def _head(self, states: Batches) -> Tensors:
        settings = self.settings
        if settings is None or not settings.head:
            return {} if self.config.tie_word_embeddings else {HEAD: self.head}
        inputs = InputStatistics(self.config.hidden_size) if states else None
        for batch in states:
            assert inputs is not None
            inputs.add(batch)
        grid = Grid(kind=settings.head_kind, scale_dtype=settings.scale_dtype)
        rounded = round_matrix(HEAD, self.head, inputs, grid, settings)
        self.result.reports.append(rounded.report)
        self.head = rounded.numbers_NK
        return parts_of(HEAD, rounded.stored)


def parts_of(name: str, matrix: QuantizedMatrix) -> Tensors:
    """The tensors that keep a quantized parameter."""
    parts = {CODES: matrix.codes, SCALES: matrix.scales, ZEROS: matrix.zeros}
    return {f"{name}{ending}": tensor for ending, tensor in parts.items() if tensor is not None}


def layout(config: ByteModelConfig, settings: Quantization | None, stored: dict[str, torch.dtype]) -> Tensors:
    """The tensors that `QuantizedModel` gives, without memory, in order.

    Args:
        config: of the result: its head is not tied where it is quantized.
        stored: the dtypes of the model's parameters.
    """
    found: Tensors = {}
    quantized = set() if settings is None else matrix_names(config)
    for name, shape in expected_shapes(config).items():
        is_head = name == HEAD
        if settings is None or name not in quantized or (is_head and not settings.head):
            folded = settings is not None and settings.folds and name.startswith("model.layers.")
            found[name] = torch.empty(shape, dtype=torch.float32 if folded else stored[name], device="meta")
            continue
        kind = settings.head_kind if is_head else settings.kind
        grid = Grid(kind=kind, scale_dtype=settings.scale_dtype)
        grid.check(name, shape[-1])
        *rows, width = shape
        halves = 2 if kind == "int4" else 1
        dtype = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
        groups = (*rows, width // grid.group_size)
        found[f"{name}{CODES}"] = torch.empty((*rows, width // halves), dtype=dtype, device="meta")
        found[f"{name}{SCALES}"] = torch.empty(groups, dtype=settings.scale_dtype, device="meta")
        if kind == "int4":
            zeros = torch.float16 if settings.zero_points == "real" else torch.uint8
            found[f"{name}{ZEROS}"] = torch.empty(groups, dtype=zeros, device="meta")
    return found
