"""Smaller models: attention heads that matter least are removed."""

from stellarbyte.compress.heads import head_importance, heads_to_keep, prune_heads

__all__ = ["head_importance", "heads_to_keep", "prune_heads"]
