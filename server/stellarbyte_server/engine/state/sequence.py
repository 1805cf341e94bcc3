"""A request in the engine, and the part of it that a step computes."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.block_pool import BlockTable
from stellarbyte_server.engine.state.lower_tiers import BlockLoad
from stellarbyte_server.engine.state.prefix_cache import BlockKeys
from stellarbyte_server.protocol.request import GenerationRequest

_UNKNOWN = -1


class TokenMask(Protocol):
    """A grammar's allowed next tokens, for sampling."""

    num_words: int
    """Words of a mask: one for 32 tokens of the vocabulary, rounded up."""

    def mask(self, out: np.ndarray) -> None:
        """Set bit v % 32 of the uint32 word v // 32 for every allowed token v, and clear all others."""

    @property
    def is_ready(self) -> bool:
        """Whether `mask` returns without waiting for another thread."""

    @property
    def is_slow(self) -> bool:
        """Whether another thread computes the masks, each after the previous token is known."""

    @property
    def expected_s(self) -> float:
        """Seconds that a mask is expected to take."""

    def forced(self) -> tuple[int, ...]:
        """The next tokens, as far as the grammar leaves no choice; () if it does."""

    def num_allowed(self, token_ids: Iterable[int]) -> int:
        """How many of these tokens, from the first on, it allows."""

    def accept(self, token_id: int) -> None:
        """Advance by an allowed token."""

    def rewind(self, num_tokens: int) -> None:
        """Undo the last `num_tokens` accepted tokens, and an error of theirs."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete."""

    @property
    def error(self) -> str | None:
        """Why the grammar cannot continue, in one sentence; None: it can."""


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A request, its tokens and its blocks.

    `rank` orders sequences, least first, without ties. `arrived_s` is by the scheduler's clock.
    """

    request: GenerationRequest
    table: BlockTable
    rank: tuple[float, int]
    arrived_s: float
    account: Account = field(default_factory=Account)
    adapter: AdapterVersion | None = None
    leader: "Sequence | None" = None  # has the same prompt and computes it first
    grammar: TokenMask | None = None
    end_token_ids: frozenset[int] = frozenset()  # tokens that end the answer
    _adapter_start: int | None = field(default=_UNKNOWN, init=False)  # computed on first use, as the keys
    keys: BlockKeys | None = None  # created on first use: they depend on the adapter's content, which is known then
    queued_s: float = field(init=False)  # time since which it has not run
    tokens: "array[int]" = field(init=False)  # prompt, then sampled tokens
    num_computed: int = 0  # tokens with keys in the cache, or evicted; of steps already read
    num_launched: int = 0  # tokens assigned to steps, read or in flight
    num_tokens: int = field(init=False)  # `tokens`, plus those that steps in flight sample
    max_launched: int = field(init=False)  # most tokens to compute: an answer's last one is not
    num_full: int = 0  # full blocks from the sequence's start, settled by the scheduler
    next_full_at: int = 0  # num_computed at which the next one is full
    is_running: bool = False
    was_admitted: bool = False  # whether it has run
    running_since_s: float = 0.0
    turn_start: int = 0  # its tokens when it last started or resumed
    num_evicted: int = 0  # evicted tokens counted so far
    num_cached: int = 0  # prompt tokens found in the cache at its first step
    num_preemptions: int = 0
    samples: bool = field(init=False)  # whether it has an answer
    reads_cache: bool = field(init=False)  # not if all tokens of its prompt must be computed
    is_over: bool = False  # removed from the scheduler
    is_rewound: bool = False  # tokens were undone, which the executor does not know yet
    draft: tuple[int, ...] = ()  # guesses of the tokens after `tokens`, for the next step
    load: BlockLoad | None = None  # of blocks from lower tiers, for which it waits
    has_looked_below: bool = False  # for such blocks, since it was queued

    def __post_init__(self) -> None:
        self.tokens = array("I", self.request.prompt_token_ids)
        self.num_tokens = len(self.tokens)
        self.queued_s = self.arrived_s
        max_tokens = self.request.sampling.max_tokens
        self.samples = max_tokens > 0
        self.max_launched = self.num_prompt + max(0, max_tokens - 1)
        self.reads_cache = self.request.sampling.prompt_logprobs is None and self.request.pooling not in (
            "mean",
            "logits",
        )

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def adapter_slot(self) -> int:
        return 0 if self.adapter is None else self.adapter.slot

    @property
    def adapter_start(self) -> int | None:
        """The position of the first token that has its adapter, which must have been read; None: no token has it."""
        if self._adapter_start == _UNKNOWN:
            self._adapter_start = 0 if self.adapter is None else self.adapter.start_in(self.request.prompt_token_ids)
        return self._adapter_start

    @property
    def num_unread(self) -> int:
        """Tokens with unknown values, as the steps that sample them have not been read."""
        return self.num_tokens - len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Tokens, including unread ones, not assigned to a step."""
        return self.num_tokens - self.num_launched

    @property
    def num_generated(self) -> int:
        """Known tokens of the answer."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def waits_for_leader(self) -> bool:
        """Whether another sequence is computing the same prompt, which will then be in the cache."""
        leader = self.leader
        return leader is not None and not leader.is_over and leader.num_computed < leader.num_prompt

    @property
    def waits_for_mask(self) -> bool:
        """Whether another thread computes, or will compute, the next mask; other sequences continue."""
        grammar = self.grammar
        return grammar is not None and (not grammar.is_ready or (grammar.is_slow and self.num_unread > 0))

    def rewind(self, count: int) -> list[int]:
        """Undo the last `count` tokens of the answer and all their state.

        No step with it may be in flight. Its grammar, if any, must have accepted these tokens. Its newest token is
        computed next; cached tokens before it count as computed.

        Returns the blocks that are then unused, last positions first, for the pool.
        """
        assert 0 < count <= self.num_generated and not self.num_unread
        del self.tokens[-count:]
        self.num_tokens = len(self.tokens)
        self.is_rewound = True
        if self.grammar is not None:
            self.grammar.rewind(count)
        return self.compute_again(self.num_tokens - 1)

    def drop_last(self, count: int) -> None:
        """Drop the last `count` tokens of an answer that has ended before them. Its blocks stay as they are."""
        del self.tokens[len(self.tokens) - count :]
        self.num_tokens = len(self.tokens)
        self.num_computed = self.num_launched = min(self.num_computed, self.num_tokens - 1)

    def compute_again(self, start: int) -> list[int]:
        """Mark tokens from position `start` on as not computed; returns the blocks that are then unused."""
        layout = self.table.layout
        self.num_computed = self.num_launched = min(self.num_computed, start)
        while self.num_full and layout.block_end(self.num_full - 1) > self.num_computed:
            self.num_full -= 1
        self.next_full_at = layout.block_end(self.num_full)
        if self.keys is not None:
            self.keys.rewind(self.num_computed)
        return self.table.pop_after(self.num_computed)


class Chunk(NamedTuple):
    """Tokens start..start+length of a sequence, for one step."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # it ends at the sequence's last token or a draft after it, so the step samples the next ones
    draft: tuple[int, ...] = ()  # its last tokens, if they are guesses that the step verifies
