"""One request on its way through the engine, and the part of it that a step computes. Plain Python; decides nothing."""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from server.engine.adapter_version import AdapterVersion
from server.engine.block_pool import BlockTable
from server.engine.prefix_cache import BlockKeys
from server.engine.request import GenerationRequest


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A request, its tokens and its blocks.

    `rank` orders sequences by importance, least first; no two are equal. `arrived_s` is the scheduler's clock.
    """

    request: GenerationRequest
    table: BlockTable
    rank: tuple[float, int]
    arrived_s: float
    adapter: AdapterVersion | None = None
    keys: BlockKeys | None = None  # made when first needed: they begin with the adapter's content, then known
    queued_s: float = field(init=False)  # since when it has not run
    tokens: "array[int]" = field(init=False)  # prompt, then what was sampled
    num_computed: int = 0  # tokens whose keys are in the cache, or were and are out of sight
    num_full: int = 0  # blocks from the sequence's start that are full, and settled by the scheduler
    next_full_at: int = 0  # num_computed with which there is another
    is_running: bool = False
    was_admitted: bool = False  # has run at least once
    num_evicted: int = 0  # tokens out of sight, as far as they were counted
    num_cached: int = 0  # prompt tokens that were found in the cache when it first ran

    def __post_init__(self) -> None:
        self.tokens = array("I", self.request.prompt_token_ids)
        self.queued_s = self.arrived_s

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def adapter_slot(self) -> int:
        return 0 if self.adapter is None else self.adapter.slot

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


class Chunk(NamedTuple):
    """Tokens start..start+length of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # it ends at the sequence's last token, so the step yields the next one
