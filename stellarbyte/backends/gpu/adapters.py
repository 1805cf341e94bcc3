"""What adapters add to a step's products: each shared input is shrunk once, then expanded.

A step of few rows is over before two small kernels more for each product could go unnoticed. There both run beside the
product, on a stream of their own, and what they make is added by the kernel that reads the product. Steps of many rows
expand into the product in place.
"""

import torch

from stellarbyte.lora.bank import LoraBank
from stellarbyte.ops.triton.lora import Addend, LoraRows, LoraScratch, expand, shrink

# T tokens, K inputs, N outputs


class BesideProducts:
    """A stream, and memory for what is to be added. Made once: graphs keep the addresses."""

    def __init__(self, bank: LoraBank, max_rows: int) -> None:
        """For steps of up to `max_rows` rows."""
        groups = bank.projections.shared_inputs.values()
        widest = max(sum(out for out, _ in shapes[group]) for shapes in bank.projections.shapes for group in groups)
        self.numbers = bank.numbers_SF.new_empty(max_rows * widest)
        # Before products, which would otherwise take all multiprocessors first.
        self.stream = torch.cuda.Stream(priority=-3) if self.numbers.is_cuda else None


class Adapters:
    """The adapters of one step's rows."""

    def __init__(
        self, bank: LoraBank, rows: LoraRows, scratch: LoraScratch, beside: BesideProducts | None = None
    ) -> None:
        self._bank = bank
        self._rows = rows
        self._scratch = scratch
        self._beside = beside

    def begin(self, x_TK: torch.Tensor, layer: int, projections: slice) -> None:
        """Before the product of projections that share the input x: what needs no product."""
        if self._beside is None:
            shrink(x_TK, self._scratch, self._rows, self._bank, layer, projections)
            return
        side = self._beside.stream
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            shrink(x_TK, self._scratch, self._rows, self._bank, layer, projections)
            delta_TN = self._delta(len(x_TK), layer, projections)
            expand(self._scratch, delta_TN, self._rows, self._bank, layer, projections, adds=False)

    def end(self, out_TN: torch.Tensor, layer: int, projections: slice) -> Addend | None:
        """After the product: what its reader has to add, or None where it was added. To be read before the next
        `begin`."""
        if self._beside is None:
            expand(self._scratch, out_TN, self._rows, self._bank, layer, projections)
            return None
        if self._beside.stream is not None:
            torch.cuda.current_stream().wait_stream(self._beside.stream)
        return Addend(self._delta(len(out_TN), layer, projections), self._rows.scales_T)

    def _delta(self, num_rows: int, layer: int, projections: slice) -> torch.Tensor:
        assert self._beside is not None
        width = sum(out for out, _ in self._bank.projections.shapes[layer][projections])
        return self._beside.numbers[: num_rows * width].view(num_rows, width)
