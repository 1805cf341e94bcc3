"""The serving cache: blocks of keys and values, keys rotated relative to their block's base position.

A block with its first token at P stores k_n · e^{i(n-P)θ} · ζ^(-(n-P)/b). Offsets stay below the block size, so
the stored numbers are exact at any position, and moving a block only changes its base (numerics: "Keys are stored
relative to their block"). The scheduler assigns blocks to sequences.
"""

import math

import numpy as np
import torch

from stellarbyte.config import ByteModelConfig

# L layers, B blocks, S block size, K key/value heads, D head dim


class PagedKVCache:
    """Keys and values of every sequence: two tensors [L, B, S, K, D]."""

    def __init__(
        self, config: ByteModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert config.num_key_value_heads is not None and config.head_dim is not None  # ByteModelConfig sets both
        shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        self.keys_LBSKD = _zeros(shape, dtype, device)
        self.values_LBSKD = _zeros(shape, dtype, device)
        self.block_size = block_size

    @staticmethod
    def bytes_per_token(config: ByteModelConfig, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values over all layers."""
        assert config.num_key_value_heads is not None and config.head_dim is not None
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take CPU memory only when written; torch.zeros would touch every page at start."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    untouched = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(shape)
