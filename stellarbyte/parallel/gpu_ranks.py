"""What the GPU model of a rank computes together with the others: sums, norms over all heads, logits, tokens."""

import copy
from typing import Self

import torch

from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.paged import HeadShape
from stellarbyte.parallel.group import RankGroup, SingleRankGroup
from stellarbyte.parallel.shares import RankShare
from stellarbyte.parallel.vocabulary import RankVocabulary

# T tokens, C hidden size, N = (H + 2K) · D packed row q | k | v, R rows of some tokens, V vocabulary


class GpuRanks:
    """The ranks of a model, seen from one of them. All ranks call the same methods in the same order."""

    def __init__(self, share: RankShare, group: RankGroup) -> None:
        self._share = share
        self._group = group
        self._vocabulary = RankVocabulary(share, group)

    @property
    def vocabulary(self) -> range:
        """Token ids of the rank's rows of embedding and head."""
        return self._vocabulary.rows

    @property
    def num_calls(self) -> int:
        """See `RankGroup.num_calls`."""
        return self._group.num_calls

    def alone(self) -> Self:
        """The same sizes without the other ranks, for programs that run to compile their kernels or to be measured."""
        other = copy.copy(self)
        other._group = SingleRankGroup(self._group.rank, self._group.ranks)
        other._vocabulary = RankVocabulary(self._share, other._group)
        return other

    def embed(self, token_ids_T: torch.Tensor, embedding_VC: torch.Tensor) -> torch.Tensor:
        """See `RankVocabulary.embed`."""
        return self._vocabulary.embed(token_ids_T, embedding_VC)

    def gather_logits(self, own_RV: torch.Tensor, out_RV: torch.Tensor | None) -> torch.Tensor:
        """See `RankVocabulary.gather_logits`."""
        return self._vocabulary.gather_logits(own_RV, out_RV)

    def all_reduce(self, x_TC: torch.Tensor, addend: Addend | None = None) -> torch.Tensor:
        """The sum over ranks of x and what is still to be added to it; x may change."""
        if addend is not None:
            _add(x_TC, addend)
        return self._group.all_reduce(x_TC)

    def of_first_rank(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """The tokens that rank 0 has sampled, where the ranks' own could differ."""
        return self._group.all_gather(tokens_R)[0]

    def norm_projections(
        self, qkv_TN: torch.Tensor, norm_N: torch.Tensor, heads: HeadShape, eps: float, addend: Addend | None
    ) -> None:
        """As `rotate_write.norm_projections`, over the heads of all ranks. `norm_N` and `heads`: of this one."""
        if addend is not None:
            _add(qkv_TN, addend)
        num_heads, num_kv_heads, head_dim = heads
        parts = qkv_TN.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=1)[:2]
        sums_T2 = torch.stack([part_TN.float().pow(2).sum(1) for part_TN in parts], dim=1)
        sums_T2 = self._group.all_reduce(sums_T2)
        config = self._share.config
        assert config.num_key_value_heads is not None
        totals = (config.num_attention_heads, config.num_key_value_heads * self._share.kv_copies)
        weights = norm_N.split([part_TN.shape[1] for part_TN in parts])
        for part_TN, weight_N, sum_T, total in zip(parts, weights, sums_T2.unbind(1), totals, strict=True):
            factor_T1 = torch.rsqrt(sum_T / (total * head_dim) + eps)[:, None]
            part_TN.copy_(part_TN.float() * (factor_T1 * weight_N.float()))


def _add(x_TN: torch.Tensor, addend: Addend) -> None:
    """Rows with scale 0 are undefined."""
    x_TN += addend.delta_TN.where(addend.scales_T[:, None] != 0, 0)
