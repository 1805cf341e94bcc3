"""One content of an adapter under one name, from its first use to when it is forgotten. Plain data; decides nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

AdapterState = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """Where an adapter is read from. Both files were found inside a folder the operator allowed, links resolved."""

    config: Path
    weights: Path
    root: Path  # that folder
    asked: str  # what they were found by
    shown: str  # how the API names the place


@dataclass(slots=True)
class AdapterTotals:
    """Counts of all versions that a name had, one after the other."""

    num_requests: int = 0
    num_tokens: int = 0  # generated


@dataclass(eq=False, slots=True, kw_only=True)
class AdapterVersion:
    """Requests are bound to a version when they are accepted, and end on it whatever becomes of its name."""

    name: str
    files: AdapterFiles | None  # None: they are being looked for, or were not found
    state: AdapterState = "ready"  # loading: read for the first time; draining: its name is gone, requests are not
    content_hash: str = ""  # SHA-256, hexadecimal; "" until it was read
    num_bytes: int = 0  # in memory
    rank: int = 0  # the largest of its modules
    matched: tuple[str, ...] = ()  # modules it changes
    unmatched: tuple[str, ...] = ()  # targets in its config that it has no weights for
    error: str = ""  # one sentence, when failed
    is_fault: bool = False  # when failed: of the server, not of its files
    failed_at_s: float = 0.0
    is_in_memory: bool = False
    is_reading: bool = False
    slot: int = 0  # of the bank; 0: none
    num_bound: int = 0  # requests that have not ended, running or not
    used_at: int = 0  # order of use
    totals: AdapterTotals = field(default_factory=AdapterTotals)
