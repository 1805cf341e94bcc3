"""The ranks of a model in threads of this process: a backend for engines of tests, without sockets."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch

from stellarbyte import ByteModelConfig, ByteTransformer
from stellarbyte.backends.replaced import RowAdapters
from stellarbyte.backends.torch_model import ServedModel, TorchModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.lora.bank import LoraBank, PackedAdapter
from stellarbyte.parallel.adapters import cut_adapter
from stellarbyte.parallel.model import rank_language_model
from stellarbyte.parallel.shares import RankShare
from stellarbyte.sampling.sampler import RowSampling, sample

T = TypeVar("T")


class Meeting:
    """Where the ranks of a group lay down their tensors."""

    def __init__(self, ranks: int) -> None:
        self.barrier: Any = threading.Barrier(ranks, timeout=60)
        self.tensors: list[Any] = [None] * ranks


class ThreadGroup:
    """A `RankGroup` of threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank = rank
        self.ranks = len(meeting.tensors)
        self.num_calls = 0
        self._meeting = meeting

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.all_gather(x)).sum(dim=0)

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.num_calls += 1
        self._meeting.tensors[self.rank] = x
        self._meeting.barrier.wait()
        gathered = [tensor.clone() for tensor in self._meeting.tensors]
        self._meeting.barrier.wait()
        assert len({(tensor.shape, tensor.dtype) for tensor in gathered}) == 1
        return gathered


def rank_weights(model: ByteTransformer, share: RankShare) -> dict[str, torch.Tensor]:
    """A rank's pieces of a whole model."""
    state = model.state_dict()
    pieces = share.pieces()
    cut = {name: state[name][piece.index].clone() for name, piece in pieces.items()}
    return {name: torch.zeros_like(part) if pieces[name].is_zero else part for name, part in cut.items()}


class RanksInThreads(ServedModel):
    """A backend: every rank has a model, a cache and a bank of its own; the engine's own cache is left alone."""

    def __init__(self, model: ByteTransformer, config: ByteModelConfig, bank: LoraBank, *, ranks: int) -> None:
        meeting = Meeting(ranks)
        self.shares = [RankShare(config=config, rank=rank, ranks=ranks) for rank in range(ranks)]
        self.models = []
        for share in self.shares:
            divided = rank_language_model(share, ThreadGroup(meeting, share.rank), rank_weights(model, share))
            own_bank = LoraBank(share.own_config, bank.num_slots, bank.max_rank)
            for slot in range(1, bank.num_slots + 1):
                own_bank.fill(slot, cut_adapter(_adapter_in(bank, slot), share))
            self.models.append(TorchModel(divided, share.own_config, own_bank))
        self.caches: list[PagedKVCache] = []
        self._threads = ThreadPoolExecutor(ranks)
        self._hidden: list[torch.Tensor] = []  # of the ranks' last step

    def hidden(self, batch: ForwardBatch, cache: PagedKVCache) -> torch.Tensor:
        if not self.caches:
            self.caches = [_cache_like(cache, share.own_config) for share in self.shares]
        found = self._on_each(lambda rank: self.models[rank].hidden(batch, self.caches[rank]))
        assert all(torch.equal(found[0], other) for other in found), "every rank has the same bits"
        return found[0]

    def head(self, hidden_RC: torch.Tensor, adapters: RowAdapters = ()) -> torch.Tensor:
        found = self._on_each(lambda rank: self.models[rank].head(hidden_RC, adapters))
        assert all(torch.equal(found[0], other) for other in found), "every rank has the same bits"
        return found[0]

    def sample(self, logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
        return sample(logits_RV, rows).tolist()

    def weight(self, module: str) -> torch.Tensor:
        raise AssertionError(f"each rank has only a part of {module}")

    def with_windows_of(self, config: ByteModelConfig) -> Self:
        raise AssertionError(f"the ranks are made with the windows that are served, not those of {config}")

    def _on_each(self, compute: Callable[[int], T]) -> list[T]:
        def run(rank: int) -> T:
            with torch.inference_mode():
                return compute(rank)

        return list(self._threads.map(run, range(len(self.models))))


def _cache_like(cache: PagedKVCache, config: ByteModelConfig) -> PagedKVCache:
    keys = cache.keys_LBSKD
    made = PagedKVCache(config, keys.shape[1], cache.block_size, keys.dtype, keys.device)
    made.keys_LBSKD.fill_(float("nan"))  # whatever is read before it was written shows
    made.values_LBSKD.fill_(float("nan"))
    return made


def _adapter_in(bank: LoraBank, slot: int) -> PackedAdapter:
    return PackedAdapter(
        numbers=bank.numbers_SF[slot],
        ranks_LP=bank.ranks_SLP[slot],
        has_factors_LP=bank.d_offsets_SLP[slot] >= 0,
        replaced=bank.replaced.get(slot, {}),
    )
