"""A version of an adapter: one content under one name, from its first use on; or a mix of such. Plain data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

AdapterState = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The files of an adapter, inside a folder that the operator allowed, with links resolved."""

    config: Path
    weights: Path
    root: Path  # the allowed folder
    asked: str  # the name or path of the lookup
    shown: str  # the path in the API
    is_stored: bool = False  # the server's own copy, which never changes


@dataclass(slots=True)
class AdapterTotals:
    """Counts over all versions of a name."""

    num_requests: int = 0
    num_tokens: int = 0  # generated


@dataclass(eq=False, slots=True, kw_only=True)
class AdapterVersion:
    """A version. Accepted requests are bound to it until they end, even if its name gets another version.

    A mix of versions, each times a scale, has `parts`, and no files of its own.
    """

    name: str
    files: AdapterFiles | None  # None: lookup in progress, or not found; or a mix
    parts: "tuple[tuple[AdapterVersion, float], ...]" = ()  # of a mix: versions with their scales
    state: AdapterState = "ready"  # loading: first read; draining: replaced or unloaded, with requests left
    content_hash: str = ""  # SHA-256, hexadecimal; "" until read
    num_bytes: int = 0  # in memory
    rank: int = 0  # the largest of its modules
    matched: tuple[str, ...] = ()  # modules it changes
    unmatched: tuple[str, ...] = ()  # targets in its config without weights
    is_zero: bool = False  # adds nothing to any weight
    changed_tokens: tuple[int, ...] = ()  # those whose embedding it changes most
    invocation: tuple[int, ...] = ()  # tokens in a prompt from which on it acts; (): on all tokens
    error: str = ""  # one sentence, when failed
    is_fault: bool = False  # when failed: a fault of the server, not of the files
    failed_at_s: float = 0.0
    is_in_memory: bool = False
    is_reading: bool = False
    slot: int = 0  # of the bank; 0: none
    pinned: bool = False  # keeps its slot
    num_bound: int = 0  # requests not ended
    used_at: int = 0  # order of use
    totals: AdapterTotals = field(default_factory=AdapterTotals)
    own_totals: AdapterTotals = field(default_factory=AdapterTotals)  # of this version only

    @property
    def of_files(self) -> "tuple[AdapterVersion, ...]":
        """The versions whose files it is made of: a mix's parts, or itself."""
        return tuple(part for part, _ in self.parts) if self.parts else (self,)

    @property
    def with_parts(self) -> "tuple[AdapterVersion, ...]":
        """Itself and a mix's parts, to all of which a request is bound."""
        return (self, *(part for part, _ in self.parts))

    def start_in(self, prompt: Sequence[int]) -> int | None:
        """The position of the first token that it changes: where the last occurrence of its invocation begins, as in
        PEFT; None: the prompt has none, so no token has the adapter."""
        if not self.invocation:
            return 0
        tokens = np.array(prompt, dtype=np.int64)
        starts = np.arange(len(tokens) - len(self.invocation) + 1)
        for offset, token in enumerate(self.invocation):
            starts = starts[tokens[starts + offset] == token]
        return int(starts[-1]) if len(starts) else None

    @property
    def is_found(self) -> bool:
        """Whether its files are known."""
        return all(version.files is not None for version in self.of_files)

    @property
    def is_stored(self) -> bool:
        """Whether its files are the server's own copy, which never changes."""
        return self.files is not None and self.files.is_stored
