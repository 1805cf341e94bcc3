"""Decides what every step computes. Plain Python over counts of tokens and blocks; knows no tensors and no text.

There is no prefill or decode phase: a sequence has tokens and a count of computed ones, and a step gives it a part of
the token budget, sequences that only need their newest token first. A token is sampled when a sequence's last token
is computed.

Steps may be scheduled ahead: `schedule` goes by what steps were given (`num_launched`) and by tokens whose values are
not known yet (`num_tokens`), so one step may be in flight: it is recorded (`apply`) before the next `schedule`.

A step of a sequence that decodes touches a few fields of that sequence; blocks are looked at only when one is needed
or has been filled.
"""

import contextlib
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from server.engine.adapter_slots import Move
from server.engine.adapter_version import AdapterVersion
from server.engine.block_pool import BlockPool, BlockTable, CacheLayout
from server.engine.prefix_cache import NOTHING_CACHED, BlockKeys, CachedPrefix, find_prefix
from server.engine.request import MAX_SLIDING_TOKENS, QUEUE_FULL, GenerationRequest, RequestRejected
from server.engine.sequence import Chunk, Sequence
from server.engine.waiting import WaitingQueue, rank

_rank = attrgetter("rank")

MAX_SCORED_TOKENS = 256  # of a prompt in one step, where each needs a row of logits


