"""Projections around attention. The caller's `attend` provides the keys, of a whole sequence or a cache."""

from typing import Protocol

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.building import add_parts
from stellarbyte.model.norm import ByteRMSNorm

# ... any leading dimensions ([B, T] in training, [T] in serving), M tokens of a memory, H query heads,
# K key/value heads, D head dim


class Attend(Protocol):
    """Attention of one layer over the keys that the implementation stores."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_sink_H: torch.Tensor | None
    ) -> torch.Tensor:
        """Args: q [..., H, D], k and v [..., K, D], none of them rotated; with a memory, its M tokens come first in k
        and v. `softmax_sink_H`: a logit of each head in the softmax over its scores, without a value; None: none.
        Returns [..., H, D]."""
        ...


class Project(Protocol):
    """Applies linear layers, plain or with adapters that differ by row."""

    def __call__(self, x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
        """The output of each of `linears`, which share the input x [..., in]."""
        ...


def plain_projection(x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(linear(x) for linear in linears)


class ByteMultiHeadSelfAttention(nn.Module):
    """Grouped-query self-attention with optional biases, norms of queries and keys, and sinks of the softmax."""

    softmax_sink: nn.Parameter | None  # [H], see `ByteModelConfig`; sinks in the cache are tokens, this is a logit
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: ByteRMSNorm | None
    k_norm: ByteRMSNorm | None

    def __init__(self, config: ByteModelConfig, layer: int) -> None:
        super().__init__()
        assert config.head_dim is not None  # ByteModelConfig sets it
        self.layer = layer
        self.head_dim = config.head_dim
        self.qk_norm_per_head = config.qk_norm_per_head
        add_parts(self, "self_attn", config, layer)

    def forward(
        self, x: torch.Tensor, attend: Attend, project: Project, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., hidden] → the same shape. Keys and values are projected from `memory` [B, M, hidden], too."""
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        if memory is not None:
            earlier = project(memory, self.k_proj, self.v_proj)
            k, v = (torch.cat(both, dim=-2) for both in zip(earlier, (k, v), strict=True))
        if not self.qk_norm_per_head:
            q, k = self._norm(q, k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        if self.qk_norm_per_head:
            q, k = self._norm(q, k)
        (out,) = project(attend(self.layer, q, k, v, self.softmax_sink).flatten(-2), self.o_proj)
        return out

    def _norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))
