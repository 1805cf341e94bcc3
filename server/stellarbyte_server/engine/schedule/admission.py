"""Admission: starts waiting sequences, preempts running ones, assigns blocks. Decisions over counts."""

import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from stellarbyte_server.engine.adapters.slots import AdapterSlots, Move
from stellarbyte_server.engine.schedule.loading import Loading
from stellarbyte_server.engine.schedule.places import TURN_S, least_entitled, num_blocks, one, who_gives_up
from stellarbyte_server.engine.schedule.waiting import WaitingQueue, rank
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.block_pool import BlockPool, CacheLayout
from stellarbyte_server.engine.state.kept_blocks import KeptBlocks
from stellarbyte_server.engine.state.prefix_cache import CachedPrefix
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.request import GenerationRequest

_rank = attrgetter("rank")


class AdapterGate(Protocol):
    """The scheduler's interface to the registry of adapters."""

    slots: AdapterSlots

    def place(self, waiting: Iterable[Sequence]) -> Move | None: ...
    def finish_move(self, move: Move) -> None: ...
    def enter(self, version: AdapterVersion) -> None: ...
    def leave(self, version: AdapterVersion) -> None: ...


@dataclass(kw_only=True)
class AdmissionTotals:
    """Counts since the engine's start."""

    num_preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens of requests at their first step
    prefix_hits: int = 0  # of these, tokens found in the cache


