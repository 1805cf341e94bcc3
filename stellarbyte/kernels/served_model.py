"""What the engine asks of a model, and the plain torch form of it. Knows no requests."""

from typing import Protocol

import torch

from stellarbyte.cache.paged_kv import PagedAttention, PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.sampling import RowSampling, sample

# R rows that sample, V vocabulary


class ServedModel(Protocol):
    """A model that runs serving steps. Engine thread only."""

    def logits(self, batch: ForwardBatch, cache: PagedKVCache) -> torch.Tensor:
        """Compute a step, writing its keys and values to the cache; [R, V] logits of the rows that sample."""
        ...

    def sample(self, logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
        """The next token of each row of `logits`; see `stellarbyte.sampling`."""
        ...


class TorchModel:
    """The reference: the model's own modules over `kernels/reference.py`, on any device.

    `config` is the one to serve with: its window and sinks may differ from those the checkpoint was saved with.
    """

    def __init__(self, model: ByteLanguageModel, config: ByteModelConfig) -> None:
        self.model = model
        self.config = config

    def logits(self, batch: ForwardBatch, cache: PagedKVCache) -> torch.Tensor:
        decoder = self.model.model
        attend = PagedAttention(self.config, decoder.rotary, cache, batch)
        hidden_TC = decoder(decoder.embed_tokens(batch.token_ids_T), attend)
        return self.model.lm_head(hidden_TC[batch.logits_rows])

    def sample(self, logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
        return sample(logits_RV, rows).tolist()
