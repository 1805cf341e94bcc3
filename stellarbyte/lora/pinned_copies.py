"""Copies from CPU memory to a CUDA device, concurrent with its kernels.

They use two page-locked buffers, allocated once. Locking each source's own pages would let copies run without the CPU,
but takes as long as the copy, needs locked memory for all possible sources, and may stall the device.
"""

from collections.abc import Iterable

import torch

_CHUNK_BYTES = 8 << 20


class PinnedCopies:
    """For one thread at a time. Releases the GIL during copies."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        # Blocking: waiting must not keep a core busy.
        self._sent = [torch.cuda.Event(blocking=True) for _ in self._buffers]
        self._next = 0

    def run(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: torch.cuda.Event | None) -> None:
        """Copy CPU tensors to tensors of the device, each pair contiguous, of one dtype and shape.

        The device begins after the event; returns when the copies are complete.
        """
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for source, target in pairs:
                chunks = zip(_bytes(source).split(_CHUNK_BYTES), _bytes(target).split(_CHUNK_BYTES), strict=True)
                for part, place in chunks:
                    self._send(part, place)
        for sent in self._sent:
            sent.synchronize()

    def _send(self, part: torch.Tensor, place: torch.Tensor) -> None:
        buffer, sent = self._buffers[self._next][: len(part)], self._sent[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        sent.synchronize()
        buffer.numpy()[:] = part.numpy()  # one core; torch would use all
        place.copy_(buffer, non_blocking=True)
        sent.record()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
