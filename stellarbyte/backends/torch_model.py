"""The engine's interface to a model, and its implementation in plain torch."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import nn

from stellarbyte.backends.paged_attention import PagedAttention
from stellarbyte.backends.replaced import RowAdapters, add_embeddings, add_logits
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.lora.bank import LoraBank
from stellarbyte.model.attention import plain_projection
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.model.logits import finish_logits
from stellarbyte.sampling.adjustment import RowAdjustment, adjust_logits
from stellarbyte.sampling.sampler import RowSampling, sample

# T tokens of the step, C hidden size, R rows of some of them, V vocabulary


class ServedModel(ABC):
    """A model that runs serving steps. Engine thread only.

    Attributes: quantization: of the matrices of its layers, or "none".
    """

    quantization = "none"

    @abstractmethod
    def hidden(self, batch: ForwardBatch, cache: PagedKVCache) -> torch.Tensor:
        """Compute a step, writing its keys and values to the cache; [T, C] hidden states after the final norm."""

    @abstractmethod
    def head(self, hidden_RC: torch.Tensor, adapters: RowAdapters = ()) -> torch.Tensor:
        """[R, V] logits of the next token; `adapters` are those of the rows, (): none replaces the head."""

    @abstractmethod
    def weight(self, module: str) -> torch.Tensor:
        """The weight of an adaptable module [out, in], the head or the embedding [V, C], as steps read it. Any
        thread."""

    @abstractmethod
    def with_windows_of(self, config: ByteModelConfig) -> Self:
        """The same weights, served with the windows and sinks of `config`."""

    def adjust(self, logits_RV: torch.Tensor, rows: list[RowAdjustment | None]) -> None:
        """Change float32 logits in place; see `stellarbyte.sampling.adjustment`."""
        adjust_logits(logits_RV, rows)

    @abstractmethod
    def sample(self, logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
        """The next token of each row of logits, or NO_TOKEN; see `stellarbyte.sampling.sampler`."""

    def logits(self, batch: ForwardBatch, cache: PagedKVCache) -> torch.Tensor:
        """Compute a step; [R, V] logits of the rows that sample, of adapters that replace no head."""
        return self.head(self.hidden(batch, cache)[batch.logits_rows])


class TorchModel(ServedModel):
    """The reference: the model's own modules over `ops/reference.py`, on any device.

    `config` is for serving: its window and sinks may differ from the checkpoint's. `bank`: the adapters, or None.
    """

    def __init__(self, model: ByteLanguageModel, config: ByteModelConfig, bank: LoraBank | None = None) -> None:
        self.model = model
        self.config = config
        self.bank = LoraBank(config) if bank is None else bank
        self._places = {
            model.get_submodule(name): (layer, projection)
            for layer, projection, name in self.bank.projections.modules()
        }

    def hidden(self, batch: ForwardBatch, cache: PagedKVCache) -> torch.Tensor:
        decoder = self.model.model
        attend = PagedAttention(self.config, decoder.rotary, cache, batch)
        project = _AdaptedProjection(self.bank, self._places, batch) if any(batch.adapter_slots) else plain_projection
        return decoder(add_embeddings(decoder.embed_tokens(batch.token_ids_T), batch, self.bank), attend, project)

    def head(self, hidden_RC: torch.Tensor, adapters: RowAdapters = ()) -> torch.Tensor:
        products_RV = add_logits(self.model.lm_head(hidden_RC), hidden_RC, adapters, self.bank)
        return finish_logits(products_RV, self.config.logits_multiplier, self.config.logits_softcap)

    def sample(self, logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
        return sample(logits_RV, rows).tolist()

    def weight(self, module: str) -> torch.Tensor:
        return self.model.get_parameter(f"{module}.weight").detach()

    def with_windows_of(self, config: ByteModelConfig) -> Self:
        other = copy.copy(self)
        other.config = config
        return other


class _AdaptedProjection:
    """The `project` of one step: y = W x + scale · (d ⊙ W x + Bᵀ(A x)), each row with its own sequence's adapter and
    scale; without DoRA d is 0."""

    def __init__(self, bank: LoraBank, places: Mapping[nn.Module, tuple[int, int]], batch: ForwardBatch) -> None:
        self.bank = bank
        self.places = places
        self.rows = list(batch.adapted())

    def __call__(self, x: torch.Tensor, *linears: nn.Module) -> tuple[torch.Tensor, ...]:
        outputs = plain_projection(x, *linears)
        layer, first = self.places[linears[0]]
        projections = slice(first, first + len(linears))
        for rows, slot, scale in self.rows:
            shrunk = scale * (x[rows] @ self.bank.a(slot, layer, projections).T)
            ranks = self.bank.ranks_SLP[slot, layer, projections].tolist()
            for i, hidden in enumerate(shrunk.split(ranks, dim=-1)):
                if (d := self.bank.d(slot, layer, first + i)) is not None:
                    bias = linears[i].bias
                    assert bias is None or isinstance(bias, torch.Tensor)
                    product = outputs[i][rows] if bias is None else outputs[i][rows] - bias
                    outputs[i][rows] += scale * d * product
                outputs[i][rows] += hidden @ self.bank.b(slot, layer, first + i)
        return outputs
