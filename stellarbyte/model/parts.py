"""The table of a decoder layer's parts: names, shapes, shared inputs, and names in other formats."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from stellarbyte.config import ByteModelConfig

Shape = tuple[int, ...]
Condition = Callable[[ByteModelConfig, int], bool]  # of a config and a layer's number

# Inputs of linears
ATTENTION_INPUT = "attention_input"
ATTENDED = "attended"
MLP_INPUT = "mlp_input"
GATED = "gated"
SHARED_EXPERT_INPUT = "shared_expert_input"
SHARED_EXPERT_GATED = "shared_expert_gated"


def _always(_config: ByteModelConfig, _layer: int) -> bool:
    return True


def _never(_config: ByteModelConfig, _layer: int) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module of a layer that has parameters, or a bare parameter. Functions take the config and the layer: layers may
    differ."""

    name: str  # within the layer, as in checkpoints
    kind: Literal["linear", "norm", "scale", "parameter"]  # nn.Linear, ByteRMSNorm, LayerScale, nn.Parameter
    shape: Callable[[ByteModelConfig, int], Shape]  # of the weight: (out, in), or (size,) of a norm or scale
    exists: Condition = _always
    has_bias: Condition = _never
    reads: str | None = None  # the input of a linear; linears with one input are packed into one product; None: alone
    cut: Literal["out", "in", "experts"] | None = None  # axis that tensor-parallel ranks divide; None: replicated
    reads_heads: bool = False  # each head alone: ranks have the weight whole, but see the gradient of their own heads
    rotated_heads: Callable[[ByteModelConfig], int] | None = None  # heads in the rows of a linear, if RoPE rotates them
    is_adaptable: bool = False  # by LoRA in serving
    has_deepnorm_gain: bool = False  # of its initial weights
    gguf: str | None = None  # its name in GGUF files, of a parameter with the ending; None: not stored there
    hugging_face: str | None = None  # another name in Hugging Face folders; None: the same


def _query_size(config: ByteModelConfig) -> int:
    assert config.head_dim is not None  # ByteModelConfig sets it
    return config.num_attention_heads * config.head_dim


def _key_size(config: ByteModelConfig) -> int:
    assert config.head_dim is not None
    return _num_kv_heads(config) * config.head_dim


def _num_kv_heads(config: ByteModelConfig) -> int:
    assert config.num_key_value_heads is not None  # ByteModelConfig sets it
    return config.num_key_value_heads


def _q_norm_shape(config: ByteModelConfig, _layer: int) -> Shape:
    assert config.head_dim is not None
    return (config.head_dim if config.qk_norm_per_head else _query_size(config),)


def _k_norm_shape(config: ByteModelConfig, _layer: int) -> Shape:
    assert config.head_dim is not None
    return (config.head_dim if config.qk_norm_per_head else _key_size(config),)


def _hidden(config: ByteModelConfig, _layer: int) -> Shape:
    return (config.hidden_size,)


def _per_head(config: ByteModelConfig, _layer: int) -> Shape:
    return (config.num_attention_heads,)


def _has_qk_norm(config: ByteModelConfig, _layer: int) -> bool:
    return config.qk_norm


def _is_dense(config: ByteModelConfig, layer: int) -> bool:
    return config.expert_layers[layer] is None


def _has_router(config: ByteModelConfig, layer: int) -> bool:
    return config.expert_layers[layer] is not None


def _holds_experts(config: ByteModelConfig, layer: int) -> bool:
    return config.expert_layers[layer] == layer


def _has_expert_bias(config: ByteModelConfig, layer: int) -> bool:
    return config.expert_bias and _holds_experts(config, layer)


def _has_shared_expert(config: ByteModelConfig, layer: int) -> bool:
    return config.shared_expert_intermediate_size > 0 and _has_router(config, layer)


def _expert_size(config: ByteModelConfig) -> int:
    assert config.moe_intermediate_size is not None  # ByteModelConfig sets it
    return config.moe_intermediate_size


def _router(config: ByteModelConfig, _layer: int) -> Shape:
    return (config.num_experts, config.hidden_size)


def _has_output_norms(config: ByteModelConfig, _layer: int) -> bool:
    return config.branch_norms != "before"


def _has_layer_scale(config: ByteModelConfig, _layer: int) -> bool:
    return config.layer_scale_init is not None


