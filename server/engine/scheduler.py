"""Decides what every step computes. Plain Python over counts of tokens and blocks; knows no tensors and no text.

There is no prefill or decode phase: a sequence has tokens and a count of computed ones, and a step gives it a part of
the token budget, sequences that only need their newest token first. A token is sampled when a sequence's last token
is computed.

A step of a sequence that decodes touches a few fields of that sequence; blocks are looked at only when one is needed
or has been filled.
"""

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from server.engine.block_pool import BlockPool, BlockTable, CacheLayout
from server.engine.prefix_cache import NOTHING_CACHED, BlockKeys, CachedPrefix, find_prefix
from server.engine.request import MAX_SLIDING_TOKENS, QUEUE_FULL, GenerationRequest, RequestRejected
from server.engine.sequence import Chunk, Sequence
from server.engine.waiting import WaitingQueue, rank

_rank = attrgetter("rank")


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    max_num_seqs: int  # running at once
    max_num_batched_tokens: int  # computed in one step
    max_prefill_tokens: int | None = None  # most of them that prompts take while other sequences decode; None: all
    max_model_len: int  # tokens of prompt and answer together, for requests that do not slide
    max_queued_requests: int  # beyond max_num_seqs
    queue_timeout_s: float | None = None  # most time before the first step; None: no limit


@dataclass(kw_only=True)
class SchedulerTotals:
    """Counts from the start."""

    num_preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens of requests when they first ran
    prefix_hits: int = 0  # those of them that were in the cache
    evicted_tokens: int = (
        0  # computed tokens that have gone out of sight, of running requests as far as blocks are full
    )


