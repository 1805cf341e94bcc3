"""Quantized models as folders of compressed-tensors, which transformers and vLLM read.

int4 and int8 become pack-quantized, symmetric, with a scale for each group of inputs;
`stellarbyte.checkpoint.quantized.compressed_tensors` describes the layout. transformers reads no packed zero points
(compressed-tensors 0.20), so int4 has none. The head stays as it is, and activations are not quantized.
"""

from collections.abc import Mapping
from functools import partial

import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from stellarbyte.checkpoint.hugging_face.folder import HIDDEN_ACTS, MODEL_TYPES, translate_config
from stellarbyte.checkpoint.plan import PlannedTensor
from stellarbyte.checkpoint.quantized.matrix import CODES, SCALES, ZEROS
from stellarbyte.checkpoint.safetensors_file import DTYPES, TensorInfo
from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.quantization.grid import GROUPS
from stellarbyte.compress.quantization.settings import Quantization
from stellarbyte.config import ByteModelConfig

# N outputs, K inputs, G groups of inputs, W words of 32 bits

_BITS = {"int4": 4, "int8": 8}
_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("tie_word_embeddings", "rope_parameters", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_NOT_OF_THE_MODEL = ("architectures", "dtype", "transformers_version", "use_cache", "_name_or_path", "model_type")


def dtype_of(config: ByteModelConfig, tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """Of the folder's scales: as stored, since programs read them in the model's dtype.

    Raises:
        CompressError: transformers has no class for this model.
    """
    _model_config(config)
    return DTYPES[tensors["model.embed_tokens.weight"].dtype]


def folder_config(config: ByteModelConfig, quantization: Quantization) -> PreTrainedConfig:
    """config.json of the folder.

    Raises:
        CompressError: transformers has no class for this model, or the format has no such numbers; the message says
            why.
    """
    if quantization.kind not in _BITS:
        raise CompressError(f"The format compressed-tensors is written for int4 and int8, not for {quantization.kind}.")
    found = _model_config(config)
    found.architectures = [MODEL_TYPES[found.model_type]]
    found.dtype = config.dtype
    weights = {
        "num_bits": _BITS[quantization.kind],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUPS[quantization.kind],
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    found.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return found


def _model_config(config: ByteModelConfig) -> PreTrainedConfig:
    """The config of transformers' class for the same model: that whose translation gives `config` again."""
    fields = {name: getattr(config, name) for name in _COPIED}
    acts = {ours: theirs for theirs, ours in reversed(HIDDEN_ACTS.items())}
    fields["hidden_act"] = acts[config.hidden_act]
    windows = {"sliding_window": config.sliding_window}
    of_layers = {"use_sliding_window": config.sliding_window is not None, "layer_types": config.layer_types, **windows}
    if config.qk_norm:
        found = Qwen3Config(**fields, attention_bias=config.attention_bias, **of_layers)
    elif config.attention_bias and not config.attention_output_bias:
        found = Qwen2Config(**fields, **of_layers)
    elif config.sliding_window is not None:
        found = MistralConfig(**fields, **windows)
    else:
        found = LlamaConfig(**fields, attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    headers = {} if config.tie_word_embeddings else {"lm_head.weight": None}
    wanted, back = config.to_dict(), translate_config(found, headers, config.dtype).to_dict()  # type: ignore[arg-type]
    for name in wanted | back:  # in the config's order, so that the same model always gets the same sentence
        if name not in _NOT_OF_THE_MODEL and wanted.get(name) != back.get(name):
            raise CompressError(
                f"The format compressed-tensors is for models that are Llama, Mistral, Qwen2 or Qwen3; this model has "
                f"{name} = {wanted.get(name)!r}, where {MODEL_TYPES[found.model_type]} has {back.get(name)!r}."
            )
    return found


def packed_tensors(tensors: Mapping[str, PlannedTensor]) -> dict[str, PlannedTensor]:
    """The tensors of a checkpoint in the names and the layout of compressed-tensors, in the same order."""
    found: dict[str, PlannedTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(CODES):
            module = name.removesuffix(f".weight{CODES}")
            bits = 4 if tensor.dtype == torch.uint8 else 8
            rows, columns = tensor.shape[0], tensor.shape[1] * (8 // bits)
            found[f"{module}.weight_packed"] = PlannedTensor(
                dtype=torch.int32, shape=(rows, columns * bits // 32), read=partial(_packed_codes, tensor, bits)
            )
            shape = torch.tensor([rows, columns])
            found[f"{module}.weight_shape"] = PlannedTensor(dtype=torch.int64, shape=(2,), read=shape.clone)
        elif name.endswith(SCALES):
            found[f"{name.removesuffix(SCALES)}_scale"] = tensor
        elif not name.endswith(ZEROS):  # which are all 8
            found[name] = tensor
    return found


def _packed_codes(tensor: PlannedTensor, bits: int) -> torch.Tensor:
    """int32 [N, W]. Two codes of int4 are in a byte as words have them; int8 is stored as code + 128."""
    codes = tensor.read()
    if bits == 8:
        codes = (codes.short() + 128).to(torch.uint8)
    return codes.contiguous().view(torch.int32)
