"""Attention weights of a text, and what they tell of each head."""

from dataclasses import dataclass
from functools import partial

import torch

from stellarbyte.model.dense_attention import DenseAttention
from stellarbyte.model.positions import positions_of
from stellarbyte.model.transformer import ByteTransformer

MAX_TOKENS = 48  # whose labels can still be read in a picture

# L layers, H query heads, T tokens as queries, S = T tokens as keys


@dataclass(frozen=True, kw_only=True)
class HeadFigures:
    """Of one head: means over the queries after the first, which can only see itself.

    Attributes:
        first: weight on the sequence's first tokens: `sink_tokens` of the config, at least one.
        distance: Σ weight · (m - n) / Σ weight, in tokens.
        entropy: -Σ w log2 w of the weights w divided by their sum, in bits.
        nothing: weight on the sink of the softmax, which has no value (`softmax_sink`); 0 without it.
    """

    layer: int
    head: int
    first: float
    distance: float
    entropy: float
    nothing: float


@torch.inference_mode()
def attention_weights(model: ByteTransformer, ids: tuple[int, ...]) -> torch.Tensor:
    """[L, H, T, S] float32 on the CPU: of every layer, for one sequence. Rows sum to 1, less the softmax's sink.

    The softmax is computed by plain torch operations in float32; scores in the model's dtype.
    """
    config = model.config
    embeddings = model.model.embed_tokens(torch.tensor([ids], device=model.device))
    places = positions_of(embeddings, None, None, None, cache=None, memory=None, context=config.max_position_embeddings)
    recorded: dict[int, list[torch.Tensor]] = {}
    dense = DenseAttention(
        config, model.model.rotary, places, cache=None, memory=None, implementation="eager", dropout=0.0
    )

    def attend(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_sink_H: torch.Tensor | None
    ) -> torch.Tensor:
        chunks = recorded.setdefault(layer, [])
        dense.softmax_attention = partial(dense.eager, on_weights=lambda weights: chunks.append(weights[0].cpu()))
        return dense(layer, q, k, v, softmax_sink_H)

    model.model(embeddings, attend)
    weights = [torch.cat([_padded(chunk, len(ids)) for chunk in recorded[layer]], dim=1) for layer in sorted(recorded)]
    return torch.stack(weights)


def _padded(chunk_HTS: torch.Tensor, length: int) -> torch.Tensor:
    """The weights of some queries, with 0 for the keys in the future of all of them."""
    return torch.nn.functional.pad(chunk_HTS, (0, length - chunk_HTS.shape[2]))


def head_figures(weights_LHTS: torch.Tensor, num_first: int) -> list[HeadFigures]:
    """In the order of layers and heads. `num_first`: of the first tokens."""
    weights = weights_LHTS[:, :, 1:].double()
    length = weights.shape[-1]
    total_LHT = weights.sum(dim=-1)
    distance_TS = torch.arange(1, length)[:, None] - torch.arange(length)[None]
    shares = weights / total_LHT[..., None].clamp(min=torch.finfo(torch.float32).tiny)
    figures = {
        "first": weights[..., :num_first].sum(dim=-1),
        "distance": (shares * distance_TS).sum(dim=-1),
        "entropy": torch.special.entr(shares).sum(dim=-1) / torch.log(torch.tensor(2.0, dtype=torch.float64)),
        "nothing": (1 - total_LHT).clamp(min=0),
    }
    means_LH = {name: values.mean(dim=-1) for name, values in figures.items()}
    layers, heads = weights.shape[:2]
    return [
        HeadFigures(layer=layer, head=head, **{name: float(mean[layer, head]) for name, mean in means_LH.items()})
        for layer in range(layers)
        for head in range(heads)
    ]
