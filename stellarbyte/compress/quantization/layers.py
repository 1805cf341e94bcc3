"""One decoder layer: its inputs are counted, factors folded, matrices rounded."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.compress.quantization.folding import folds
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.compress.quantization.rounding import MatrixReport, RoundedMatrix, round_matrix
from stellarbyte.compress.quantization.scaling import awq_factors, smoothquant_factors
from stellarbyte.compress.quantization.settings import Quantization
from stellarbyte.compress.quantization.statistics import InputStatistics
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.attention import Attend, plain_projection
from stellarbyte.model.decoder import ByteDecoderLayer
from stellarbyte.model.moe.experts import ByteExperts
from stellarbyte.model.moe.layer import ByteMoE
from stellarbyte.model.parts import layer_parts, linears_by_input, module_path

# T tokens, C hidden size, N outputs, K inputs, I inner size of an expert

MIN_EXPERT_ROWS = 128  # an expert that fewer calibration tokens chose is rounded


@dataclass
class LayerResult:
    """Attributes: matrices: by the names of parameters; notes: sentences about what was left out."""

    matrices: dict[str, QuantizedMatrix] = field(default_factory=dict)
    reports: list[MatrixReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Counting:
    """A `project` that adds the inputs of linears to their statistics."""

    def __init__(self, of_first: dict[nn.Module, InputStatistics]) -> None:
        self.of_first = of_first

    def __call__(self, x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
        self.of_first[linears[0]].add(x)
        return plain_projection(x, *linears)


class _Routed:
    """The tokens of a layer with experts, and the experts that they chose."""

    def __init__(self) -> None:
        self._inputs: list[torch.Tensor] = []
        self._experts: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, ByteMoE)
        x_TC = inputs[0].reshape(-1, inputs[0].shape[-1])
        self._inputs.append(x_TC)
        self._experts.append(module.gate(x_TC).experts_TK)

    def rows_of(self, expert: int) -> torch.Tensor:
        """[T of the expert, C]"""
        chosen = [(own == expert).any(dim=1) for own in self._experts]
        return torch.cat([x_TC[is_own] for x_TC, is_own in zip(self._inputs, chosen, strict=True)])


@torch.no_grad()
def quantize_layer(
    layer: ByteDecoderLayer,
    number: int,
    config: ByteModelConfig,
    settings: Quantization,
    batches: Sequence[torch.Tensor],
    attention: Callable[[torch.Tensor], Attend],
) -> LayerResult:
    """Round the matrices of a layer in place, to the numbers of the result.

    Args:
        layer: in float32; afterwards with the rounded numbers, and with folded factors.
        batches: its inputs in calibration, [B, T, C] each; none: matrices are rounded.
        attention: makes the attention for such a batch.

    Raises:
        CompressError: as `round_matrix`.
    """
    result = LayerResult()
    parts = {
        name: [(part.name, layer.get_submodule(part.name)) for part in group]
        for name, group in linears_by_input(layer_parts(config, number)).items()
    }
    groups: dict[str, list[tuple[str, nn.Linear]]] = parts  # type: ignore[assignment]  # parts that read are linears
    counted = {name: InputStatistics(group[0][1].in_features) for name, group in groups.items()}
    routed = _Routed()
    handles = [layer.mlp.register_forward_pre_hook(routed)] if isinstance(layer.mlp, ByteMoE) else []
    counting = _Counting({group[0][1]: counted[name] for name, group in groups.items()})
    for batch in batches:
        layer(batch, attention(batch), counting)
    for handle in handles:
        handle.remove()
    grid = Grid(kind=settings.kind, scale_dtype=settings.scale_dtype, zero_points=settings.zero_points)
    if settings.folds and batches:
        _fold(layer, number, config, settings, counted, groups, grid, result)
    for name, group in groups.items():
        inputs = counted[name] if batches else None
        path = ", ".join(module_path(number, name) for name, _ in group)
        whole_NK = torch.cat([linear.weight.data for _, linear in group])
        rounded = round_matrix(path, whole_NK, inputs, grid, settings)
        result.reports.append(rounded.report)
        _take_rows(rounded, group, number, result)
    if isinstance(layer.mlp, ByteMoE) and layer.mlp.experts is not None:
        _round_experts(layer.mlp.experts, number, routed if batches else None, grid, settings, result)
    return result


def _fold(
    layer: ByteDecoderLayer,
    number: int,
    config: ByteModelConfig,
    settings: Quantization,
    counted: dict[str, InputStatistics],
    groups: dict[str, list[tuple[str, nn.Linear]]],
    grid: Grid,
    result: LayerResult,
) -> None:
    """Choose and fold factors; the statistics become those of the divided inputs."""
    found, left_out = folds(layer, config)
    for fold in found:
        inputs = counted[fold.name]
        for linear in fold.linears:
            grid.check(module_path(number, fold.name), linear.in_features)
        if settings.method == "awq":
            factors_K = awq_factors(fold, inputs, grid)
        else:
            factors_K = smoothquant_factors(fold, inputs, 0.5 if settings.strength is None else settings.strength)
        fold.apply(factors_K)
        for name, group in groups.items():  # in a parallel layer, the MLP reads the input of attention
            if any(linear in fold.linears for _, linear in group):
                counted[name].divide(factors_K)
    result.notes += [f"layer {number}: {name} has no factors: {reason}" for name, reason in left_out.items()]


def _take_rows(
    rounded: RoundedMatrix, group: Iterable[tuple[str, nn.Linear]], number: int, result: LayerResult
) -> None:
    """Give each linear of a group its rows."""
    start = 0
    for name, linear in group:
        rows = slice(start, start + linear.out_features)
        linear.weight.data = rounded.numbers_NK[rows].clone()
        result.matrices[module_path(number, f"{name}.weight")] = rounded.rows(rows)
        start = rows.stop


def _round_experts(
    experts: ByteExperts,
    number: int,
    routed: _Routed | None,
    grid: Grid,
    settings: Quantization,
    result: LayerResult,
) -> None:
    """Round each expert with the tokens that chose it; its down matrix sees what its rounded gates and ups give."""
    names = [module_path(number, f"mlp.experts.{name}") for name in ("gate_up_proj", "down_proj")]
    stacks: dict[str, list[QuantizedMatrix]] = {name: [] for name in names}
    num_unseen = 0
    for expert in range(experts.num_experts):
        rows_TC = None if routed is None else routed.rows_of(expert)
        if rows_TC is not None and len(rows_TC) < MIN_EXPERT_ROWS:
            rows_TC, num_unseen = None, num_unseen + 1
        inputs = _statistics(rows_TC)
        for name, stack in zip(names, (experts.gate_up_proj, experts.down_proj), strict=True):
            if stack is experts.down_proj and rows_TC is not None:
                inputs = _statistics(experts.inner(rows_TC, expert))
            rounded = round_matrix(f"{name}, expert {expert}", stack.data[expert], inputs, grid, settings)
            stack.data[expert] = rounded.numbers_NK
            stacks[name].append(rounded.stored)
            result.reports.append(rounded.report)
    for name, matrices in stacks.items():
        result.matrices[name] = _stacked(matrices)
    if num_unseen:
        result.notes.append(
            f"layer {number}: {num_unseen} of {experts.num_experts} experts are rounded: fewer than {MIN_EXPERT_ROWS} "
            "calibration tokens chose them"
        )


def _statistics(rows: torch.Tensor | None) -> InputStatistics | None:
    if rows is None:
        return None
    inputs = InputStatistics(rows.shape[1])
    inputs.add(rows)
    return inputs


def _stacked(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]
    return QuantizedMatrix(
        kind=matrices[0].kind,
        codes=torch.stack([matrix.codes for matrix in matrices]),
        scales=torch.stack([matrix.scales for matrix in matrices]),
        zeros=torch.stack(zeros) if zeros else None,
    )
