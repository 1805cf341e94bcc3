"""Copies of cache blocks to host memory and back, of all layers at once."""

import weakref
from typing import Protocol

import numpy as np
import torch

from stellarbyte.cache.paged_kv import PagedKVCache

# L layers, B blocks, N bytes of a block's keys, or values, in one layer


class BlockCopies(Protocol):
    """`read` and `write` are for one thread, which is not the engine's; both return when the copy is complete.

    A block's bytes are its keys of all layers, then its values: [2, L, N].
    """

    num_bytes: int
    """Bytes of a block."""

    def fence(self) -> object:
        """A mark for `write`, after all steps launched so far. Engine thread."""

    def read(self, block: int, out: np.ndarray) -> None:
        """Copy a block into uint8 [num_bytes]."""

    def write(self, content: np.ndarray, block: int, fence: object) -> None:
        """Copy uint8 [num_bytes] into a block, once the steps before `fence` are complete."""

    def adopt(self, memory: np.ndarray) -> None:
        """Prepare memory of `host_memory` for fast copies."""


class HostCopies:
    """Of a cache in host memory. Numpy copies on one thread, without Python's lock."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._parts_LBN = [part_LBN.numpy() for part_LBN in _bytes_of(cache)]
        self.num_bytes = _num_bytes(self._parts_LBN[0].shape)

    def fence(self) -> None:
        """Steps are complete before the engine thread goes on."""

    def read(self, block: int, out: np.ndarray) -> None:
        for host_LN, part_LBN in zip(out.reshape(2, len(self._parts_LBN[0]), -1), self._parts_LBN, strict=True):
            host_LN[:] = part_LBN[:, block]

    def write(self, content: np.ndarray, block: int, fence: object) -> None:
        del fence
        for host_LN, part_LBN in zip(content.reshape(2, len(self._parts_LBN[0]), -1), self._parts_LBN, strict=True):
            part_LBN[:, block] = host_LN

    def adopt(self, memory: np.ndarray) -> None:
        """Any memory will do."""


class CudaCopies:
    """Of a cache on a GPU, by a stream of its own between pinned memory and the GPU."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._parts_LBN = _bytes_of(cache)
        self.num_bytes = _num_bytes(self._parts_LBN[0].shape)
        self._device = cache.keys_LBSKD.device
        self._stream = torch.cuda.Stream(self._device)

    def fence(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self, block: int, out: np.ndarray) -> None:
        """The steps that wrote the block are complete: their results have been read."""
        self._copy(block, out, to_host=True)

    def write(self, content: np.ndarray, block: int, fence: object) -> None:
        assert isinstance(fence, torch.cuda.Event)
        self._stream.wait_event(fence)
        self._copy(block, content, to_host=False)

    @torch.inference_mode()
    def _copy(self, block: int, memory: np.ndarray, *, to_host: bool) -> None:
        host_2LN = torch.from_numpy(memory).view(2, len(self._parts_LBN[0]), -1)
        with torch.cuda.stream(self._stream):
            for host_LN, part_LBN in zip(host_2LN, self._parts_LBN, strict=True):
                source, target = (part_LBN[:, block], host_LN) if to_host else (host_LN, part_LBN[:, block])
                target.copy_(source, non_blocking=True)
            self._stream.synchronize()

    def adopt(self, memory: np.ndarray) -> None:
        """Pin it for as long as it exists, without torch's allocator, which would round the size up to a power of two.

        Raises:
            torch.cuda.CudaError: it cannot be pinned; a part of one of its pages is pinned already, say.
        """
        runtime, address = torch.cuda.cudart(), memory.ctypes.data
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, memory.nbytes, 0)))
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False


def make_copies(cache: PagedKVCache) -> BlockCopies:
    return CudaCopies(cache) if cache.keys_LBSKD.is_cuda else HostCopies(cache)


def _bytes_of(cache: PagedKVCache) -> list[torch.Tensor]:
    """Keys and values as uint8 [L, B, N], views of the cache."""
    num_layers, num_blocks = cache.keys_LBSKD.shape[:2]
    return [part.view(torch.uint8).view(num_layers, num_blocks, -1) for part in (cache.keys_LBSKD, cache.values_LBSKD)]


def _num_bytes(shape_LBN: tuple[int, ...]) -> int:
    return 2 * shape_LBN[0] * shape_LBN[2]
