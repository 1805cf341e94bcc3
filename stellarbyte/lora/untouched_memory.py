"""CPU memory for large arrays that come and go."""

import mmap

import torch


def untouched_memory(num_bytes: int) -> mmap.mmap:
    """Zeros that take memory only where they are written. Not from the heap: what is freed there may stay with the
    process."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=flags)


def large_array(count: int, dtype: torch.dtype) -> torch.Tensor:
    """[count] zeros that will all be written at once: in large pages, else page faults are half the time of that."""
    memory = untouched_memory(count * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
