"""A Hugging Face folder as a conversion plan. Runs no code from the folder."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from stellarbyte.checkpoint.errors import CheckpointError, one_line
from stellarbyte.checkpoint.hugging_face.experts import MATRIX, expert_name, with_stacked_experts
from stellarbyte.checkpoint.hugging_face.families import FAMILIES, Piece, common_rope, family_options, pieces
from stellarbyte.checkpoint.hugging_face.interleaved_experts import interleaved_experts, is_stack
from stellarbyte.checkpoint.hugging_face.tokenizer import read_tokenizer
from stellarbyte.checkpoint.native import read_generation
from stellarbyte.checkpoint.plan import ConversionPlan, PlannedTensor
from stellarbyte.checkpoint.quantized.formats import FORMATS, quantization_of, read_quantized, refuse_other_formats
from stellarbyte.checkpoint.quantized.matrix import CODES
from stellarbyte.checkpoint.quantized.origin import Origin
from stellarbyte.checkpoint.quantized.plan import is_of_expert, planned_numbers, planned_parts, without_uneven_experts
from stellarbyte.checkpoint.quantized.source import QuantizedSource
from stellarbyte.checkpoint.safetensors_file import DTYPES, TensorInfo, read_headers, read_json, read_tensor
from stellarbyte.checkpoint.shapes import expected_shapes, matrix_names
from stellarbyte.config import ByteModelConfig

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    **{model_type: family.model_class for model_type, family in FAMILIES.items()},
}
# Types of which the class reads sliding_window, layer_types, and attention_bias (which includes a bias on o)
WINDOWED = (
    *("mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo3", "gemma2", "gemma3_text", "ministral"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"),
)
LAYERED = ("qwen2", "qwen3", "qwen2_moe", "smollm3", "olmo3", "gemma2", "gemma3_text", "ministral", "gpt_oss")
BIASED = (
    *("llama", "qwen3", "smollm3", "granite", "olmo2", "olmo3", "gemma2", "gemma3_text"),
    *("qwen3_moe", "olmoe", "gpt_oss"),
)
HIDDEN_ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
LINEAR_ATTENTION = "linear_num_value_heads"  # a field of the hybrids Qwen3-Next and Qwen3.5
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def plan_folder(folder: Path, dtype: torch.dtype | None = None) -> ConversionPlan:
    """Read a folder's config, headers and small tensors.

    Args:
        dtype: of the target; None: every tensor as stored, bit for bit. Quantized matrices that a checkpoint cannot
            keep become float32 then; if all do, so do the others.

    Raises:
        CheckpointError: anything is missing, corrupt or not supported; the message names it.
    """
    refuse_unsupported(folder)
    headers = _read_weight_headers(folder)
    raw = read_json(folder / "config.json")
    model_type, quantization = raw["model_type"], quantization_of(raw)
    is_interleaved = _has_interleaved_experts(model_type)
    quantized = None
    if quantization is not None and not is_interleaved:
        quantized = read_quantized(folder, quantization, headers)
    config = read_config(folder, headers, torch.float32 if dtype is None and quantized is not None else dtype)
    tokenizer = read_tokenizer(folder)
    experts = interleaved_experts(folder, headers) if is_interleaved else {}
    plain = {
        name: info
        for name, info in (headers if quantized is None else quantized.plain).items()
        if not _is_derived(name, config) and not (is_interleaved and is_stack(name))
    }
    if quantized is not None:
        plain = _without_empty_biases(model_type, plain, quantized, config)
    for name, info in plain.items():
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{info.file} holds {name} as {info.dtype}; only {', '.join(DTYPES)} are supported.")
    matrices = {} if quantized is None else _planned_matrices(model_type, quantized, config, dtype)
    if matrices and dtype is None and not any(name.endswith(CODES) for name in matrices):
        dtype = torch.float32  # which the dequantized matrices have
    widest = torch.float32 if dtype is None and matrices else dtype  # as experts that were quantized
    planned = matrices | {
        piece.name: _planned(name, info, piece, widest if is_of_expert(name) else dtype)
        for name, info in plain.items()
        for piece in pieces(model_type, expert_name(name), info.shape[0] if info.shape else 0, config)
    }
    return ConversionPlan(
        source=folder,
        config=config,
        generation=_generation_defaults(folder, config, tokenizer.eos_token_id),
        tensors=with_stacked_experts(folder, planned, config)
        | {name: tensor if dtype is None else tensor.cast(dtype) for name, tensor in experts.items()},
        write_tokenizer=tokenizer.write,
        origin=None if quantized is None else Origin(format=quantized.format, notes=quantized.notes),
    )


def _without_empty_biases(
    model_type: str, plain: Mapping[str, TensorInfo], source: QuantizedSource, config: ByteModelConfig
) -> dict[str, TensorInfo]:
    """The tensors without the zeros that AutoGPTQ stores as biases of linears that have none."""
    expected = expected_shapes(config)

    def is_empty(name: str, info: TensorInfo) -> bool:
        if not name.endswith(".bias") or f"{name.removesuffix('bias')}weight" not in source.matrices:
            return False
        is_known = all(piece.name in expected for piece in pieces(model_type, name, info.num_elements, config))
        return not is_known and not read_tensor(name, info).any()

    return {name: info for name, info in plain.items() if not is_empty(name, info)}


def _has_interleaved_experts(model_type: str) -> bool:
    return model_type in FAMILIES and FAMILIES[model_type].has_interleaved_experts


def _planned(name: str, info: TensorInfo, piece: Piece, dtype: torch.dtype | None) -> PlannedTensor:
    shape = (piece.rows.stop - piece.rows.start, *info.shape[1:]) if info.shape else ()
    stored = PlannedTensor(dtype=DTYPES[info.dtype], shape=shape, read=partial(_read_piece, name, info, piece))
    return stored if dtype is None else stored.cast(dtype)


def _planned_matrices(
    model_type: str, source: QuantizedSource, config: ByteModelConfig, dtype: torch.dtype | None
) -> dict[str, PlannedTensor]:
    """Kept as they are, if the checkpoint's form can hold them; else, or where a dtype is given, dequantized."""
    may_be_kept = matrix_names(config)
    planned: dict[str, PlannedTensor] = {}
    for name, matrix in without_uneven_experts(source).items():
        for piece in pieces(model_type, expert_name(name), matrix.shape[0], config):
            is_kept = dtype is None and matrix.parts is not None
            if is_kept and (piece.name in may_be_kept or MATRIX.fullmatch(piece.name)):
                planned |= planned_parts(piece.name, matrix, piece.rows, partial(_rows_of, piece))
            else:
                numbers = planned_numbers(matrix, piece.rows, partial(_rows_of, piece))
                planned[piece.name] = numbers if dtype is None else numbers.cast(dtype)
    return planned


