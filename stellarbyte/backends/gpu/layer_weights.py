"""The weights of a layer as the GPU kernels read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from stellarbyte.backends.gpu.expert_weights import ExpertLayer, expert_parts, pack_experts
from stellarbyte.backends.gpu.matrices import GpuMatrices
from stellarbyte.backends.gpu.products import PackedWeight, rows_of
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import Projections
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.model.norm import ByteRMSNorm
from stellarbyte.model.parts import (
    ATTENDED,
    ATTENTION_INPUT,
    GATED,
    MLP_INPUT,
    Part,
    layer_parts,
    linears_by_input,
    module_path,
)
from stellarbyte.model.residual import LayerScale
from stellarbyte.ops.triton.weights import Weight

# N outputs, K inputs, C hidden size, D head dim

_INPUTS = {ATTENTION_INPUT: "qkv", ATTENDED: "output", MLP_INPUT: "gate_up", GATED: "down"}  # of linears → fields
_VECTORS = {  # norms, scales and bare vectors → fields of `Layer`
    "input_layernorm": "input_norm_C",
    "attention_output_norm": "attention_output_norm_C",
    "post_attention_layernorm": "mlp_norm_C",
    "mlp_output_norm": "mlp_output_norm_C",
    "self_attn.softmax_sink": "softmax_sink_H",
    "self_attn.q_norm": "q_norm_D",
    "self_attn.k_norm": "k_norm_D",
    "attention_scale": "attention_scale_C",
    "mlp_scale": "mlp_scale_C",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's weights; projections that share an input are packed into one matrix."""

    qkv: PackedWeight
    output: PackedWeight
    gate_up: PackedWeight | None = None  # None: the layer has experts
    down: PackedWeight | None = None
    experts: ExpertLayer | None = None
    input_norm_C: torch.Tensor | None = None
    attention_output_norm_C: torch.Tensor | None = None
    mlp_norm_C: torch.Tensor | None = None
    mlp_output_norm_C: torch.Tensor | None = None
    softmax_sink_H: torch.Tensor | None = None
    q_norm_D: torch.Tensor | None = None
    k_norm_D: torch.Tensor | None = None
    qk_norm_N: torch.Tensor | None = None  # of one norm over all of q and one over all of k, instead of those
    attention_scale_C: torch.Tensor | None = None  # LayerScale and the residual multiplier
    mlp_scale_C: torch.Tensor | None = None
    window: int | None

    @property
    def matrices(self) -> list[PackedWeight]:
        """Of attention and of the MLP that every token has."""
        return [weight for weight in (self.qkv, self.output, self.gate_up, self.down) if weight is not None]


def pack_layer(
    model: ByteLanguageModel, config: ByteModelConfig, layer: int, matrices: GpuMatrices, earlier: Sequence[Layer] = ()
) -> Layer:
    """Pack one layer's weights. Quantization frees the model's own matrices, which are those of `matrices`.

    Args:
        earlier: the layers before it, whose experts it may share.

    Raises:
        ValueError: the kernels do not support a part of the layer.
    """
    of_experts = expert_parts(layer_parts(config, layer))
    parts = [part for part in layer_parts(config, layer) if part not in of_experts]
    if unknown := [part.name for part in parts if part.name not in _VECTORS and part.reads not in _INPUTS]:
        raise ValueError(f"the GPU kernels do not support {unknown[0]}")

    def pack(group: Sequence[Part]) -> PackedWeight:
        """Stack the matrices of linears. The linears get views of the result, or nothing, so that no memory is held
        twice."""
        paths = [module_path(layer, part.name) for part in group]
        linears = [cast(torch.nn.Linear, model.get_submodule(path)) for path in paths]
        bias_N = None
        if any(linear.bias is not None for linear in linears):
            bias_N = torch.cat([_bias(linear) for linear in linears])
        weight = matrices.packed([f"{path}.weight" for path in paths], bias_N)
        heights = [linear.out_features for linear in linears]
        if isinstance(weight, Weight) and weight.scales_N is None:
            matrix_NK = weight.matrix_NK
        else:
            matrix_NK = torch.empty(sum(heights), 0, dtype=matrices.dtype, device=weight.device)
        for linear, rows in zip(linears, matrix_NK.split(heights), strict=True):
            linear.weight = torch.nn.Parameter(rows, requires_grad=False)
        return weight

    fields: dict[str, Any] = {_INPUTS[name]: pack(group) for name, group in linears_by_input(parts).items()}
    for part in parts:
        if part.kind == "parameter":
            fields[_VECTORS[part.name]] = model.get_parameter(module_path(layer, part.name)).data
        elif part.reads is None:
            module = model.get_submodule(module_path(layer, part.name))
            assert isinstance(module, ByteRMSNorm | LayerScale)
            fields[_VECTORS[part.name]] = module.gain
    if not config.qk_norm_per_head:
        fields["qk_norm_N"] = torch.cat([fields.pop("q_norm_D"), fields.pop("k_norm_D")])
    if config.residual_multiplier != 1:
        one_C = torch.ones(config.hidden_size, device=fields["output"].device)
        for name in ("attention_scale_C", "mlp_scale_C"):  # float32: the multiplier is not rounded
            fields[name] = config.residual_multiplier * fields.get(name, one_C).float()
    if of_experts:
        holder = config.expert_layers[layer]
        assert holder is not None  # a layer with a router has experts
        pool = earlier[holder].experts if holder < layer else None
        fields["experts"] = pack_experts(
            model, config, layer, of_experts, matrices=matrices, pack=pack,
            pool=None if pool is None else pool.experts,
        )  # fmt: skip
    return Layer(**fields, window=config.windows[layer])


def part_of(weights: Layer, projections: Projections, layer: int, number: int) -> torch.Tensor:
    """The matrix [out, in] of one projection of a layer; of quantized weights in float32."""
    name, group = next(
        (name, group) for name, group in projections.shared_inputs.items() if group.start <= number < group.stop
    )
    heights = [out for out, _ in projections.shapes[layer][group]]
    first = sum(heights[: number - group.start])
    return rows_of(getattr(weights, _INPUTS[name]), slice(first, first + heights[number - group.start]))


def _bias(linear: torch.nn.Linear) -> torch.Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data
