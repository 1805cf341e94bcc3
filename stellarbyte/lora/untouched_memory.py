"""CPU memory for large temporary arrays."""

import mmap

import torch


def untouched_memory(num_bytes: int) -> mmap.mmap:
    """Zeros that take memory only where written. Not from the heap, which may keep freed memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=flags)


def large_array(count: int, dtype: torch.dtype) -> torch.Tensor:
    """[count] zeros, to be written completely: in large pages, without which page faults take half the time."""
    memory = untouched_memory(count * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
