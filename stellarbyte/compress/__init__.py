"""Smaller models: quantized with calibration, or with attention heads, inner channels and weights removed."""

from stellarbyte.compress.errors import CompressError
from stellarbyte.compress.heads import head_importance, heads_to_keep, prune_heads
from stellarbyte.compress.neurons import prune_neurons, prune_weights
from stellarbyte.compress.pipeline import Report, compress
from stellarbyte.compress.pruning import Pruning
from stellarbyte.compress.quantization.settings import Quantization
from stellarbyte.compress.texts import Texts, own_answers, read_texts

__all__ = [
    "CompressError",
    "Pruning",
    "Quantization",
    "Report",
    "Texts",
    "compress",
    "head_importance",
    "heads_to_keep",
    "own_answers",
    "prune_heads",
    "prune_neurons",
    "prune_weights",
    "read_texts",
]