class AdapterGate(Protocol):
    """What the scheduler asks of the registry of adapters."""

    def place(self, waiting: Iterable[Sequence]) -> Move | None: ...
    def finish_move(self, move: Move) -> None: ...
    def may_enter(self, sequence: Sequence) -> bool: ...
    def enter(self, version: AdapterVersion) -> None: ...
    def leave(self, version: AdapterVersion) -> None: ...


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
        adapters: AdapterGate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.layout = layout
        self.pool = pool
        self.waiting = WaitingQueue(limits.queue_timeout_s)
        self.running: list[Sequence] = []  # most important first
        self.admitted: list[Sequence] = []  # those the last `schedule` let run for the first time
        self.num_blocked = 0  # those the last `schedule` passed over, since their adapters are not there yet
        self.totals = SchedulerTotals()
        self._prefix_caching = prefix_caching
        self._adapters = adapters
        self._clock = clock
        self._num_added = 0
        self._num_reserved = 0  # places in the queue of requests that are not ready to be added

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def reserve(self) -> None:
        """Keep a place in the queue for a request that will be added, or given up, later.

        Raises:
            RequestRejected: the queue is full.
        """
        self._require_place()
        self._num_reserved += 1

    def give_up_place(self) -> None:
        self._num_reserved -= 1

    def _require_place(self) -> None:
        num_waiting = len(self.waiting) + self._num_reserved
        if num_waiting + len(self.running) >= self.limits.max_num_seqs + self.limits.max_queued_requests:
            busy = f"{len(self.running)} requests are running and {num_waiting} are waiting"
            raise RequestRejected(f"{busy} already; try again later.", code=QUEUE_FULL)

    def add(
        self, request: GenerationRequest, adapter: AdapterVersion | None = None, leader: Sequence | None = None
    ) -> Sequence:
        """Queue a request, to run with `adapter`, and not before `leader` has computed the prompt they share.

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
        self._require_place()
        self._num_added += 1
        arrived_s = self._clock()
        sequence = Sequence(
            request=request,
            table=BlockTable(self.layout),
            rank=rank(request.priority, arrived_s, self._num_added),
            arrived_s=arrived_s,
            adapter=adapter,
            leader=leader,
        )
        self.waiting.add(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and free its blocks; what a step in flight says of it is dropped."""
        sequence.is_over = True
        if sequence.is_running:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)
        self._count_evicted(sequence)

    def expire(self) -> list[Sequence]:
        """Remove and return the sequences that have waited for their first step for too long."""
        expired = self.waiting.pop_expired(self._clock())
        for sequence in expired:
            sequence.is_over = True
        return expired

    def evicted_tokens(self, sequence: Sequence) -> int:
        """How many tokens of a sequence have gone out of sight; 0 if it never ran."""
        return self.layout.evicted_tokens(len(sequence.tokens)) if sequence.was_admitted else 0

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks and reserve their blocks; [] when there is nothing to do."""
        budget = self.limits.max_num_batched_tokens
        self.admitted = []
        if self.waiting and self._adapters is not None:
            self._place_adapters(self._adapters)
        preemptions = self.totals.num_preemptions
        chunks: list[Chunk] = []
        prefills: list[Sequence] = []
        for sequence in self.running:  # the last ones may be preempted meanwhile, which only shortens the list
            launched = sequence.num_launched
            if sequence.num_tokens - launched > 1:
                prefills.append(sequence)
            elif launched == sequence.max_launched:
                pass  # it ends when its last step is read
            elif budget and (launched < sequence.table.capacity or self._reserve(sequence, 1)):
                samples = sequence.samples
                sequence.num_launched = launched + 1
                sequence.num_tokens += samples
                chunks.append(Chunk(sequence, launched, 1, samples))
                budget -= 1
        if chunks and self.limits.max_prefill_tokens is not None:
            budget = min(budget, self.limits.max_prefill_tokens)
        for sequence in prefills:
            if budget and sequence.is_running:
                budget -= self._add_prefill(sequence, budget, chunks)
        if self.totals.num_preemptions > preemptions:
            return self._without_preempted(chunks)  # no room for newcomers either
        self.num_blocked = 0
        for sequence in list(self.waiting) if budget and len(self.running) < self.limits.max_num_seqs else ():
            if self._adapters is not None and not self._adapters.may_enter(sequence):
                self.num_blocked += 1
                continue  # it holds up nobody
            if self._prefix_caching and sequence.waits_for_leader:
                continue
            if not self._admit(sequence):
                break
            budget -= self._add_prefill(sequence, budget, chunks)
            if not budget or len(self.running) >= self.limits.max_num_seqs:
                break
        return chunks

    @contextlib.contextmanager
    def outsider(self, request: GenerationRequest) -> Iterator[Chunk]:
        """The prompt of a request that is in nobody's way, for as long as it is computed. There must be free blocks."""
        sequence = Sequence(request=request, table=BlockTable(self.layout), rank=(0.0, 0), arrived_s=self._clock())
        blocks = self.pool.take(sequence.table.missing(sequence.num_prompt))
        assert blocks is not None
        sequence.table.add(blocks)
        try:
            yield Chunk(sequence, 0, sequence.num_prompt, sequence.samples)
        finally:
            sequence.is_over = True
            self.pool.give_back(sequence.table.pop_all())

    def _without_preempted(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks without those of sequences that were preempted after they got them."""
        kept = []
        for chunk in chunks:
            if chunk.sequence.is_running:
                kept.append(chunk)
            else:
                chunk.sequence.num_tokens -= chunk.samples
        return kept

    def _place_adapters(self, adapters: AdapterGate) -> None:
        """Let waiting sequences get slots for their adapters, if need be from running ones that had theirs for long."""
        move = adapters.place(self.waiting)
        if move is not None:
            for sequence in [s for s in self.running if s.adapter is not None and s.adapter.slot == move.slot]:
                self._preempt(sequence)
            adapters.finish_move(move)

    def apply(self, chunks: list[Chunk], sampled: list[int]) -> list[tuple[Sequence, int | None]]:
        """Record a finished step; `sampled` has one token for each chunk that samples, in order.

        Steps are recorded in the order in which they were scheduled. Blocks are named and freed here and not before,
        since only now their tokens are known; what was sampled for a sequence that is over is dropped.

        Returns the sequences that got a token, with the token, and with None those that are only a prompt when it has
        been computed. Ending them is the caller's decision (`remove`).
        """
        tokens = iter(sampled)
        grown: list[tuple[Sequence, int | None]] = []
        for sequence, start, length, samples in chunks:
            computed = start + length
            if sequence.is_running:
                sequence.num_computed = computed
                if computed >= sequence.next_full_at:
                    self._settle_blocks(sequence)
            elif sequence.is_over:
                if samples:
                    next(tokens)
                continue
            # One that was preempted while the step ran has lost its blocks, but gets the step's token.
            if samples:
                token = next(tokens)
                sequence.tokens.append(token)
                grown.append((sequence, token))
            elif computed == len(sequence.tokens):
                grown.append((sequence, None))
        return grown

    def _add_prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Give a sequence up to `budget` tokens of the step; how many it got."""
        pending = sequence.num_pending
        most = budget if sequence.request.sampling.prompt_logprobs is None else min(budget, MAX_SCORED_TOKENS)
        length = self._reserve(sequence, min(pending, most))
        if length:
            samples = length == pending and sequence.samples
            chunks.append(Chunk(sequence, sequence.num_launched, length, samples))
            sequence.num_launched += length
            sequence.num_tokens += samples
        return length

    def _reserve(self, sequence: Sequence, length: int) -> int:
        """Take blocks for a running sequence's next `length` tokens, or for as many as there are blocks.

        Where there are none at all the least important sequences are preempted; it may itself be one: then 0. It is not
        while a step with it is in flight, which may put blocks of its own out of sight: then it waits for that, with 0.
        """
        table, launched = sequence.table, sequence.num_launched
        while True:
            length = min(length, table.capacity_with(self.pool.num_free) - launched)
            if length > 0:
                blocks = self.pool.take(table.missing(launched + length))
                assert blocks is not None, "blocks were counted before they were taken"
                table.add(blocks)
                return length
            if self.running[-1] is sequence and sequence.num_computed < launched:
                return 0
            self._preempt(self.running[-1])
            if not sequence.is_running:
                return 0
            length = 1

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run if there are blocks for its tokens, as far as they stay visible.

        It starts after what the cache holds of it. False: there are too few blocks.
        """
        cached = self._find_prefix(sequence)
        shared = cached.sink_blocks + cached.blocks
        needed = self.layout.peak_blocks(len(sequence.tokens), 1) - self.pool.num_held(shared)
        if needed > self.pool.num_free:
            return False
        # A `schedule` does not let in again whom it preempts, and before the next one the step in flight is recorded.
        assert not sequence.num_unread, "all tokens of a waiting sequence are known"
        self.waiting.remove(sequence)
        if sequence.adapter is not None and self._adapters is not None:
            self._adapters.enter(sequence.adapter)
        self.pool.hold(shared)
        sequence.table.start_after(cached.sink_blocks, cached.num_unseen, cached.blocks)
        sequence.num_computed = sequence.num_launched = cached.num_tokens
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
        return True

    def _find_prefix(self, sequence: Sequence) -> CachedPrefix:
        """What the cache holds of a sequence; never its last token, whose computation yields the next one."""
        if not self._prefix_caching or not sequence.reads_cache:
            return NOTHING_CACHED
        return find_prefix(self._keys(sequence, len(sequence.tokens) - 1), self.layout, self.pool)

    def _keys(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """The keys of the blocks that a sequence's first tokens fill."""
        if sequence.keys is None:
            sequence.keys = BlockKeys(self.layout, _salt(sequence))
        sequence.keys.extend(sequence.tokens, num_tokens)
        return sequence.keys.keys

    def _settle_blocks(self, sequence: Sequence) -> None:
        """Name the blocks that have become full; free those that are out of sight from the end of the last full one.

        Freed from there and not from the newest token on, a sequence always leaves a window that ends with a whole
        block, which is where its continuation can start. A stream's own tokens are forgotten with their block, since
        a continuation needs the last window only: so an endless stream uses the same few blocks over and over.
        Prompts are kept: others may begin like them.
        """
        layout, table = self.layout, sequence.table
        self._count_evicted(sequence)
        keys = self._keys(sequence, sequence.num_computed) if self._prefix_caching else []
        while sequence.next_full_at <= sequence.num_computed:
            if self._prefix_caching:
                self.pool.name(table.block(sequence.num_full), keys[sequence.num_full])
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
        sequence.num_computed = sequence.num_launched = 0
        sequence.queued_s = self._clock()
        self.waiting.add(sequence)
        self.totals.num_preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.rank, key=_rank)]
        sequence.is_running = False
        if sequence.adapter is not None and self._adapters is not None:
            self._adapters.leave(sequence.adapter)
        # A step in flight may still read and write these blocks. The next step may have them all the same: the device
        # runs steps in order, and what the one in flight writes is in blocks that have no keys yet.
        self.pool.give_back(sequence.table.pop_all())


def _salt(sequence: Sequence) -> bytes:
    """What two sequences must have in common, beside their tokens, to share content of the cache."""
    adapter = None if sequence.adapter is None else (sequence.adapter.content_hash, sequence.request.adapter_scale)
    return repr((adapter, sequence.request.cache_salt)).encode()