# In the order of the model's own parameters. The names are those of transformers' Llama classes.
PARTS: tuple[Part, ...] = (
    Part(
        name="self_attn.softmax_sink", kind="parameter", gguf="attn_sinks.weight", hugging_face="self_attn.sinks",
        shape=_per_head, exists=lambda config, _: config.softmax_sink, cut="out",
    ),
    Part(
        name="self_attn.q_proj", kind="linear", gguf="attn_q", reads=ATTENTION_INPUT, cut="out", is_adaptable=True,
        shape=lambda config, _: (_query_size(config), config.hidden_size),
        has_bias=lambda config, _: config.attention_bias,
        rotated_heads=lambda config: config.num_attention_heads,
    ),
    Part(
        name="self_attn.k_proj", kind="linear", gguf="attn_k", reads=ATTENTION_INPUT, cut="out", is_adaptable=True,
        shape=lambda config, _: (_key_size(config), config.hidden_size),
        has_bias=lambda config, _: config.attention_bias,
        rotated_heads=_num_kv_heads,
    ),
    Part(
        name="self_attn.v_proj", kind="linear", gguf="attn_v", reads=ATTENTION_INPUT, cut="out", is_adaptable=True,
        shape=lambda config, _: (_key_size(config), config.hidden_size),
        has_bias=lambda config, _: config.attention_bias,
        has_deepnorm_gain=True,
    ),
    Part(
        name="self_attn.o_proj", kind="linear", gguf="attn_output", reads=ATTENDED, cut="in", is_adaptable=True,
        shape=lambda config, _: (config.hidden_size, _query_size(config)),
        has_bias=lambda config, _: config.attention_output_bias,
        has_deepnorm_gain=True,
    ),
    Part(
        name="self_attn.q_norm", kind="norm", gguf="attn_q_norm", shape=_q_norm_shape, exists=_has_qk_norm,
        reads_heads=True,
    ),
    Part(
        name="self_attn.k_norm", kind="norm", gguf="attn_k_norm", shape=_k_norm_shape, exists=_has_qk_norm,
        reads_heads=True,
    ),
    Part(
        name="mlp.gate_proj", kind="linear", gguf="ffn_gate", reads=MLP_INPUT, cut="out", is_adaptable=True,
        exists=_is_dense,
        shape=lambda config, _: (config.intermediate_size, config.hidden_size),
        has_bias=lambda config, _: config.mlp_bias,
        has_deepnorm_gain=True,
    ),
    Part(
        name="mlp.up_proj", kind="linear", gguf="ffn_up", reads=MLP_INPUT, cut="out", is_adaptable=True,
        exists=_is_dense,
        shape=lambda config, _: (config.intermediate_size, config.hidden_size),
        has_bias=lambda config, _: config.mlp_bias,
        has_deepnorm_gain=True,
    ),
    Part(
        name="mlp.down_proj", kind="linear", gguf="ffn_down", reads=GATED, cut="in", is_adaptable=True,
        exists=_is_dense,
        shape=lambda config, _: (config.hidden_size, config.intermediate_size),
        has_bias=lambda config, _: config.mlp_bias,
        has_deepnorm_gain=True,
    ),
    Part(
        name="mlp.gate.weight", kind="parameter", gguf="ffn_gate_inp.weight", hugging_face="mlp.router.weight",
        shape=_router, exists=_has_router,
    ),
    Part(
        name="mlp.gate.bias", kind="parameter", gguf="ffn_gate_inp.bias", hugging_face="mlp.router.bias",
        shape=lambda config, _: (config.num_experts,),
        exists=lambda config, layer: config.router_bias and _has_router(config, layer),
    ),
    Part(
        name="mlp.gate.e_score_correction_bias", kind="parameter", shape=lambda config, _: (config.num_experts,),
        exists=lambda config, layer: config.router_selection_bias and _has_router(config, layer),
    ),
    Part(
        name="mlp.gate.noise_weight", kind="parameter", shape=_router,
        exists=lambda config, layer: config.router_noise == "noisy_top_k" and _has_router(config, layer),
    ),
    Part(
        name="mlp.experts.gate_up_proj", kind="parameter", gguf="ffn_gate_up_exps.weight", cut="experts",
        exists=_holds_experts,
        shape=lambda config, _: (config.num_experts, 2 * _expert_size(config), config.hidden_size),
    ),
    Part(
        name="mlp.experts.gate_up_proj_bias", kind="parameter", cut="experts", gguf="ffn_gate_up_exps.bias",
        shape=lambda config, _: (config.num_experts, 2 * _expert_size(config)), exists=_has_expert_bias,
    ),
    Part(
        name="mlp.experts.down_proj", kind="parameter", gguf="ffn_down_exps.weight", cut="experts",
        exists=_holds_experts,
        shape=lambda config, _: (config.num_experts, config.hidden_size, _expert_size(config)),
    ),
    Part(
        name="mlp.experts.down_proj_bias", kind="parameter", cut="experts", gguf="ffn_down_exps.bias",
        shape=lambda config, _: (config.num_experts, config.hidden_size), exists=_has_expert_bias,
    ),
    Part(
        name="mlp.shared_expert.gate_proj", kind="linear", gguf="ffn_gate_shexp", reads=SHARED_EXPERT_INPUT, cut="out",
        shape=lambda config, _: (config.shared_expert_intermediate_size, config.hidden_size),
        exists=_has_shared_expert, has_deepnorm_gain=True,
    ),
    Part(
        name="mlp.shared_expert.up_proj", kind="linear", gguf="ffn_up_shexp", reads=SHARED_EXPERT_INPUT, cut="out",
        shape=lambda config, _: (config.shared_expert_intermediate_size, config.hidden_size),
        exists=_has_shared_expert, has_deepnorm_gain=True,
    ),
    Part(
        name="mlp.shared_expert.down_proj", kind="linear", gguf="ffn_down_shexp", reads=SHARED_EXPERT_GATED, cut="in",
        shape=lambda config, _: (config.hidden_size, config.shared_expert_intermediate_size),
        exists=_has_shared_expert, has_deepnorm_gain=True,
    ),
    Part(
        name="mlp.shared_expert_gate", kind="linear", gguf="ffn_gate_inp_shexp",
        shape=lambda config, _: (1, config.hidden_size),
        exists=lambda config, layer: config.shared_expert_gate and _has_shared_expert(config, layer),
    ),
    Part(
        name="input_layernorm", kind="norm", gguf="attn_norm", shape=_hidden,
        exists=lambda config, _: config.branch_norms != "after",
    ),
    Part(
        name="attention_output_norm", kind="norm", gguf="post_attention_norm", shape=_hidden, exists=_has_output_norms,
    ),
    Part(
        name="post_attention_layernorm", kind="norm", gguf="ffn_norm", shape=_hidden,  # before the MLP
        exists=lambda config, _: not config.parallel_residual and config.branch_norms != "after",
    ),
    Part(name="mlp_output_norm", kind="norm", gguf="post_ffw_norm", shape=_hidden, exists=_has_output_norms),
    Part(name="attention_scale", kind="scale", shape=_hidden, exists=_has_layer_scale),
    Part(name="mlp_scale", kind="scale", shape=_hidden, exists=_has_layer_scale),
)  # fmt: skip


