"""ByteTransformer checkpoints: native folders, conversion from Hugging Face folders and GGUF, the demo model."""

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.demo import resolve_model
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.info import ModelInfo, describe
from stellarbyte.checkpoint.native import Checkpoint, load_config, load_model, open_checkpoint, weights_hash
from stellarbyte.checkpoint.shapes import expected_shapes

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ModelInfo",
    "convert",
    "describe",
    "expected_shapes",
    "load_config",
    "load_model",
    "open_checkpoint",
    "resolve_model",
    "weights_hash",
]
