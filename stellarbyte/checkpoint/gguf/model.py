"""A GGUF file as a conversion plan: config and tensors."""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType
from huggingface_hub.errors import StrictDataclassError

from stellarbyte.checkpoint.errors import CheckpointError, one_line
from stellarbyte.checkpoint.gguf.experts import expert_options, with_joined_experts
from stellarbyte.checkpoint.gguf.families import FAMILIES
from stellarbyte.checkpoint.gguf.file import FLOATS, GGUFFile, open_gguf
from stellarbyte.checkpoint.gguf.tokenizer import plan_tokenizer
from stellarbyte.checkpoint.plan import ConversionPlan, PlannedTensor
from stellarbyte.config import ByteModelConfig
from stellarbyte.model import parts
from stellarbyte.model.parts import Part, module_path

LINEAR_ATTENTION = ("qwen3next", "qwen35", "qwen35moe")  # hybrids
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FREQS = "rope_freqs.weight"
EXACT = FLOATS | {GGMLQuantizationType.MXFP4: torch.bfloat16}  # types of which a dtype holds every number
CHANGES_THE_MODEL = (  # metadata that forks of other architectures use; refused, as it would be ignored
    *("attention.scale", "attention.clamp_kqv", "attention.temperature_scale", "attention.max_alibi_bias"),
    *("logit_scale", "residual_scale", "embedding_scale", "attn_logit_softcapping", "final_logit_softcapping"),
)


def plan_gguf(path: Path, dtype: torch.dtype | None = None) -> ConversionPlan:
    """Read a file's metadata.

    Args:
        dtype: of the target; None: that of the matrices if all have one float type, with MXFP4 as bfloat16, or float32
            if any is quantised in another way.

    Raises:
        CheckpointError: the file is corrupt, or has an unsupported feature, which the message names.
    """
    file = open_gguf(path)
    try:
        return _plan(file, dtype)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path} cannot be converted: it has no {error.args[0]}.") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} cannot be converted: {one_line(error)}.") from error


def _plan(file: GGUFFile, dtype: torch.dtype | None) -> ConversionPlan:
    """`plan_gguf`, which also raises KeyError for absent metadata, and other exceptions for values of a wrong type."""
    path, metadata = file.path, file.metadata
    architecture = metadata["general.architecture"]
    if architecture in LINEAR_ATTENTION:
        raise CheckpointError(
            f"{path} has the architecture {architecture!r}, whose linear-attention layers (Gated DeltaNet) are not "
            "supported."
        )
    if architecture not in FAMILIES:
        raise CheckpointError(f"{path} has the architecture {architecture!r}; supported are {', '.join(FAMILIES)}.")
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge first."
        )
    tokenizer = plan_tokenizer(path, metadata)
    target_dtype = dtype if dtype is not None else _common_dtype(file)
    config = _translate_config(file, architecture, target_dtype, tokenizer.token_ids)
    planned = {
        name: PlannedTensor(
            dtype=tensor.dtype,
            shape=tensor.shape,
            read=partial(_read_tensor, file, name, _rotated_heads(architecture, name, config)),
        ).cast(target_dtype)
        for name, tensor in file.tensors.items()
        if name != ROPE_FREQS
    }
    return ConversionPlan(
        source=path,
        config=config,
        generation=tokenizer.token_ids,
        tensors={_target(path, architecture, name): tensor for name, tensor in with_joined_experts(planned).items()},
        write_tokenizer=tokenizer.write,
    )


def _common_dtype(file: GGUFFile) -> torch.dtype:
    small = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", ".bias")  # float32 in files of every type
    dtypes = {
        EXACT.get(tensor.type, torch.float32)
        for name, tensor in file.tensors.items()
        if len(tensor.shape) > 1 and not name.endswith(small)
    }
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _target(path: Path, architecture: str, name: str) -> str:
    """The target's name for a tensor."""
    for theirs, ours in FAMILIES[architecture].renamed.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    stem, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if stem in TENSORS:
            return f"{TENSORS[stem]}.{kind}"
        layer, part = _place(name)
        if part is not None:
            return module_path(layer, part.name if part.kind == "parameter" else f"{part.name}.{kind}")
    raise CheckpointError(f"{path} holds the tensor {name}, which is not supported.")


def _place(name: str) -> tuple[int, Part | None]:
    """Layer and part of a tensor's name; None: it is no part of a layer."""
    found = re.fullmatch(r"blk\.(\d+)\.((\w+)\.\w+)", name)
    if found is None:
        return 0, None
    return int(found[1]), next((part for part in parts.PARTS if part.gguf in (found[2], found[3])), None)


