"""Adapters of a step's products: shrink each shared input once, then expand.

In steps of few rows, two more small kernels for each product would cost noticeable time. There both run concurrently
with the product, on their own stream, and the kernel that reads the product adds their result. Steps of many rows, and
those with DoRA, which needs the product, expand into it in place.
"""

import torch

from stellarbyte.lora.bank import LoraBank
from stellarbyte.ops.triton.lora import Addend, LoraRows, LoraScratch, expand, shrink

# T tokens, K inputs, N outputs


class SideStream:
    """A stream, and memory for addends. Allocated once: graphs keep the addresses."""

    def __init__(self, bank: LoraBank, max_rows: int) -> None:
        """For steps of up to `max_rows` rows."""
        groups = bank.projections.shared_inputs.values()
        widest = max(sum(out for out, _ in shapes[group]) for shapes in bank.projections.shapes for group in groups)
        self.numbers = bank.numbers_SF.new_empty(max_rows * widest)
        # High priority: otherwise the products would take all multiprocessors first.
        self.stream = torch.cuda.Stream(priority=-3) if self.numbers.is_cuda else None


class Adapters:
    """The adapters of one step's rows."""

    def __init__(
        self,
        bank: LoraBank,
        rows: LoraRows,
        scratch: LoraScratch,
        side_stream: SideStream | None = None,
        *,
        has_factors: bool = False,
    ) -> None:
        """`has_factors`: any of them may have DoRA."""
        self._bank = bank
        self._rows = rows
        self._scratch = scratch
        self._side_stream = None if has_factors else side_stream
        self._has_factors = has_factors

    def begin(self, x_TK: torch.Tensor, layer: int, projections: slice) -> None:
        """Call before the product of projections that share the input x: starts the part that does not need the
        product."""
        if self._side_stream is None:
            shrink(x_TK, self._scratch, self._rows, self._bank, layer, projections)
            return
        side = self._side_stream.stream
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            shrink(x_TK, self._scratch, self._rows, self._bank, layer, projections)
            delta_TN = self._delta(len(x_TK), layer, projections)
            expand(self._scratch, delta_TN, self._rows, self._bank, layer, projections, adds=False)

    def end(
        self, out_TN: torch.Tensor, layer: int, projections: slice, bias_N: torch.Tensor | None = None
    ) -> Addend | None:
        """Call after the product, which includes the bias: the addend for its reader, valid until the next `begin`;
        None if already added."""
        if self._side_stream is None:
            expand(
                self._scratch, out_TN, self._rows, self._bank, layer, projections,
                has_factors=self._has_factors, bias_N=bias_N if self._has_factors else None,
            )  # fmt: skip
            return None
        if self._side_stream.stream is not None:
            torch.cuda.current_stream().wait_stream(self._side_stream.stream)
        return Addend(self._delta(len(out_TN), layer, projections), self._rows.scales_T)

    def _delta(self, num_rows: int, layer: int, projections: slice) -> torch.Tensor:
        assert self._side_stream is not None
        width = sum(out for out, _ in self._bank.projections.shapes[layer][projections])
        return self._side_stream.numbers[: num_rows * width].view(num_rows, width)
