"""A record of the prompts sent to one replica, from which the cached prefix of a further prompt is guessed.

Engines report neither the blocks that they store nor those that they evict: a wrong guess only costs the time to
compute a prompt again, while reports would be a message for each block to each HTTP process.
"""

from collections import OrderedDict
from collections.abc import Sequence

MAX_BLOCKS = 512  # of a prompt that are looked at; longer prompts with these in common count as equal


def prefix_keys(token_ids: Sequence[int], salt: tuple[object, ...], block_size: int) -> list[int]:
    """A key for each full block of a prompt, which depends on the salt and on all tokens up to the block's end.

    Keys are of one process. Different prefixes may have one key, which leads to a wrong guess.
    """
    keys: list[int] = []
    key = hash(salt)
    for start in range(0, min(len(token_ids) // block_size, MAX_BLOCKS) * block_size, block_size):
        key = hash((key, tuple(token_ids[start : start + block_size])))
        keys.append(key)
    return keys


class SentPrefixes:
    """The keys of the blocks that were last sent to a replica, as many as its cache has."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._keys: OrderedDict[int, None] = OrderedDict()  # least recently sent first

    def num_blocks(self, keys: Sequence[int]) -> int:
        """Full blocks at the start of a prompt that were sent before."""
        return next((number for number, key in enumerate(keys) if key not in self._keys), len(keys))

    def note(self, keys: Sequence[int]) -> None:
        """Note that a prompt was sent. Its last blocks are forgotten first, as a prefix needs all before it."""
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._max_blocks:
            self._keys.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the replica's process has ended."""
        self._keys.clear()