class Admission:
    """Running and waiting sequences. `begin_step` comes first in every step.

    The pool must hold `layout.peak_blocks(n, 1)` blocks for the longest sequence: so that one can always run.
    """

    def __init__(
        self,
        max_num_seqs: int,
        queue_timeout_s: float | None,
        layout: CacheLayout,
        pool: BlockPool,
        *,
        prefix_caching: bool = True,
        adapters: AdapterGate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout
        self.pool = pool
        self.kept = KeptBlocks(layout, pool, prefix_caching=prefix_caching)
        self.loading = None if pool.tiers is None else Loading(layout, pool, self.kept, pool.tiers)
        self.waiting = WaitingQueue(queue_timeout_s)
        self.running: list[Sequence] = []  # in order of rank
        self.admitted: list[Sequence] = []  # sequences that start in this step
        self.totals = AdmissionTotals()
        self.live: Counter[Account] = Counter()  # sequences of each account with any
        self._max_num_seqs = max_num_seqs
        self._adapters = adapters
        self._clock = clock
        self._num_ranked = 0
        self._made_room_for: Sequence | None = None  # the only sequence that this step may start
        self._num_preempted_before = 0  # at the start of this step
        self._claimed_blocks = 0  # free blocks that running prompts will need
        self._short_of_blocks: set[Account] = set()  # accounts without blocks in this step

    def begin_step(self) -> None:
        """Start a step: preempt running sequences for waiting ones where fairness requires it."""
        self.admitted = []
        self._made_room_for = None
        self._short_of_blocks.clear()
        if self.waiting:
            self._claimed_blocks = self._blocks_of_prompts()
            if self._adapters is not None:
                self._place_adapters(self._adapters)
            self._make_room()
        self._num_preempted_before = self.totals.num_preemptions

    @property
    def has_preempted(self) -> bool:
        """Whether blocks ran out in this step, so that it starts no sequences."""
        return self.totals.num_preemptions > self._num_preempted_before

    @property
    def has_place(self) -> bool:
        return len(self.running) < self._max_num_seqs

    def next_rank(self, request: GenerationRequest, now_s: float) -> tuple[float, int]:
        self._num_ranked += 1
        return rank(request.priority, now_s, self._num_ranked)

    def remove(self, sequence: Sequence, *, keep_content: bool = True) -> None:
        """Remove a running or waiting sequence; without `keep_content` the cache forgets its blocks."""
        if sequence.is_running:
            self._stop_running(sequence, keep_content=keep_content)
        else:
            self.waiting.remove(sequence)

    def num_blocked(self) -> int:
        """Number of waiting sequences without a resident adapter, or whose blocks are being loaded."""
        adapters = self._adapters
        return sum(
            sequence.load is not None or (adapters is not None and not adapters.slots.may_enter(sequence))
            for sequence in self.waiting
        )

    def _place_adapters(self, adapters: AdapterGate) -> None:
        """Assign slots to adapters of waiting sequences, if necessary by preempting running ones after their time."""
        move = adapters.place(self.waiting)
        if move is not None:
            for sequence in [s for s in self.running if s.adapter is not None and s.adapter.slot == move.slot]:
                self.preempt(sequence)
            adapters.finish_move(move)

    def _make_room(self) -> None:
        """Preempt running sequences for the first waiting one, if its account has less than others or it is its
        turn."""
        now_s = self._clock()
        newcomer = self._first_newcomer()
        if newcomer is None or (len(self.live) < 2 and now_s - newcomer.queued_s < TURN_S):
            return
        if not self.has_place:
            given_up = who_gives_up(newcomer, self.running, one, 1, 1, now_s)
        else:
            needed = self._needed_blocks(newcomer, self.kept.find(newcomer))
            missing = needed - self._num_unclaimed()
            if missing <= 0:
                return
            given_up = who_gives_up(newcomer, self.running, num_blocks, needed, missing, now_s)
            if not given_up.sequences and newcomer.account.num_running == 0 and now_s - newcomer.queued_s >= TURN_S:
                self._made_room_for = newcomer  # reserve the freed blocks for it
        for sequence in given_up.sequences:
            self.preempt(sequence, is_turn_over=given_up.turns_are_over)
            self._made_room_for = newcomer

    def _first_newcomer(self) -> Sequence | None:
        """The next sequence to start, if there is room."""
        for account in self.waiting.accounts():
            if account.bucket is not None and account.bucket.available(self._clock()) < 1:
                continue
            for sequence in self.waiting.of(account):
                if self._could_run(sequence):
                    return sequence
        return None

    def _could_run(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence lacks only room."""
        if self._adapters is not None and not self._adapters.slots.may_enter(sequence):
            return False
        if sequence.num_unread or sequence.load is not None:  # preempted while a step with it is in flight; loading
            return False
        if self._made_room_for is not None and sequence is not self._made_room_for:
            return False
        return not (self.kept.prefix_caching and sequence.waits_for_leader)

    def newcomers(self, most: int) -> Iterator[Sequence]:
        """Start waiting sequences for which there is room, of each account as many as can use `most` tokens."""
        num_places = self._max_num_seqs - len(self.running)
        num_unclaimed = self._num_unclaimed()
        for account in self.waiting.accounts():
            num_tokens = 0
            for sequence in self.waiting.of(account):
                if num_tokens >= most or not num_places:
                    break
                if not self._could_run(sequence):
                    continue
                needed = self._needed_blocks(sequence, self.kept.find(sequence))
                if needed > num_unclaimed:
                    break
                num_places -= 1
                num_unclaimed -= needed
                num_tokens += sequence.num_pending
                yield sequence

    def reserve(self, sequence: Sequence, length: int) -> int:
        """Take blocks for a running sequence's next `length` tokens, or for as many as possible; returns their number.

        If no block is free, the least entitled sequences are preempted; 0 if this is one of them. A sequence in a step
        in flight, which may free blocks of its own, is not preempted but waits, with 0.
        """
        table, launched = sequence.table, sequence.num_launched
        while True:
            length = min(length, table.capacity_with(self.pool.num_free) - launched)
            if length > 0:
                blocks = self.pool.take(table.missing(launched + length))
                assert blocks is not None, "blocks were counted before they were taken"
                table.add(blocks)
                return length
            if self.loading is not None and self.loading.give_up():
                length = 1
                continue
            least = least_entitled(self.running)
            if least is sequence and sequence.num_computed < launched:
                return 0
            self.preempt(least)
            if not sequence.is_running:
                return 0
            length = 1

    def reserve_for_prompt(self, sequence: Sequence, length: int) -> int:
        """`reserve` from the blocks claimed for prompts."""
        num_free = self.pool.num_free
        length = self.reserve(sequence, length)
        self._claimed_blocks = max(0, self._claimed_blocks - max(0, num_free - self.pool.num_free))
        return length

    def enter(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if possible: it needs a place, and blocks for its visible tokens.

        It continues after its cached prefix; if that goes on in a lower tier, it waits for those blocks first.
        """
        if (
            not self.has_place
            or self.has_preempted
            or sequence.account in self._short_of_blocks  # otherwise sequences with few blocks would always go first
            or not self._could_run(sequence)
        ):
            return False
        cached = self.kept.find(sequence)
        needed = self._needed_blocks(sequence, cached)
        if needed > self._num_unclaimed():
            self._short_of_blocks.add(sequence.account)
            return False
        assert not sequence.num_unread, "all tokens of a waiting sequence are known"
        if self.loading is not None and self.loading.begin(sequence, cached):
            return False
        self._claimed_blocks += needed
        self.waiting.remove(sequence)
        if sequence.adapter is not None and self._adapters is not None:
            self._adapters.enter(sequence.adapter)
        self.pool.hold(cached.sink_blocks + cached.blocks)
        sequence.table.start_after(cached.sink_blocks, cached.num_unseen, cached.blocks)
        sequence.num_computed = sequence.num_launched = cached.num_tokens
        sequence.num_full = cached.num_blocks
        sequence.next_full_at = self.layout.block_end(cached.num_blocks)
        sequence.is_running = True
        sequence.running_since_s, sequence.turn_start = self._clock(), len(sequence.tokens)
        sequence.account.num_running += 1
        insort(self.running, sequence, key=_rank)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached = cached.num_tokens
            self.admitted.append(sequence)
            if self.kept.prefix_caching:
                self.totals.prefix_queries += sequence.num_prompt
                self.totals.prefix_hits += sequence.num_cached
        return True

    def _needed_blocks(self, sequence: Sequence, cached: CachedPrefix) -> int:
        """Free blocks that a waiting sequence needs to compute its tokens."""
        held = self.pool.num_held(cached.sink_blocks + cached.blocks)
        return self.layout.peak_blocks(len(sequence.tokens), 1) - held

    def _num_unclaimed(self) -> int:
        """Free blocks that the prompts of running sequences will not need."""
        return self.pool.num_free - self._claimed_blocks

    def _blocks_of_prompts(self) -> int:
        """Blocks that running sequences need to compute the tokens they have."""
        claimed = 0
        for sequence in self.running:
            if sequence.num_tokens - sequence.num_launched > 1:
                claimed += max(0, self.layout.peak_blocks(len(sequence.tokens), 1) - num_blocks(sequence))
        return claimed

    def preempt(self, sequence: Sequence, *, is_turn_over: bool = False) -> None:
        """Preempt a sequence; it resumes later, from its prefix in the cache at that time.

        With `is_turn_over` it is queued after all waiting sequences.
        """
        self._stop_running(sequence)
        sequence.has_looked_below = False
        sequence.num_computed = sequence.num_launched = 0
        sequence.queued_s = self._clock()
        if is_turn_over:
            sequence.rank = self.next_rank(sequence.request, sequence.queued_s)
        self.waiting.add(sequence)
        self.totals.num_preemptions += 1
        sequence.num_preemptions += 1

    def _stop_running(self, sequence: Sequence, *, keep_content: bool = True) -> None:
        del self.running[bisect_left(self.running, sequence.rank, key=_rank)]
        sequence.is_running = False
        sequence.account.num_running -= 1
        if sequence.adapter is not None and self._adapters is not None:
            self._adapters.leave(sequence.adapter)
        if self.loading is not None and keep_content:
            self.loading.touch(sequence)
        # A step in flight may still read and write these blocks. The next step may use them nevertheless: the device
        # runs steps in order, and the one in flight writes only to blocks without keys.
        self.pool.give_back(sequence.table.pop_all(), keep_content=keep_content)
