"""Blocks in host memory by key, the least recently used of which makes room for others."""

import mmap
import threading
from collections import Counter, OrderedDict

import numpy as np


class HostBlocks:
    """Slots of one piece of memory. For any thread.

    A slot is free, reserved by a thread that fills it, or has a key. A slot that a thread reads is pinned: it keeps its
    content even if its key is dropped.
    """

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        self.num_slots = num_slots
        self.memory = host_memory(num_slots, block_bytes)
        self._lock = threading.Lock()
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._key_of: dict[int, bytes] = {}
        self._pins: Counter[int] = Counter()

    def has(self, key: bytes) -> bool:
        return key in self._slot_of

    def reserve(self) -> int | None:
        """A slot to fill, for which the least recently used key may be dropped; None: all are pinned or reserved."""
        with self._lock:
            if not self._free:
                oldest = next((key for key, slot in self._slot_of.items() if not self._pins[slot]), None)
                if oldest is None:
                    return None
                self._drop(oldest)
            return self._free.pop()

    def put(self, key: bytes, slot: int, *, pinned: bool = False) -> None:
        """Give a filled slot its key. If another slot has it, that one loses it."""
        with self._lock:
            self._drop(key)
            self._slot_of[key] = slot
            self._key_of[slot] = key
            self._pins[slot] += pinned

    def give_back(self, slot: int) -> None:
        """Free a reserved slot."""
        with self._lock:
            self._free.append(slot)

    def pin(self, key: bytes) -> int | None:
        """The slot with this key, pinned; None: there is none."""
        with self._lock:
            slot = self._slot_of.get(key)
            if slot is not None:
                self._slot_of.move_to_end(key)
                self._pins[slot] += 1
            return slot

    def unpin(self, slot: int) -> None:
        with self._lock:
            self._pins[slot] -= 1
            if not self._pins[slot]:
                del self._pins[slot]
                if slot not in self._key_of:
                    self._free.append(slot)

    def touch(self, key: bytes) -> None:
        """Note the use of a key, if a slot has it."""
        with self._lock:
            if key in self._slot_of:
                self._slot_of.move_to_end(key)

    def drop(self, key: bytes) -> None:
        """Forget a key, if a slot has it."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        slot = self._slot_of.pop(key, None)
        if slot is not None:
            del self._key_of[slot]
            if not self._pins[slot]:
                self._free.append(slot)


def host_memory(num_rows: int, num_bytes: int) -> np.ndarray:
    """Zeros, uint8 [num_rows, num_bytes], that take memory only when written. They have pages of their own: only whole
    pages can be pinned."""
    return np.frombuffer(mmap.mmap(-1, num_rows * num_bytes), np.uint8).reshape(num_rows, num_bytes)
