"""Which keys `generate` drops for want of attention (Zhang et al. 2023, "H2O: Heavy-Hitter Oracle")."""

import math
from dataclasses import dataclass

import torch

# B sequences, K key/value heads, S keys


@dataclass(frozen=True, kw_only=True)
class KeyPruning:
    """Every key head keeps the newest keys and the heavy hitters: those with most attention summed over all queries.

    Positions do not change: the keys that stay have the distances that they had.

    Args:
        ratio: share of the tokens read so far that is dropped, at least 0 and below 1; 0: none.
        budget: most keys that a head keeps, in tokens; None: no limit.
        recent: share of the kept keys that are the newest ones, 0 to 1; the rest are heavy hitters.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    ratio: float | int = 0.0
    budget: int | None = None
    recent: float | int = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio ({self.ratio}) must be at least 0 and less than 1")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget ({self.budget}) must be at least 1, or None for no limit")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent ({self.recent}) must be between 0 and 1")

    @property
    def drops_anything(self) -> bool:
        return self.ratio > 0 or self.budget is not None

    def refuse_sinks(self, sink_tokens: int) -> None:
        """Raise ValueError if the budget has no room for the sinks and one other key."""
        if self.budget is not None and self.budget <= sink_tokens:
            raise ValueError(f"budget ({self.budget}) must be greater than sink_tokens ({sink_tokens})")

    def num_kept(self, num_read: int, window: int | None, sink_tokens: int) -> int:
        """How many keys a head keeps after `num_read` tokens: the budget's, never fewer than the sinks and one more.

        A window bounds them, too: later queries see its newest window - 1 keys and the sinks.
        """
        kept = num_read - math.floor(self.ratio * num_read + 1e-9)  # 0.29 · 100 is a little below 29
        if self.budget is not None:
            kept = min(kept, self.budget)
        if window is not None:
            kept = min(kept, window - 1 + sink_tokens)
        return max(kept, sink_tokens + 1)

    def kept(
        self,
        attention_BKS: torch.Tensor,
        positions_BKS: torch.Tensor,
        num_read: int,
        window: int | None,
        sink_tokens: int,
    ) -> torch.Tensor | None:
        """Indices [B, K, kept] of the keys to keep, in order; None: all.

        Args:
            attention_BKS: weights that each key got so far, summed.
            positions_BKS: -1 for padding, which goes first.
            num_read: tokens read so far, dropped ones included.
            window: of the layer; its keys that no later query sees go first; None: no window, and no sinks.
        """
        num_keys = attention_BKS.shape[-1]
        num_kept = self.num_kept(num_read, window, sink_tokens)
        if num_keys <= num_kept:
            return None
        rank = attention_BKS.clone()
        is_sink = (positions_BKS >= 0) & (positions_BKS < sink_tokens)
        num_recent = min(math.floor(self.recent * num_kept), num_kept - sink_tokens)
        rank[..., num_keys - num_recent :] = math.inf
        is_unseen = positions_BKS < 0
        if window is not None:  # the next query is one after the newest
            is_unseen |= positions_BKS <= positions_BKS.amax(dim=-1, keepdim=True) + 1 - window
        rank = rank.masked_fill(is_unseen, -math.inf).masked_fill(is_sink, math.inf)
        return rank.topk(num_kept, dim=-1).indices.sort(dim=-1).values