def _translate_config(
    file: GGUFFile, architecture: str, dtype: torch.dtype, token_ids: Mapping[str, Any]
) -> ByteModelConfig:
    """The config; raises KeyError for absent metadata and ValueError for features that a ByteTransformer lacks."""
    metadata = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    family = FAMILIES[architecture]
    for name in CHANGES_THE_MODEL:
        if name not in family.factors and metadata.get(name):
            raise ValueError(f"{architecture}.{name} is not supported")
    hidden, heads = (
        _number(metadata, architecture, "embedding_length"),
        _number(metadata, architecture, "attention.head_count"),
    )
    head_dim = metadata.get("attention.key_length", hidden // heads)
    if metadata.get("attention.value_length", head_dim) != head_dim:
        raise ValueError("keys and values of different width are not supported")
    if metadata.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError("a rotation of only a part of each head is not supported")
    layers = _number(metadata, architecture, "block_count")
    found = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if layers != found:
        raise ValueError(f"{architecture}.block_count is {layers}, but there are tensors of {found} layers")
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    context = _number(metadata, architecture, "context_length")
    window = metadata.get("attention.sliding_window") or None
    if window is not None and window >= context:
        window = None
    options = family.options(metadata, layers)
    if window is not None and architecture != "llama" and "layer_types" not in options:
        raise ValueError(
            f"{architecture}.attention.sliding_window is not supported: the file does not say in which layers"
        )
    return ByteModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=_number(metadata, architecture, "feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=_shortest(_number(metadata, architecture, "attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias=_has_bias(file, "self_attn.q_proj"),
        attention_output_bias=_has_bias(file, "self_attn.o_proj"),
        mlp_bias=_has_bias(file, "mlp.gate_proj"),
        sliding_window=window,
        rope_parameters={**_rope_parameters(file, metadata, head_dim), **family.rope},
        use_xpos=False,
        dtype=dtype,
        **token_ids,
        **expert_options(file, architecture, metadata),
        **options,
    )


def _has_bias(file: GGUFFile, name: str) -> bool:
    part = next(part for part in parts.PARTS if part.name == name)
    return f"blk.0.{part.gguf}.bias" in file.tensors


def _number(metadata: Mapping[str, Any], architecture: str, name: str) -> Any:
    if name not in metadata:
        raise KeyError(f"{architecture}.{name}")
    if not isinstance(metadata[name], int | float):
        raise ValueError(f"{architecture}.{name} is {type(metadata[name]).__name__}, one number is supported")
    return metadata[name]


def _shortest(value: float) -> float:
    """The decimal that a float32 was written from: 1e-05 instead of 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def _rope_parameters(file: GGUFFile, metadata: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base", 10000.0)}
    kind = metadata.get("rope.scaling.type", "none")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0))
    if "rope.scaling.type" not in metadata and factor != 1.0:
        kind = "linear"  # files older than rope.scaling.type
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor} | _yarn_parameters(metadata, factor)
    elif kind != "none":
        raise ValueError(f"rope.scaling.type {kind!r} is not supported")
    if ROPE_FREQS in file.tensors:
        if kind != "none":
            raise ValueError(f"{ROPE_FREQS} together with rope.scaling.type {kind!r} is not supported")
        rope |= _llama3_parameters(file.read(ROPE_FREQS).double(), rope["rope_theta"], head_dim)
    return rope


def _yarn_parameters(metadata: Mapping[str, Any], factor: float) -> dict[str, Any]:
    if metadata.get("rope.scaling.yarn_log_multiplier") or metadata.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise ValueError("rope.scaling.yarn_log_multiplier and yarn_ext_factor are not supported")
    found: dict[str, Any] = {"original_max_position_embeddings": metadata["rope.scaling.original_context_length"]}
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in metadata:
            found[name] = metadata[f"rope.scaling.yarn_{name}"]
    scale = metadata.get("rope.scaling.yarn_attn_factor", metadata.get("rope.scaling.attn_factor", 1.0))
    if scale != 1.0:
        found["attention_factor"] = scale * (1.0 + 0.1 * math.log(factor))
    return found


def _llama3_parameters(divisors: torch.Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling parameters of the divisors (float64 [head_dim / 2]) in the file.

    Files store only the divisors. All Llama 3.1 to 3.3 models share every parameter but the factor, which is the
    largest divisor; divisors that these parameters do not reproduce are refused.
    """
    if torch.all(divisors == 1):
        return {}
    factor = _shortest(divisors.max().item())
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = LLAMA3_ROPE["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-5, atol=0):
        raise ValueError(f"{ROPE_FREQS} holds a scaling that is not Llama 3's")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def _rotated_heads(architecture: str, name: str, config: ByteModelConfig) -> int:
    """Heads of a projection that the file stores for interleaved rotation; 0 for other tensors."""
    _, part = _place(name)
    if not FAMILIES[architecture].is_interleaved or part is None or part.rotated_heads is None:
        return 0
    return part.rotated_heads(config)


def _read_tensor(file: GGUFFile, name: str, rotated_heads: int) -> torch.Tensor:
    tensor = file.read(name)
    return unpermute(tensor, rotated_heads) if rotated_heads else tensor


def unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection (weight or bias) from interleaved rotation order to rotate-half order.

    llama.cpp rotates pairs (2j, 2j + 1) for this architecture, so its converter moves row j of each head to 2j and
    row j + D/2 to 2j + 1; this moves them back.
    """
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
