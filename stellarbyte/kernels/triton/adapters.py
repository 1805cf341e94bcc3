"""What adapters add to a step's products: each shared input is shrunk once, then expanded into the outputs in place."""

from collections.abc import Sequence

import torch

from stellarbyte.kernels.triton.lora import LoraRows, LoraScratch, expand, segments, shrink
from stellarbyte.lora.bank import LoraBank

# T tokens, K inputs, N outputs


class Adapters:
    """The adapters of one step's rows."""

    def __init__(
        self, bank: LoraBank, rows: LoraRows, scratch: LoraScratch, side_stream: torch.cuda.Stream | None = None
    ) -> None:
        self._bank = bank
        self._rows = rows
        self._scratch = scratch
        self._side_stream = side_stream

    @classmethod
    def of_sequences(
        cls, bank: LoraBank, slots: Sequence[int], scales: Sequence[float], lengths: Sequence[int]
    ) -> "Adapters | None":
        """For sequences of so many rows each, with bank slots and scales; None if none has an adapter."""
        if not any(slots):
            return None
        device = bank.numbers_SF.device
        slots_T = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
        scales_T = [scale for scale, length in zip(scales, lengths, strict=True) for _ in range(length)]
        starts, counts, bank_slots = (
            torch.tensor(part, dtype=torch.int32, device=device) for part in segments(slots_T)
        )
        rows = LoraRows(starts, counts, bank_slots, torch.tensor(scales_T, dtype=torch.float32, device=device))
        return cls(bank, rows, LoraScratch.make(len(slots_T), bank.max_rank, device))

    def shrink(self, x_TK: torch.Tensor, layer: int, projections: slice) -> None:
        """Compute A x of projections that share the input, to be expanded before the next call.

        With a side stream it runs beside what is launched until then.
        """
        if self._side_stream is None:
            shrink(x_TK, self._scratch, self._rows, self._bank, layer, projections)
            return
        self._side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side_stream):
            shrink(x_TK, self._scratch, self._rows, self._bank, layer, projections)

    def expand(self, out_TN: torch.Tensor, layer: int, projections: slice) -> None:
        """out += scale · B (A x), projection beside projection."""
        if self._side_stream is not None:
            torch.cuda.current_stream().wait_stream(self._side_stream)
        expand(self._scratch, out_TN, self._rows, self._bank, layer, projections)
