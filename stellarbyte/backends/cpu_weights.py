"""The weights of a model's layers as the CPU kernels read them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stellarbyte.backends.cpu_matrices import CpuMatrices, numpy_float32
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import Projections
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.model.norm import ByteRMSNorm
from stellarbyte.model.parts import (
    ATTENDED,
    ATTENTION_INPUT,
    GATED,
    MLP_INPUT,
    SHARED_EXPERT_GATED,
    SHARED_EXPERT_INPUT,
    Part,
    linears_by_input,
    model_parts,
    module_path,
)
from stellarbyte.model.residual import LayerScale
from stellarbyte.ops.cpu.attention import Floats, Integers
from stellarbyte.ops.cpu.layers import LayerWeights
from stellarbyte.ops.cpu.moe import Experts
from stellarbyte.ops.cpu.packing import (
    QuantizedRows,
    StackedLinears,
    interleave_gated,
    joined_rows,
    pack,
    panels_below_each_other,
    panels_of,
    quantized_rows,
)
from stellarbyte.ops.cpu.panels.sizes import INT8_GROUP, PANEL_ROWS
from stellarbyte.ops.cpu.routing import Routers

# L layers, M layers with experts, E experts, C hidden size, I inner size of an expert, P panels of R rows

INPUTS = {ATTENTION_INPUT: "qkv", ATTENDED: "output", MLP_INPUT: "gate_up", GATED: "down"}  # of linears → fields
SHARED_INPUTS = {SHARED_EXPERT_INPUT: "shared_gate_up", SHARED_EXPERT_GATED: "shared_down"}  # → fields of `Experts`
GATED_INPUTS = (MLP_INPUT, SHARED_EXPERT_INPUT)  # of linears that are packed by `interleave_gated`
VECTORS = {  # norms, scales and bare vectors → fields of `LayerWeights`
    "input_layernorm": "input_norm_LC",
    "attention_output_norm": "attention_output_norm_LC",
    "post_attention_layernorm": "mlp_norm_LC",
    "mlp_output_norm": "mlp_output_norm_LC",
    "self_attn.softmax_sink": "softmax_sink_LH",
    "self_attn.q_norm": "q_norm_LD",
    "self_attn.k_norm": "k_norm_LD",
    "attention_scale": "attention_scale_LC",
    "mlp_scale": "mlp_scale_LC",
}
_ROUTER, _EXPERTS, _SHARED_GATE = "mlp.gate", "mlp.experts", "mlp.shared_expert_gate"
EXPERT_PARTS = {
    *(f"{_ROUTER}.{name}" for name in ("weight", "bias", "e_score_correction_bias")),
    f"{_ROUTER}.noise_weight",  # of training alone
    *(f"{_EXPERTS}.{name}" for name in ("gate_up_proj", "down_proj")),
    _SHARED_GATE,
}


def stack_layers(
    model: ByteLanguageModel, config: ByteModelConfig, matrices: CpuMatrices, projections: Projections
) -> LayerWeights:
    """Pack and stack the weights of all layers, with `matrices` those of the model.

    Raises:
        ValueError: the quantization does not fit the shape of a matrix.
    """
    parts = model_parts(config)
    groups: dict[str, Any] = {
        name: _stack_linears(model, config, group, matrices, projections.shared_inputs[name].start)
        for name, group in linears_by_input(parts).items()
    }
    nothing = _no_linears(matrices.quantization)
    layers = range(config.num_hidden_layers)
    vectors: dict[str, Any] = {field: np.zeros((len(layers), 0), np.float32) for field in VECTORS.values()}
    for part in parts:
        if part.name in VECTORS:
            vectors[VECTORS[part.name]] = np.stack([_vector(model, part, layer) for layer in layers])
    if config.residual_multiplier != 1:
        for name in ("attention_scale_LC", "mlp_scale_LC"):
            scale_LC = vectors[name] if vectors[name].size else np.ones((len(layers), config.hidden_size), np.float32)
            vectors[name] = scale_LC * np.float32(config.residual_multiplier)
    kinds = list(dict.fromkeys(config.rotations))
    rotary = model.model.rotary
    scales_L = [rotary.of_layer(layer, config.context_length).score_scale for layer in layers]
    shared = {field: groups.get(name, nothing) for name, field in SHARED_INPUTS.items()}
    return LayerWeights(
        **{field: groups.get(name, nothing) for name, field in INPUTS.items()},
        **vectors,
        experts=_stack_experts(model, config, matrices, shared) if config.num_experts else None,
        windows_L=windows(config),
        rotations_L=np.array([kinds.index(kind) for kind in config.rotations], dtype=np.int64),
        score_scales_L=np.array(scales_L, dtype=np.float32),
    )


def _vector(model: ByteLanguageModel, part: Part, layer: int) -> Floats:
    """The factors of a norm or of a LayerScale, or a bare parameter."""
    if part.kind == "parameter":
        return numpy_float32(model.get_parameter(module_path(layer, part.name)))
    module = model.get_submodule(module_path(layer, part.name))
    assert isinstance(module, ByteRMSNorm | LayerScale)
    return numpy_float32(module.gain)


def windows(config: ByteModelConfig) -> Integers:
    """Of each layer; 0: none."""
    return np.array([window or 0 for window in config.windows], dtype=np.int64)


def _stack_linears(
    model: ByteLanguageModel, config: ByteModelConfig, group: Sequence[Part], matrices: CpuMatrices, first: int
) -> StackedLinears:
    """Pack the linears that share an input; where a layer has some of them, a missing one is zero."""
    layers = [n for n in range(config.num_hidden_layers) if any(part.exists(config, n) for part in group)]
    joined = interleave_gated if group[0].reads in GATED_INPUTS else _below_each_other
    packed = [
        panels_of(joined_rows([_rows(config, part, layer, matrices) for part in group], joined)) for layer in layers
    ]
    bias_LN = np.zeros((len(layers), 0), np.float32)
    if any(part.has_bias(config, layer) for part in group for layer in layers):
        bias_LN = np.stack([joined(*[_bias(model, config, part, layer) for part in group]) for layer in layers])
    return StackedLinears(
        weights=np.stack([weight.weights for weight in packed]),
        scales=np.stack([weight.scales for weight in packed]),
        minima=np.stack([weight.minima for weight in packed]),
        bias_LN=_whole_panels(bias_LN),
        places_L=_places(layers, config),
        widths=np.array([part.shape(config, 0)[0] for part in group], dtype=np.int64),
        first=first,
    )


def _no_linears(quantization: str) -> StackedLinears:
    """Of a group that no layer has."""
    one = pack(np.zeros((PANEL_ROWS, INT8_GROUP), np.float32), quantization)  # as the others, so that types are equal
    weights, scales, minima = (part[None][:0] for part in one)
    no_numbers = np.zeros(0, np.int64)
    return StackedLinears(weights, scales, minima, np.zeros((0, 0), np.float32), no_numbers, no_numbers, 0)


def _rows(config: ByteModelConfig, part: Part, layer: int, matrices: CpuMatrices) -> QuantizedRows:
    if not part.exists(config, layer):
        return quantized_rows(np.zeros(part.shape(config, layer), np.float32), matrices.quantization)
    return matrices.rows(f"{module_path(layer, part.name)}.weight")


def _bias(model: ByteLanguageModel, config: ByteModelConfig, part: Part, layer: int) -> Floats:
    if not part.exists(config, layer) or not part.has_bias(config, layer):
        return np.zeros(part.shape(config, layer)[:1], np.float32)
    return numpy_float32(model.get_parameter(f"{module_path(layer, part.name)}.bias"))


def _below_each_other(*arrays: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _stack_experts(
    model: ByteLanguageModel, config: ByteModelConfig, matrices: CpuMatrices, shared: dict[str, StackedLinears]
) -> Experts:
    owners = config.expert_layers
    pools = list(dict.fromkeys(owner for owner in owners if owner is not None))  # the layer that holds each pool's
    assert config.moe_intermediate_size is not None  # ByteModelConfig sets it
    count = len(pools) * config.num_experts

    def of_experts(name: str) -> Iterator[QuantizedRows]:
        """Of all experts of all pools."""
        for layer in pools:
            yield from matrices.stack(module_path(layer, f"{_EXPERTS}.{name}"))

    def in_turn(gates_above_ups: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return interleave_gated(*np.split(gates_above_ups, 2))

    gate_up = panels_below_each_other((joined_rows([rows], in_turn) for rows in of_experts("gate_up_proj")), count)
    return Experts(
        places_L=_places([n for n, owner in enumerate(owners) if owner is not None], config),
        pools_L=np.array([-1 if owner is None else pools.index(owner) for owner in owners], dtype=np.int64),
        routers=_stack_routers(model, config),
        gate_up=gate_up,
        down=panels_below_each_other(of_experts("down_proj"), count),
        intermediate_size=config.moe_intermediate_size,
        **shared,
        shared_intermediate_size=config.shared_expert_intermediate_size,
        has_shared_gate=config.shared_expert_gate,
    )


def _stack_routers(model: ByteLanguageModel, config: ByteModelConfig) -> Routers:
    """In float32, whatever the quantization; with the gates of shared experts, which read the same input."""
    layers = [n for n, owner in enumerate(config.expert_layers) if owner is not None]

    def stacked(name: str) -> Floats:
        return np.stack([numpy_float32(model.get_parameter(module_path(layer, name))) for layer in layers])

    none_MN = np.zeros((len(layers), 0), np.float32)
    rows_MEC = stacked(f"{_ROUTER}.weight")
    if config.shared_expert_gate:
        rows_MEC = np.concatenate([rows_MEC, stacked(f"{_SHARED_GATE}.weight")], axis=1)
    bias_MN = stacked(f"{_ROUTER}.bias") if config.router_bias else none_MN
    if config.router_bias and config.shared_expert_gate:
        bias_MN = np.pad(bias_MN, ((0, 0), (0, 1)))
    return Routers(
        weights_MPCR=np.stack([pack(rows_EC, "none").weights for rows_EC in rows_MEC]),
        bias_MN=_whole_panels(bias_MN),
        selection_bias_ME=stacked(f"{_ROUTER}.e_score_correction_bias") if config.router_selection_bias else none_MN,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        is_sigmoid=config.router_score == "sigmoid",
        renormalises=config.norm_topk_prob,
    )


def _places(layers: Sequence[int], config: ByteModelConfig) -> Integers:
    """For each of the model's layers, its place among `layers`; -1: it is none of them."""
    return np.array([layers.index(n) if n in layers else -1 for n in range(config.num_hidden_layers)], dtype=np.int64)


def _whole_panels(bias_LN: Floats) -> Floats:
    """With zeros for the rows that complete the last panel."""
    return np.pad(bias_LN, ((0, 0), (0, -bias_LN.shape[1] % PANEL_ROWS)))