class Scheduler:
    """The most important first (see `waiting.rank`); when blocks run out, the least important starts again later.

    The pool must hold `layout.peak_blocks(n, 1)` blocks for the longest sequence: then one always runs on.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        layout: CacheLayout,
        pool: BlockPool,
        *,
        prefix_caching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.layout = layout
        self.pool = pool
        self.waiting = WaitingQueue(limits.queue_timeout_s)
        self.running: list[Sequence] = []  # most important first
        self.admitted: list[Sequence] = []  # those the last `schedule` let run for the first time
        self.totals = SchedulerTotals()
        self._prefix_caching = prefix_caching
        self._clock = clock
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request.

        Raises:
            RequestRejected: it could never run to its end, or the queue is full.
        """
        prompt, answer = len(request.prompt_token_ids), request.sampling.max_tokens
        limit = self.limits.max_model_len if request.context_overflow == "error" else MAX_SLIDING_TOKENS
        if prompt + answer > limit:
            raise RequestRejected(
                f"The prompt has {prompt} tokens and max_tokens is {answer}; together they exceed the context of "
                f"{limit} tokens.",
                code="context_length_exceeded",
                param="max_tokens",
            )
        if len(self.waiting) + len(self.running) >= self.limits.max_num_seqs + self.limits.max_queued_requests:
            busy = f"{len(self.running)} requests are running and {len(self.waiting)} are waiting"
            raise RequestRejected(f"{busy} already; try again later.", code=QUEUE_FULL)
        self._num_added += 1
        arrived_s = self._clock()
        sequence = Sequence(
            request=request,
            table=BlockTable(self.layout),
            keys=BlockKeys(self.layout, request.cache_salt.encode()),
            rank=rank(request.priority, arrived_s, self._num_added),
            arrived_s=arrived_s,
        )
        self.waiting.add(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and free its blocks. Between two steps only."""
        if sequence.is_running:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)
        self._count_evicted(sequence)

    def expire(self) -> list[Sequence]:
        """Remove and return the sequences that have waited for their first step for too long."""
        return self.waiting.pop_expired(self._clock())

    def evicted_tokens(self, sequence: Sequence) -> int:
        """How many tokens of a sequence have gone out of sight; 0 if it never ran."""
        return self.layout.evicted_tokens(len(sequence.tokens)) if sequence.was_admitted else 0

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks and reserve their blocks; [] when there is nothing to do."""
        budget = self.limits.max_num_batched_tokens
        preemptions = self.totals.num_preemptions
        self.admitted = []
        chunks: list[Chunk] = []
        prefills: list[Sequence] = []
        for sequence in self.running:  # the last ones may be preempted meanwhile, which only shortens the list
            computed = sequence.num_computed
            if len(sequence.tokens) - computed > 1:
                prefills.append(sequence)
            elif budget and (computed < sequence.table.capacity or self._reserve(sequence, 1)):
                chunks.append(Chunk(sequence, computed, 1, True))
                budget -= 1
        if chunks and self.limits.max_prefill_tokens is not None:
            budget = min(budget, self.limits.max_prefill_tokens)
        for sequence in prefills:
            if budget and sequence.is_running:
                budget -= self._add_prefill(sequence, budget, chunks)
        if self.totals.num_preemptions > preemptions:
            return [chunk for chunk in chunks if chunk.sequence.is_running]  # no room for newcomers either
        while budget and self.waiting and len(self.running) < self.limits.max_num_seqs:
            newest = self._admit_first()
            if newest is None:
                break
            budget -= self._add_prefill(newest, budget, chunks)
        return chunks

    def apply(self, chunks: list[Chunk], sampled: list[int]) -> list[tuple[Sequence, int]]:
        """Record a finished step; `sampled` has one token for each chunk that samples, in order.

        Returns the sequences that got a token, with the token. Ending them is the caller's decision (`remove`).
        """
        tokens = iter(sampled)
        grown = []
        for sequence, start, length, samples in chunks:
            sequence.num_computed = computed = start + length
            if computed >= sequence.next_full_at:
                self._settle_blocks(sequence)
            if samples:
                token = next(tokens)
                sequence.tokens.append(token)
                grown.append((sequence, token))
        return grown

    def _add_prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Give a sequence up to `budget` tokens of the step; how many it got."""
        pending = sequence.num_pending
        length = self._reserve(sequence, min(pending, budget))
        if length:
            chunks.append(Chunk(sequence, sequence.num_computed, length, length == pending))
        return length

    def _reserve(self, sequence: Sequence, length: int) -> int:
        """Take blocks for a running sequence's next `length` tokens, or for as many as there are blocks.

        Where there are none at all the least important sequences are preempted; it may itself be one: then 0.
        """
        table, computed = sequence.table, sequence.num_computed
        while True:
            length = min(length, table.capacity_with(self.pool.num_free) - computed)
            if length > 0:
                blocks = self.pool.take(table.missing(computed + length))
                assert blocks is not None, "blocks were counted before they were taken"
                table.add(blocks)
                return length
            self._preempt(self.running[-1])
            if not sequence.is_running:
                return 0
            length = 1

    def _admit_first(self) -> Sequence | None:
        """Let the most important waiting sequence run if there are blocks for its tokens, as far as they stay visible.

        It starts after what the cache holds of it. None: there are too few blocks.
        """
        sequence = self.waiting.first
        cached = self._find_prefix(sequence)
        shared = cached.sink_blocks + cached.blocks
        needed = self.layout.peak_blocks(len(sequence.tokens), 1) - self.pool.num_held(shared)
        if needed > self.pool.num_free:
            return None
        self.waiting.remove(sequence)
        self.pool.hold(shared)
        sequence.table.start_after(cached.sink_blocks, cached.num_unseen, cached.blocks)
        sequence.num_computed = cached.num_tokens
        sequence.num_full = cached.num_blocks
        sequence.next_full_at = self.layout.block_end(cached.num_blocks)
        sequence.is_running = True
        insort(self.running, sequence, key=_rank)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached = cached.num_tokens
            self.admitted.append(sequence)
            if self._prefix_caching:
                self.totals.prefix_queries += sequence.num_prompt
                self.totals.prefix_hits += sequence.num_cached
        return sequence

    def _find_prefix(self, sequence: Sequence) -> CachedPrefix:
        """What the cache holds of a sequence; never its last token, whose computation yields the next one."""
        if not self._prefix_caching:
            return NOTHING_CACHED
        sequence.keys.extend(sequence.tokens, len(sequence.tokens) - 1)
        return find_prefix(sequence.keys.keys, self.layout, self.pool)

    def _settle_blocks(self, sequence: Sequence) -> None:
        """Name the blocks that have become full; free those that are out of sight from the end of the last full one.

        Freed from there and not from the newest token on, a sequence always leaves a window that ends with a whole
        block, which is where its continuation can start. A stream's own tokens are forgotten with their block, since
        a continuation needs the last window only: so an endless stream uses the same few blocks over and over.
        Prompts are kept: others may begin like them.
        """
        layout, table = self.layout, sequence.table
        self._count_evicted(sequence)
        if self._prefix_caching:
            sequence.keys.extend(sequence.tokens, sequence.num_computed)
        while sequence.next_full_at <= sequence.num_computed:
            if self._prefix_caching:
                self.pool.name(table.block(sequence.num_full), sequence.keys.keys[sequence.num_full])
            last_end = sequence.next_full_at
            sequence.num_full += 1
            sequence.next_full_at = layout.block_end(sequence.num_full)
        first = layout.num_sink_blocks + table.num_freed
        for number, block in enumerate(table.pop_unseen(last_end), first):
            self.pool.give_back((block,), keep_content=layout.block_end(number) <= sequence.num_prompt)

    def _count_evicted(self, sequence: Sequence) -> None:
        """Add what has gone out of sight since the last time; what a preempted sequence computes again counts once."""
        evicted = max(sequence.num_evicted, self.layout.evicted_tokens(sequence.num_computed + 1))
        self.totals.evicted_tokens += evicted - sequence.num_evicted
        sequence.num_evicted = evicted

    def _preempt(self, sequence: Sequence) -> None:
        """Stop a sequence; it runs again later, from what the cache still holds of it then."""
        self._stop_running(sequence)
        sequence.num_computed = 0
        self.waiting.add(sequence)
        self.totals.num_preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.rank, key=_rank)]
        sequence.is_running = False
        self.pool.give_back(sequence.table.pop_all())
