"""The adapters of all ranks: each has its part of them, in the same slots."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import LoraBank, PackedAdapter
from stellarbyte.parallel.adapters import cut_adapter
from stellarbyte.parallel.shares import RankShare
from stellarbyte_server.engine.ranks.messages import AdapterBytes, ClearSlot, FillSlot, SlotFilled
from stellarbyte_server.engine.ranks.processes import RankProcesses

_PIECE_BYTES = 256 * 2**10


class RanksBank:
    """What `AdapterStore` needs of a `LoraBank`, for adapters of the whole model.

    Args:
        own: the bank of this rank, 0, for `share.own_config`.
    """

    def __init__(self, own: LoraBank, share: RankShare, others: RankProcesses) -> None:
        self._own = own
        self._others = others
        self._shares = [RankShare(config=share.config, rank=rank, ranks=share.ranks) for rank in range(share.ranks)]
        self.config: ByteModelConfig = share.config
        self.num_slots = own.num_slots
        self.max_rank = own.max_rank
        self.dtype = own.dtype

    def fence(self) -> torch.cuda.Event | None:
        return self._own.fence()

    def fill(self, slot: int, adapter: PackedAdapter, fence: torch.cuda.Event | None = None) -> None:
        """As `LoraBank.fill`; returns when all ranks have the adapter.

        Raises:
            RuntimeError: a rank could not take it.
        """
        parts = [cut_adapter(adapter, share) for share in self._shares]
        contents = [_bytes_of(part) for part in parts[1:]]
        for pieces in itertools.zip_longest(*contents):  # steps are sent between them
            self._others.send_each([None if piece is None else AdapterBytes(piece) for piece in pieces])
        self._others.send_each([fill_message(slot, part) for part in parts[1:]])
        try:
            self._own.fill(slot, parts[0], fence)
        finally:  # or they would be taken for those to the next one
            answers = self._others.answers(SlotFilled)
        for answer in answers:
            if answer.error:
                raise RuntimeError(f"a rank could not take an adapter: {answer.error}")

    def clear(self, slot: int) -> None:
        self._others.send(ClearSlot(slot))
        self._own.clear(slot)


def fill_message(slot: int, adapter: PackedAdapter) -> FillSlot:
    return FillSlot(
        slot=slot,
        num_numbers=adapter.numbers.numel(),
        adapter_ranks=adapter.ranks_LP.tolist(),
        has_factors=adapter.has_factors_LP.tolist(),
        replaced={name: (matrix.shape[0], matrix.shape[1]) for name, matrix in adapter.replaced.items()},
    )


def adapter_of(message: FillSlot, content: Sequence[memoryview], dtype: torch.dtype) -> PackedAdapter:
    """The adapter of a message, whose bytes were received in these pieces."""
    sizes = [message.num_numbers, *(rows * columns for rows, columns in message.replaced.values())]
    joined: torch.Tensor = torch.empty(sum(sizes), dtype=dtype)
    target: Any = joined.view(torch.uint8).numpy()
    start = 0
    for piece in content:
        target[start : start + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        start += len(piece)
    assert start == len(target), "all bytes of an adapter come before its message"
    numbers, *matrices = joined.split(sizes)
    return PackedAdapter(
        numbers=numbers,
        ranks_LP=np.array(message.adapter_ranks, dtype=np.int64),
        has_factors_LP=np.array(message.has_factors, dtype=np.bool_),
        replaced={
            name: matrix.view(shape) for (name, shape), matrix in zip(message.replaced.items(), matrices, strict=True)
        },
    )


def _bytes_of(adapter: PackedAdapter) -> Iterator[memoryview]:
    """The bytes that `adapter_of` takes, in small pieces and without a copy."""
    for tensor in (adapter.numbers, *adapter.replaced.values()):
        content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
        for start in range(0, len(content), _PIECE_BYTES):
            yield memoryview(content[start : start + _PIECE_BYTES])
