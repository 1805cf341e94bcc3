"""The vocabulary divided among ranks: embeddings of tokens that one of them has, and logits that all of them get."""

import torch
import torch.nn.functional as F

from stellarbyte.parallel.group import RankGroup
from stellarbyte.parallel.shares import RankShare

# T tokens, C hidden size, R rows of some tokens, V vocabulary


class RankVocabulary:
    """The tokens of one rank. All ranks call the same methods in the same order.

    Logits have the same bits on every rank, since each rank computes those of its own tokens only and all get them.
    """

    def __init__(self, share: RankShare, group: RankGroup) -> None:
        shares = [RankShare(config=share.config, rank=rank, ranks=share.ranks) for rank in range(share.ranks)]
        self.rows = share.vocabulary
        self._widths = [len(other.vocabulary) for other in shares]
        self._group = group

    def embed(self, token_ids_T: torch.Tensor, embedding_VC: torch.Tensor) -> torch.Tensor:
        """[T, C] embeddings, of which this rank has the rows `rows`."""
        places_T = token_ids_T - self.rows.start
        is_own_T = (places_T >= 0) & (places_T < len(self.rows))
        own_TC = F.embedding(places_T.where(is_own_T, 0), embedding_VC)
        return self._group.all_reduce(own_TC.where(is_own_T[:, None], 0))

    def gather_logits(self, own_RV: torch.Tensor, out_RV: torch.Tensor | None = None) -> torch.Tensor:
        """[R, V]: the logits of all tokens, in `out_RV` if given."""
        missing = max(self._widths) - own_RV.shape[1]
        widest_RV = F.pad(own_RV, (0, missing)) if missing else own_RV  # F.pad by 0 would copy
        pieces = zip(self._group.all_gather(widest_RV), self._widths, strict=True)
        return torch.cat([piece_RV[:, :width] for piece_RV, width in pieces], dim=1, out=out_RV)
