"""The weights of a layer's experts as the GPU kernels read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stellarbyte.backends.gpu.matrices import GpuMatrices
from stellarbyte.backends.gpu.products import PackedWeight
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.model.mlp import ClampedSwiglu
from stellarbyte.model.parts import Part, module_path
from stellarbyte.ops.triton.moe.layer import Experts
from stellarbyte.ops.triton.moe.routing import Router
from stellarbyte.ops.triton.weights import ExpertWeight

# E experts, N outputs, K inputs, C hidden size, I intermediate size

_ROUTER = "mlp.gate"
_EXPERTS = "mlp.experts"
_SHARED = "mlp.shared_expert"
_SHARED_GATE = "mlp.shared_expert_gate"


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """An MLP of every token, beside the chosen ones."""

    gate_up: PackedWeight
    down: PackedWeight
    gate_1C: torch.Tensor | None  # of a sigmoid that multiplies its output; None: 1


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """Router and experts of a layer in the place of its MLP."""

    router: Router
    experts: Experts
    shared: SharedExpert | None


def expert_parts(parts: Sequence[Part]) -> list[Part]:
    """The parts of the layer that `pack_experts` packs."""
    prefixes = tuple(f"{name}." for name in (_ROUTER, _EXPERTS, _SHARED))
    return [part for part in parts if part.name.startswith(prefixes) or part.name == _SHARED_GATE]


def pack_experts(
    model: ByteLanguageModel,
    config: ByteModelConfig,
    layer: int,
    parts: Sequence[Part],
    *,
    matrices: GpuMatrices,
    pack: Callable[[Sequence[Part]], PackedWeight],
    pool: Experts | None,
) -> ExpertLayer:
    """Pack the router and the experts of one layer. Quantization frees the model's own matrices.

    Args:
        parts: `expert_parts` of the layer.
        pack: stacks linears of this layer.
        pool: packed experts of an earlier layer that this one shares; None: it has experts of its own.

    Raises:
        ValueError: the kernels do not support this router.
    """
    if config.router_top_p is not None:
        raise ValueError("the GPU kernels do not support router_top_p")
    names = {part.name: part for part in parts}

    def vector_E(name: str) -> torch.Tensor | None:
        is_there = f"{_ROUTER}.{name}" in names
        return model.get_parameter(module_path(layer, f"{_ROUTER}.{name}")).data.float() if is_there else None

    router = Router(
        weight_EC=model.get_parameter(module_path(layer, f"{_ROUTER}.weight")).data,
        top_k=config.num_experts_per_tok,
        score=config.router_score,
        renormalizes=config.norm_topk_prob,
        bias_E=vector_E("bias"),
        selection_bias_E=vector_E("e_score_correction_bias"),
    )
    shared = None
    if f"{_SHARED}.down_proj" in names:
        gate = f"{module_path(layer, _SHARED_GATE)}.weight"
        shared = SharedExpert(
            gate_up=pack([names[f"{_SHARED}.gate_proj"], names[f"{_SHARED}.up_proj"]]),
            down=pack([names[f"{_SHARED}.down_proj"]]),
            gate_1C=model.get_parameter(gate).data if _SHARED_GATE in names else None,
        )
    return ExpertLayer(router=router, experts=pool or _pack_matrices(model, config, layer, matrices), shared=shared)


def _pack_matrices(model: ByteLanguageModel, config: ByteModelConfig, layer: int, matrices: GpuMatrices) -> Experts:
    path = module_path(layer, _EXPERTS)
    module = model.get_submodule(path)

    def pack(name: str) -> ExpertWeight:
        bias_EN = module.get_parameter(f"{name}_bias").data if config.expert_bias else None
        weight = matrices.experts(f"{path}.{name}", bias_EN)
        if weight.scales_EN is not None:
            nothing = weight.scales_EN.new_empty(0, dtype=matrices.dtype)
            setattr(module, name, torch.nn.Parameter(nothing, requires_grad=False))
        return weight

    return Experts(gate_up=pack("gate_up_proj"), down=pack("down_proj"), swiglu=ClampedSwiglu.of(config))