def _rows_of(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    """The piece's rows of a whole tensor, in its order."""
    rows = tensor[piece.rows]
    return rows if piece.order is None else rows[list(piece.order)]


def read_config(folder: Path, headers: Mapping[str, TensorInfo], dtype: torch.dtype | None = None) -> ByteModelConfig:
    """The folder's config.json, translated; `headers` and `dtype` as in `translate_config`.

    Raises:
        CheckpointError: it is invalid, or describes features that a ByteTransformer lacks.
    """
    try:
        source = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return translate_config(source, headers, dtype)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be converted: {one_line(error)}.") from error


def refuse_unsupported(folder: Path) -> None:
    """Raise CheckpointError unless the folder's config.json is of a kind that can be translated."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json.")
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type == ByteModelConfig.model_type:
        raise CheckpointError(f"{folder} is a ByteTransformer checkpoint already; it needs no conversion.")
    text_config = raw.get("text_config")  # of a model that also reads pictures
    if LINEAR_ATTENTION in raw or (isinstance(text_config, dict) and LINEAR_ATTENTION in text_config):
        raise CheckpointError(
            f"{folder} holds a model of type {model_type!r}, whose linear-attention layers (Gated DeltaNet) are not "
            "supported."
        )
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise CheckpointError(f"{folder} holds a model of type {model_type!r}; supported are {', '.join(MODEL_TYPES)}.")
    architectures = raw.get("architectures")
    if architectures and architectures != [MODEL_TYPES[model_type]]:
        raise CheckpointError(f"{folder} holds {architectures[0]}, not {MODEL_TYPES[model_type]}.")
    if (quantization := quantization_of(raw)) is not None:
        refuse_other_formats(folder, quantization, ("mxfp4",) if _has_interleaved_experts(model_type) else FORMATS)


def _read_weight_headers(folder: Path) -> dict[str, TensorInfo]:
    if not any(folder.glob("*.safetensors*")):
        for pattern in PICKLES:
            if pickles := sorted(folder.glob(pattern)):
                raise CheckpointError(
                    f"{pickles[0]} is a pickle, which can run code when it is read; "
                    "only safetensors weights are supported."
                )
    return read_headers(folder)


def translate_config(
    source: PreTrainedConfig, headers: Mapping[str, TensorInfo], dtype: torch.dtype | None = None
) -> ByteModelConfig:
    """The config of the ByteTransformer equivalent to `source` with the tensors that `headers` describe.

    `dtype` is that of the stored weights; None: the embedding's.

    Raises:
        ValueError: the source uses a feature that a ByteTransformer lacks.
    """
    kind = source.model_type
    hidden_act = getattr(source, "hidden_activation", None) or source.hidden_act  # Gemma has the former
    if hidden_act not in HIDDEN_ACTS:
        raise ValueError(f"hidden_act {hidden_act!r} is not supported")
    # Any config may contain these fields, but not all of transformers' classes read them.
    window = getattr(source, "sliding_window", None) if kind in WINDOWED else None
    layer_types = getattr(source, "layer_types", None) if kind in LAYERED else None
    if layer_types is not None and "sliding_attention" not in layer_types:
        window = None
    attention_bias = bool(kind in BIASED and source.attention_bias)
    if dtype is None and (embedding := headers.get("model.embed_tokens.weight")) is not None:
        dtype = DTYPES.get(embedding.dtype)
    fields: dict[str, Any] = dict(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=getattr(source, "head_dim", None),
        hidden_act=HIDDEN_ACTS[hidden_act],
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        initializer_range=source.initializer_range,
        tie_word_embeddings=source.tie_word_embeddings and _is_head_tied(headers),
        attention_bias=attention_bias or kind == "qwen2",
        attention_output_bias=attention_bias,
        mlp_bias=bool(kind in ("llama", "smollm3", "granite") and source.mlp_bias),
        qk_norm=kind == "qwen3",
        sliding_window=window,
        layer_types=layer_types,
        rope_parameters=common_rope(source),
        use_xpos=False,
        attention_dropout=source.attention_dropout or 0.0,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
        dtype=dtype,
    )
    return ByteModelConfig(**(fields | family_options(source)))


def _is_head_tied(headers: Mapping[str, TensorInfo]) -> bool:
    """Whether the head is tied; False if the folder stores a different head, as in transformers."""
    head, embedding = headers.get("lm_head.weight"), headers.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return not any(name.startswith("lm_head.") for name in headers)  # as for a quantized head
    return head.dtype == embedding.dtype and torch.equal(
        read_tensor("lm_head.weight", head),
        read_tensor("model.embed_tokens.weight", embedding),
    )


def _is_derived(name: str, config: ByteModelConfig) -> bool:
    """Whether the target computes this tensor instead of storing it."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _read_piece(name: str, info: TensorInfo, piece: Piece) -> torch.Tensor:
    if piece.rows == slice(0, info.shape[0] if info.shape else 0):
        tensor = read_tensor(name, info)
    else:
        try:
            with safe_open(info.file, framework="pt") as tensors:
                tensor = tensors.get_slice(name)[piece.rows]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file} cannot be read: {one_line(error)}.") from error
    return tensor if piece.order is None else tensor[list(piece.order)]


def _generation_defaults(folder: Path, config: ByteModelConfig, tokenizer_eos: int | None) -> dict[str, Any]:
    """generation_config.json; absent token ids are taken from the config, then from the tokenizer."""
    given = {
        name: value
        for name, value in read_generation(folder).items()
        if value is not None and not name.startswith("_") and name != "cache_implementation"  # one of transformers'
    }
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokenizer_eos is not None and read_json(folder / "config.json").get("eos_token_id") is None:
        ids["eos_token_id"] = tokenizer_eos  # the config's is its class's default, for another vocabulary
    return {name: value for name, value in ids.items() if value is not None} | given
