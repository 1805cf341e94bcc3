"""Attention of a serving step over the paged cache, in plain torch: the `attend` of the reference model."""

import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.ops import reference
from stellarbyte.xpos import XPosRotaryEmbedding


class PagedAttention:
    """The `attend` of one serving step: writes the step's keys to their blocks, then attends to the keys that each
    query sees."""

    def __init__(
        self, config: ByteModelConfig, rotary: XPosRotaryEmbedding, cache: PagedKVCache, batch: ForwardBatch
    ) -> None:
        self.config = config
        self.rotary = rotary
        self.cache = cache
        self.batch = batch

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_sink_H: torch.Tensor | None
    ) -> torch.Tensor:
        keys_BSKD, values_BSKD = self.cache.keys_LBSKD[layer], self.cache.values_LBSKD[layer]
        rotation = self.rotary.of_layer(layer, self.config.context_length)
        k_relative = rotation.rotate_keys(k, self.batch.offsets_T, self.cache.block_size)
        reference.write_kv(keys_BSKD, values_BSKD, self.batch.slots_T, k_relative, v)
        return reference.paged_attention(
            q,
            keys_BSKD,
            values_BSKD,
            self.batch,
            rotation,
            window=self.config.windows[layer],
            sink_tokens=self.config.sink_tokens,
            softcap=self.config.attention_softcap,
            softmax_sink_H=softmax_sink_H,
        )
