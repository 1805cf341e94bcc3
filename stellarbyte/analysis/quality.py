"""How well a model predicts a text: bits per byte, which compares models with different tokenizers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from stellarbyte.analysis.text import TokenizedText
from stellarbyte.model.transformer import ByteTransformer

CONTEXT = 512  # tokens


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Attributes: num_predicted: tokens with a probability by the model; perplexity: of these, by token; bits_per_byte:
    of the whole text, (log2 V for a first token that nothing precedes + Σ -log2 p) / bytes, which is the length of the
    text coded by the model."""

    num_bytes: int
    num_tokens: int
    num_predicted: int
    num_unknown: int
    context: int
    perplexity: float
    bits_per_byte: float


@torch.inference_mode()
def measure_quality(model: ByteTransformer, text: TokenizedText, context: int = CONTEXT) -> Quality:
    """Computed in contexts of at most `context` tokens; each begins with the last token of the one before.

    Log-probabilities are taken in float32 and summed in float64. A special token before the text costs nothing; without
    one, the first token costs as much as one of V equally likely ones.
    """
    context = min(context, model.config.max_position_embeddings)
    nats, num_predicted = 0.0, 0
    for start, ids in _contexts(text.ids, context):
        given = max(1, text.num_special - start)  # tokens that are not predicted
        logits_TV = model(torch.tensor([ids[:-1]], device=model.device), use_cache=False).logits[0, given - 1 :]
        targets_T = torch.tensor(ids[given:], device=model.device)
        nats += float(F.cross_entropy(logits_TV.float(), targets_T, reduction="none").double().sum())
        num_predicted += len(targets_T)
    first = 0.0 if text.num_special else math.log2(model.config.vocab_size)
    return Quality(
        num_bytes=text.text.num_bytes,
        num_tokens=len(text.ids),
        num_predicted=num_predicted,
        num_unknown=text.num_unknown,
        context=context,
        perplexity=math.exp(min(nats / num_predicted, 700.0)),
        bits_per_byte=(first + nats / math.log(2)) / text.text.num_bytes,
    )


def _contexts(ids: tuple[int, ...], context: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(index of the first, up to context + 1 tokens, of which the last is only predicted)."""
    for start in range(0, len(ids) - 1, context):
        yield start, ids[start : start + context + 1]
