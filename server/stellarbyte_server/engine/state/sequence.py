"""One request on its way through the engine, and the part of it that a step computes."""

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.block_pool import BlockTable
from stellarbyte_server.engine.state.prefix_cache import BlockKeys
from stellarbyte_server.protocol.request import GenerationRequest


class TokenMask(Protocol):
    """What may follow: the part of a grammar's state that sampling asks for."""

    num_words: int
    """Of a mask: one for 32 tokens of the vocabulary, rounded up."""

    def mask(self, out: np.ndarray) -> None:
        """Set bit v % 32 of the uint32 word v // 32 for every token v that may follow, and clear all others."""

    @property
    def is_ready(self) -> bool:
        """`mask` need not wait for another thread."""

    @property
    def is_slow(self) -> bool:
        """Its masks are computed by another thread, each after the token before it is known."""

    def rewind(self, num_tokens: int) -> None:
        """Go back to where it was before the last `num_tokens` that it accepted."""


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A request, its tokens and its blocks.

    `rank` orders sequences by importance, least first; no two are equal. `arrived_s` is the scheduler's clock.
    """

    request: GenerationRequest
    table: BlockTable
    rank: tuple[float, int]
    arrived_s: float
    account: Account = field(default_factory=Account)
    adapter: AdapterVersion | None = None
    leader: "Sequence | None" = None  # has the same prompt and computes it first
    grammar: TokenMask | None = None
    end_token_ids: frozenset[int] = frozenset()  # those that end the answer
    keys: BlockKeys | None = None  # made when first needed: they begin with the adapter's content, then known
    queued_s: float = field(init=False)  # since when it has not run
    tokens: "array[int]" = field(init=False)  # prompt, then what was sampled
    num_computed: int = 0  # tokens whose keys are in the cache, or were and are out of sight; of steps that were read
    num_launched: int = 0  # tokens given to steps, read or in flight
    num_tokens: int = field(init=False)  # `tokens`, and those that steps in flight sample for it
    max_launched: int = field(init=False)  # tokens that are ever computed: an answer's last one never is
    num_full: int = 0  # blocks from the sequence's start that are full, and settled by the scheduler
    next_full_at: int = 0  # num_computed with which there is another
    is_running: bool = False
    was_admitted: bool = False  # has run at least once
    running_since_s: float = 0.0
    turn_start: int = 0  # tokens it had when it began, or began again, to run
    num_evicted: int = 0  # tokens out of sight, as far as they were counted
    num_cached: int = 0  # prompt tokens that were found in the cache when it first ran
    samples: bool = field(init=False)  # it has an answer, and is not only a prompt
    reads_cache: bool = field(init=False)  # it does not need to see every token of its prompt
    is_over: bool = False  # it was taken out of the scheduler
    is_rewound: bool = False  # tokens were taken back, and the executor was not told yet

    def __post_init__(self) -> None:
        self.tokens = array("I", self.request.prompt_token_ids)
        self.num_tokens = len(self.tokens)
        self.queued_s = self.arrived_s
        max_tokens = self.request.sampling.max_tokens
        self.samples = max_tokens > 0
        self.max_launched = self.num_prompt + max(0, max_tokens - 1)
        self.reads_cache = self.request.sampling.prompt_logprobs is None and self.request.pooling != "mean"

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def adapter_slot(self) -> int:
        return 0 if self.adapter is None else self.adapter.slot

    @property
    def num_unread(self) -> int:
        """Tokens whose values are not known yet, since the steps that sample them have not been read."""
        return self.num_tokens - len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Tokens, unread ones included, that no step was given yet."""
        return self.num_tokens - self.num_launched

    @property
    def num_generated(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def waits_for_leader(self) -> bool:
        """Another sequence is computing the same prompt, which will then be in the cache."""
        leader = self.leader
        return leader is not None and not leader.is_over and leader.num_computed < leader.num_prompt

    @property
    def waits_for_mask(self) -> bool:
        """What may follow is being computed, or will be on another thread: others go on without it."""
        grammar = self.grammar
        return grammar is not None and (not grammar.is_ready or (grammar.is_slow and self.num_unread > 0))

    def rewind(self, count: int) -> list[int]:
        """Take back the last `count` tokens of the answer, and all that is kept of them.

        No step with it may be in flight. Its grammar must have accepted these tokens, if it has one. Its newest token
        is computed next; what is in the cache of the tokens before it counts.

        Returns the blocks that it does not need any more, last positions first, for the pool.
        """
        assert 0 < count <= self.num_generated and not self.num_unread
        del self.tokens[-count:]
        self.num_tokens = len(self.tokens)
        self.is_rewound = True
        if self.grammar is not None:
            self.grammar.rewind(count)
        return self.compute_again(self.num_tokens - 1)

    def compute_again(self, start: int) -> list[int]:
        """Let nothing count as computed from position `start` on; the blocks that are unused then."""
        layout = self.table.layout
        self.num_computed = self.num_launched = min(self.num_computed, start)
        while self.num_full and layout.block_end(self.num_full - 1) > self.num_computed:
            self.num_full -= 1
        self.next_full_at = layout.block_end(self.num_full)
        if self.keys is not None:
            self.keys.rewind(self.num_computed)
        return self.table.pop_after(self.num_computed)


class Chunk(NamedTuple):
    """Tokens start..start+length of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # it ends at the sequence's last token, so the step yields the next one
