"""What the GPU model of a rank computes together with the others: sums, norms over all heads, logits of all tokens."""

import copy
from typing import Self

import torch
import torch.nn.functional as F

from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.paged import HeadShape
from stellarbyte.parallel.group import AloneGroup, RankGroup
from stellarbyte.parallel.shares import RankShare

# T tokens, C hidden size, N = (H + 2K) · D packed row q | k | v, R rows of some tokens, V vocabulary


class GpuRanks:
    """The ranks of a model, seen from one of them. All ranks call the same methods in the same order.

    Logits have the same bits on every rank, since each rank computes those of its own tokens only and all get them.
    """

    def __init__(self, share: RankShare, group: RankGroup) -> None:
        shares = [RankShare(config=share.config, rank=rank, ranks=share.ranks) for rank in range(share.ranks)]
        self.vocabulary = share.vocabulary
        self._widths = [len(other.vocabulary) for other in shares]
        self._config = share.config
        self._kv_copies = share.kv_copies
        self._group = group

    def alone(self) -> Self:
        """The same sizes without the other ranks, for programs that run to compile their kernels or to be measured."""
        other = copy.copy(self)
        other._group = AloneGroup(self._group.rank, self._group.ranks)
        return other

    def embed(self, token_ids_T: torch.Tensor, embedding_VC: torch.Tensor) -> torch.Tensor:
        """[T, C] embeddings, of which the rank has the rows of `vocabulary`."""
        places_T = token_ids_T - self.vocabulary.start
        is_own_T = (places_T >= 0) & (places_T < len(self.vocabulary))
        own_TC = F.embedding(places_T.where(is_own_T, 0), embedding_VC)
        return self.sum(own_TC.where(is_own_T[:, None], 0))

    def sum(self, x_TC: torch.Tensor, addend: Addend | None = None) -> torch.Tensor:
        """The sum over ranks of x and what is still to be added to it; x may change."""
        if addend is not None:
            _add(x_TC, addend)
        return self._group.all_reduce(x_TC)

    def join_logits(self, own_RV: torch.Tensor, out_RV: torch.Tensor | None) -> torch.Tensor:
        """[R, V]: the logits of all tokens, in `out_RV` if given."""
        widest_RV = F.pad(own_RV, (0, self._widths[0] - own_RV.shape[1]))  # the first rank has the most tokens
        pieces = zip(self._group.all_gather(widest_RV), self._widths, strict=True)
        return torch.cat([piece_RV[:, :width] for piece_RV, width in pieces], dim=1, out=out_RV)

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
        assert self._config.num_key_value_heads is not None
        totals = (self._config.num_attention_heads, self._config.num_key_value_heads * self._kv_copies)
        weights = norm_N.split([part_TN.shape[1] for part_TN in parts])
        for part_TN, weight_N, sum_T, total in zip(parts, weights, sums_T2.unbind(1), totals, strict=True):
            factor_T1 = torch.rsqrt(sum_T / (total * head_dim) + eps)[:, None]
            part_TN.copy_(part_TN.float() * (factor_T1 * weight_N.float()))


def _add(x_TN: torch.Tensor, addend: Addend) -> None:
    """Rows with scale 0 are undefined."""
    x_TN += addend.delta_TN.where(addend.scales_T[:, None] != 0, 0)
