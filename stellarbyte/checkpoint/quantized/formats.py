"""The formats of quantized folders, by the quant_method of their config."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from stellarbyte.checkpoint.errors import CheckpointError, one_line
from stellarbyte.checkpoint.quantized.awq import read_awq
from stellarbyte.checkpoint.quantized.bitsandbytes import read_bitsandbytes
from stellarbyte.checkpoint.quantized.compressed_tensors import read_compressed_tensors
from stellarbyte.checkpoint.quantized.gptq import read_gptq
from stellarbyte.checkpoint.quantized.scaled import read_fp8
from stellarbyte.checkpoint.quantized.source import Entries, QuantizedSource
from stellarbyte.checkpoint.safetensors_file import TensorInfo

FORMATS: Mapping[str, Callable[[Entries, Mapping[str, Any]], QuantizedSource]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "bitsandbytes": read_bitsandbytes,
}


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The part of a config.json that says how weights are quantized; None: they are not."""
    return config.get("quantization_config", config.get("compression_config"))


def refuse_other_formats(folder: Path, quantization: object, formats: Collection[str]) -> None:
    """Raise CheckpointError unless the weights are quantized in one of the formats."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(method, str) or method not in formats:
        raise CheckpointError(
            f"{folder} is quantized with {method!r}, which is not supported; this model may be in {', '.join(formats)}."
        )


def read_quantized(folder: Path, quantization: Mapping[str, Any], headers: Mapping[str, TensorInfo]) -> QuantizedSource:
    """The quantized matrices and the other tensors of a folder of one of `FORMATS`. Reads small tensors only.

    Raises:
        CheckpointError: its layout is not supported, or tensors do not fit each other; the message names it.
    """
    method = quantization["quant_method"]
    try:
        source = FORMATS[method](Entries(folder, headers), quantization)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is quantized with {method!r} in a way that cannot be read: {one_line(error)}."
        ) from error
    if not source.matrices:
        raise CheckpointError(f"{folder} says that it is quantized with {method!r}, but no tensor is.")
    return source
