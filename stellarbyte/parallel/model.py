"""The model of one rank: the decoder's own modules with the rank's pieces, which add up over all ranks.

Every attention and every MLP of a rank computes a term of the layer's output; a hook on the module sums the terms. So
the decoder's code knows nothing of ranks, and adapters act on the rank's own modules.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.checkpoint.native import adopt_weights
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.decoder import ByteDecoderLayer, ByteLanguageModel
from stellarbyte.model.moe.experts import ByteExperts
from stellarbyte.model.moe.layer import ByteMoE
from stellarbyte.model.norm import ByteRMSNorm
from stellarbyte.parallel.group import RankGroup
from stellarbyte.parallel.shares import RankShare
from stellarbyte.parallel.vocabulary import RankVocabulary

# T tokens, R rows of some of them, C hidden size, N rows sorted by expert, E experts


class VocabularyEmbedding(nn.Module):
    """The embedding of all tokens, of which each rank holds some rows."""

    def __init__(self, share: RankShare, group: RankGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(share.vocabulary), share.config.hidden_size))
        self._vocabulary = RankVocabulary(share, group)

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return self._vocabulary.embed(token_ids_T, self.weight)


class VocabularyHead(nn.Module):
    """The language-model head, of which each rank computes the logits of some tokens; all get those of all tokens."""

    def __init__(self, share: RankShare, group: RankGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(share.vocabulary), share.config.hidden_size))
        self._vocabulary = RankVocabulary(share, group)

    def forward(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        return self._vocabulary.gather_logits(F.linear(hidden_RC, self.weight))


class RankExperts(ByteExperts):
    """Of a layer's experts those of one rank; rows of others are zero."""

    def __init__(self, config: ByteModelConfig, layer: int, own: range) -> None:
        super().__init__(config, layer)
        self.own = own
        for name, stack in list(self.named_parameters()):
            self.register_parameter(name, nn.Parameter(stack[own.start : own.stop].detach()))

    def forward(self, x_NC: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        counts = counts_E.tolist()
        own = slice(self.own.start, self.own.stop)
        first = sum(counts[: own.start])
        rows = slice(first, first + sum(counts[own]))
        out_NC = torch.zeros_like(x_NC)
        if rows.stop > rows.start:
            out_NC[rows] = super().forward(x_NC[rows], counts_E[own])
        return out_NC


class RankNorm(ByteRMSNorm):
    """A norm of queries or keys over the heads of all ranks; `size` is that of this rank's heads.

    `copies`: ranks that hold the same heads; `total`: size over all heads.
    """

    def __init__(self, size: int, config: ByteModelConfig, group: RankGroup, *, total: int, copies: int) -> None:
        super().__init__(size, config.rms_norm_eps, zero_centered=config.zero_centered_norms)
        self._total = total
        self._copies = copies
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        squares = self._group.all_reduce(x32.pow(2).sum(-1, keepdim=True))
        normed = x32 * torch.rsqrt(squares / (self._copies * self._total) + self.eps)
        return (self.gain * normed).to(x.dtype) if self.zero_centered else self.weight * normed.to(x.dtype)


def rank_language_model(share: RankShare, group: RankGroup, weights: Mapping[str, torch.Tensor]) -> ByteLanguageModel:
    """A rank's model in evaluation mode.

    `weights`: its `RankShare.pieces`, by the names of the parameters.
    """
    with torch.device("meta"):
        model = ByteLanguageModel(share.own_config)
        model.model.embed_tokens = VocabularyEmbedding(share, group)  # type: ignore[assignment]
        model.lm_head = VocabularyHead(share, group)  # type: ignore[assignment]
        for number, layer in enumerate(model.model.layers):
            assert isinstance(layer, ByteDecoderLayer)
            _divide_layer(layer, number, share, group)
    adopt_weights(share.config, model, dict(weights))
    return model


def _divide_layer(layer: ByteDecoderLayer, number: int, share: RankShare, group: RankGroup) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    if isinstance(mlp, ByteMoE) and mlp.experts is not None:
        mlp.experts = RankExperts(share.own_config, number, share.experts)
    if share.config.qk_norm and not share.config.qk_norm_per_head:
        attention.q_norm = _over_all_ranks(attention.q_norm, share, group, share.config.num_attention_heads, 1)
        num_kv_heads = share.config.num_key_value_heads or 0
        attention.k_norm = _over_all_ranks(attention.k_norm, share, group, num_kv_heads, share.kv_copies)
    attention.register_forward_hook(_sum_over(group))
    mlp.register_forward_hook(_sum_over(group))


def _over_all_ranks(
    norm: ByteRMSNorm | None, share: RankShare, group: RankGroup, num_heads: int, copies: int
) -> RankNorm:
    assert norm is not None and share.config.head_dim is not None
    total = num_heads * share.config.head_dim
    return RankNorm(norm.weight.numel(), share.config, group, total=total, copies=copies)


def _sum_over(group: RankGroup) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """A hook: the output of attention or MLP, or the first output of a mixture of experts, summed over ranks."""

    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (group.all_reduce(output[0]), *output[1:])
        return group.all_reduce(output)

    return hook