def layer_parts(config: ByteModelConfig, layer: int) -> tuple[Part, ...]:
    """The parts of one layer."""
    return tuple(part for part in PARTS if part.exists(config, layer))


def model_parts(config: ByteModelConfig) -> tuple[Part, ...]:
    """The parts that at least one layer has."""
    return tuple(part for part in PARTS if any(part.exists(config, layer) for layer in range(config.num_hidden_layers)))


def linears_by_input(parts: Iterable[Part]) -> dict[str, tuple[Part, ...]]:
    """The linears among `parts` by the input that they read; both in table order."""
    groups: dict[str, tuple[Part, ...]] = {}
    for part in parts:
        if part.reads is not None:
            groups[part.reads] = (*groups.get(part.reads, ()), part)
    return groups


def parameter_shapes(part: Part, config: ByteModelConfig, layer: int) -> dict[str, Shape]:
    """Name in the layer and shape of each of a part's parameters."""
    shapes = {parameter_name(part): part.shape(config, layer)}
    if part.has_bias(config, layer):
        shapes[f"{part.name}.bias"] = part.shape(config, layer)[:1]
    return shapes


def parameter_name(part: Part) -> str:
    """The name in the layer of a part's weight, or of the parameter that it is."""
    return part.name if part.kind == "parameter" else f"{part.name}.weight"


def module_path(layer: int, name: str) -> str:
    """The full name in the model of a layer's part, as adapter files have it."""
    return f"model.layers.{layer}.{name}"


def adaptable_modules(config: ByteModelConfig) -> dict[str, tuple[int, int]]:
    """The full name and (out, in) of every module that an adapter may change in serving."""
    found: dict[str, tuple[int, int]] = {}
    for layer in range(config.num_hidden_layers):
        for part in layer_parts(config, layer):
            if part.is_adaptable:
                out, width = part.shape(config, layer)
                found[module_path(layer, part.name)] = (out, width)
    return found
