"""The adapters of all ranks: each has its part of them, in the same slots."""

from typing import Any

import numpy as np
import torch

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import LoraBank, PackedAdapter
from stellarbyte.parallel.adapters import cut_adapter
from stellarbyte.parallel.shares import RankShare
from stellarbyte_server.engine.ranks.messages import ClearSlot, FillSlot, PackedTensor, SlotFilled
from stellarbyte_server.engine.ranks.processes import RankProcesses


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
        numbers=_message_of(adapter.numbers),
        adapter_ranks=adapter.ranks_LP.tolist(),
        has_factors=adapter.has_factors_LP.tolist(),
        replaced={name: _message_of(matrix) for name, matrix in adapter.replaced.items()},
    )


def adapter_of(message: FillSlot, dtype: torch.dtype) -> PackedAdapter:
    """The adapter in a message."""
    return PackedAdapter(
        numbers=_tensor_of(message.numbers, dtype),
        ranks_LP=np.array(message.adapter_ranks, dtype=np.int64),
        has_factors_LP=np.array(message.has_factors, dtype=np.bool_),
        replaced={name: _tensor_of(matrix, dtype) for name, matrix in message.replaced.items()},
    )


def _message_of(tensor: torch.Tensor) -> PackedTensor:
    content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return PackedTensor(numbers=content.tobytes(), shape=tuple(tensor.shape))


def _tensor_of(message: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    if not message.numbers:
        return torch.empty(message.shape, dtype=dtype)
    return torch.frombuffer(bytearray(message.numbers), dtype=dtype).view(message.shape)
