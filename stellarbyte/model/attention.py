"""Projections around attention. Where keys come from (a whole sequence, a cache) is the caller's `attend`."""

from typing import Protocol

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.norm import ByteRMSNorm

# ... any leading dimensions ([B, T] in training, [T] in serving), H query heads, K key/value heads, D head dim


class Attend(Protocol):
    """Attention of one layer over keys that the implementer keeps."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Args: q [..., H, D], k and v [..., K, D], none of them rotated. Returns [..., H, D]."""
        ...


class Project(Protocol):
    """How linear layers are applied: as they are, or with adapters that differ by row."""

    def __call__(self, x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
        """The output of each of `linears`, which share the input x [..., in]."""
        ...


def plain_projection(x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(linear(x) for linear in linears)


class ByteMultiHeadSelfAttention(nn.Module):
    """Grouped-query self-attention with optional biases and per-head norms of queries and keys."""

    def __init__(self, config: ByteModelConfig, layer: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None  # the config fills both in
        self.layer = layer
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, query_size, bias=bias)
        self.k_proj = nn.Linear(hidden, key_size, bias=bias)
        self.v_proj = nn.Linear(hidden, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, hidden, bias=config.attention_output_bias)
        self.q_norm = ByteRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = ByteRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: torch.Tensor, attend: Attend, project: Project) -> torch.Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (y.view(heads) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        (out,) = project(attend(self.layer, q, k, v).flatten(-2), self.o_proj)
        return out
