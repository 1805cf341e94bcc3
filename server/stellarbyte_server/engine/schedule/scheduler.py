"""The scheduler: chooses the chunks of each step. Decisions over counts of tokens and blocks.

There are no separate prefill and decode phases: a sequence has tokens and a count of computed ones, and a step assigns
it part of the token budget, first to sequences that need only their newest token. A token is sampled when a sequence's
last token is computed. Half of the budget for prompts goes by rank and half to the shortest; several accounts share a
step (see `shares`).

Steps may be scheduled ahead: `schedule` goes by what steps were given (`num_launched`) and by tokens whose values are
not known yet (`num_tokens`), so one step may be in flight: it is recorded (`apply`) before the next `schedule`.

A step of a decoding sequence changes few of its fields; blocks are accessed only when one is needed or full.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from stellarbyte_server.engine.schedule.admission import AdapterGate, Admission
from stellarbyte_server.engine.schedule.filling import Filling, rows_of_parts, with_drafts
from stellarbyte_server.engine.schedule.limits import SchedulerLimits
from stellarbyte_server.engine.schedule.loading import Loading
from stellarbyte_server.engine.schedule.shares import Demand, Part, divide, divide_in_background, settle, spend
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.block_pool import BlockPool, BlockTable, CacheLayout
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.request import (
    BACKGROUND_PRIORITY,
    MAX_SLIDING_TOKENS,
    QUEUE_FULL,
    GenerationRequest,
    RequestRejected,
)

SHARED_FOR_S = 1.0  # after a step of several accounts: they probably send again soon
FREE_CREDIT = 2  # tokens of credit for an account for each step without its requests


class Scheduler:
    """Schedules each account's sequences by rank (see `waiting.rank`), and accounts in equal shares (`shares`,
    `places`).

    Background accounts get the rest: a few tokens of a step, and places until another account needs them.

    The pool must hold `layout.peak_blocks(n, 1)` blocks for the longest sequence, so that one can always run.
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
        self._admission = Admission(
            limits.max_num_seqs,
            limits.queue_timeout_s,
            layout,
            pool,
            prefix_caching=prefix_caching,
            adapters=adapters,
            clock=clock,
        )
        self.waiting = self._admission.waiting
        self.running = self._admission.running  # in order of rank
        self.totals = self._admission.totals
        self.num_blocked = 0  # sequences that adapters, keys' limits or blocks held up in the last `schedule`
        self._clock = clock
        self._displaced: list[Sequence] = []
        self._keyless = Account()  # requests without a key
        self._num_reserved = 0  # reserved places in the queue
        self._turn = 0  # counts steps
        self._shared_until_s = 0.0  # another account may send again until then

    @property
    def admitted(self) -> list[Sequence]:
        """The sequences that started in the last `schedule`."""
        return self._admission.admitted

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._displaced)

    def account_of(self, request: GenerationRequest, account: Account | None) -> Account:
        """Where a request of a key's account belongs; None: it came without a key."""
        account = account or self._keyless
        return account.background() if request.priority == BACKGROUND_PRIORITY else account

    def reserve(self, account: Account | None = None) -> None:
        """Reserve a place in the queue, for a request that will be added or dropped later.

        Raises:
            RequestRejected: the queue is full.
        """
        account = account or self._keyless
        self._require_place(account)
        self._num_reserved += 1
        account.num_reserved += 1

    def give_up_place(self, account: Account | None = None) -> None:
        self._num_reserved -= 1
        (account or self._keyless).num_reserved -= 1

    def _require_place(self, account: Account) -> None:
        """RequestRejected if the queue is full, unless an account with more places loses one."""
        num_waiting = len(self.waiting) + self._num_reserved
        if num_waiting + len(self.running) < self.limits.max_num_seqs + self.limits.max_queued_requests:
            return
        queued = {each: len(self.waiting.of(each)) + each.num_reserved for each in self.waiting.accounts()}
        richest = max(queued, key=lambda each: (each.is_background, queued[each]), default=account)
        own = len(self.waiting.of(account)) + account.num_reserved
        is_behind = richest.is_background and not account.is_background
        if (is_behind or queued.get(richest, 0) > own + 1) and (newest := self.waiting.pop_newest(richest)) is not None:
            self._end(newest)
            self._displaced.append(newest)
            return
        busy = f"{len(self.running)} requests are already running and {num_waiting} waiting"
        raise RequestRejected(f"{busy}; try again later.", code=QUEUE_FULL)

    def add(
        self,
        request: GenerationRequest,
        adapter: AdapterVersion | None = None,
        leader: Sequence | None = None,
        account: Account | None = None,
        *,
        needs_place: bool = True,
    ) -> Sequence:
        """Queue a request of an account, to run with `adapter`, after `leader` has computed their common prompt.

        Without `needs_place` also in a full queue.

        Raises:
            RequestRejected: it exceeds the context, or the queue is full.
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
        account = account or self._keyless
        if needs_place:
            self._require_place(account)
        arrived_s = self._clock()
        sequence = Sequence(
            request=request,
            table=BlockTable(self.layout),
            rank=self._admission.next_rank(request, arrived_s),
            arrived_s=arrived_s,
            account=account,
            adapter=adapter,
            leader=leader,
        )
        if not self._admission.live[account]:
            account.credit += FREE_CREDIT * (self._turn - account.left_at)
        self._admission.live[account] += 1
        self.waiting.add(sequence)
        return sequence

    def remove(self, sequence: Sequence, *, keep_content: bool = True) -> None:
        """Remove a finished or aborted sequence and free its blocks, which stay in the prefix cache with
        `keep_content`. Results of a step in flight are dropped."""
        self._admission.remove(sequence, keep_content=keep_content)
        self._end(sequence)
        self._admission.kept.count_evicted(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.is_over = True
        if self._admission.loading is not None:
            self._admission.loading.drop(sequence)
        account = sequence.account
        self._admission.live[account] -= 1
        if not self._admission.live[account]:
            del self._admission.live[account]
            account.left_at = self._turn

    def expire(self) -> list[Sequence]:
        """Remove and return the sequences that have waited for their first step for too long."""
        expired = self.waiting.pop_expired(self._clock())
        for sequence in expired:
            self._end(sequence)
        return expired

    def take_displaced(self) -> list[Sequence]:
        """The sequences that have lost their places in the queue since the last call."""
        displaced, self._displaced = self._displaced, []
        return displaced

    def settle_loads(self) -> None:
        """Let sequences go on whose blocks have been loaded from lower tiers."""
        if self._admission.loading is not None:
            self._admission.loading.settle()

    @property
    def loading(self) -> Loading | None:
        """The blocks on their way from lower tiers; None: there are no lower tiers."""
        return self._admission.loading

    @property
    def num_evicted(self) -> int:
        """Computed tokens that were evicted; for running requests up to their last full block."""
        return self._admission.kept.num_evicted

    def evicted_tokens(self, sequence: Sequence) -> int:
        """The number of a sequence's evicted tokens; 0 if it never ran."""
        return self.layout.evicted_tokens(len(sequence.tokens)) if sequence.was_admitted else 0

    def seconds_until_allowed(self) -> float | None:
        """Seconds until an account at its key's limit may continue; None: no account is at its limit."""
        now_s = self._clock()
        waits = [
            account.bucket.seconds_until(1, now_s) for account in self._admission.live if account.bucket is not None
        ]
        return min((wait for wait in waits if wait > 0), default=None)

    def schedule(self, *, has_drafts: bool = False) -> list[Chunk]:
        """Choose the next step's chunks and reserve their blocks; [] if there is no work.

        `has_drafts`: sequences may have drafts, which get what is left of the step's tokens.
        """
        chunks = self._choose()
        return with_drafts(chunks, self._admission, self.limits) if has_drafts else chunks

    def _choose(self) -> list[Chunk]:
        """The chunks of a step without drafts."""
        self._turn += 1
        self._admission.begin_step()
        decodes, prefills = self._runnable()
        if not (prefills or self.waiting) and not self._has_parts():  # the usual step: only streams
            filling = Filling(self._admission, self.limits, self._turn)
            filling.add_rows(decodes, self.limits.max_num_batched_tokens)
            self.num_blocked = 0
            return filling.result()
        budget, most = self.limits.max_num_batched_tokens, self.limits.max_prefill_tokens
        others_are_near = self._clock() < self._shared_until_s
        prompt_budget = budget
        if most is not None and (others_are_near or self._hold_up(decodes)):
            prompt_budget = min(budget, most)
        if self._has_parts():
            chunks = self._fill_parts(decodes, prefills, budget, prompt_budget)
        else:
            filling = Filling(self._admission, self.limits, self._turn, is_shared=others_are_near)
            budget -= filling.add_rows(decodes, budget)
            filling.add_prompts(prefills, self.waiting.accounts(), min(budget, prompt_budget))
            chunks = filling.result()
            for chunk in chunks:
                spend(chunk.sequence.account, chunk.length, self.limits.shares)
        self.num_blocked = self._admission.num_blocked()
        if not chunks and (self.seconds_until_allowed() is not None or self._admission.loading):  # which others await
            self.num_blocked = len(self.running) + len(self.waiting)
        return chunks

    def _runnable(self) -> tuple[list[Sequence], list[Sequence]]:
        """The running sequences that only need their newest token, and those that need more."""
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self.running:
            if sequence.num_tokens - sequence.num_launched > 1:
                prefills.append(sequence)
            elif sequence.num_launched == sequence.max_launched:
                pass  # ends when its last step is read
            elif sequence.grammar is None or not sequence.waits_for_mask:  # otherwise the others continue without it
                decodes.append(sequence)
        return decodes, prefills

    def _hold_up(self, decodes: list[Sequence]) -> bool:
        """Whether long prompts would hold up streams: those in the background wait for all others anyway."""
        is_background = all([account.is_background for account in self._admission.live])
        return any([is_background or not sequence.account.is_background for sequence in decodes])

    def _has_parts(self) -> bool:
        """Whether accounts share a step: several have requests, or the only one is limited."""
        live = self._admission.live
        return len(live) > 1 or any([account.bucket is not None for account in live])

    def _fill_parts(
        self, decodes: list[Sequence], prefills: list[Sequence], budget: int, prompt_budget: int
    ) -> list[Chunk]:
        """Fill a step with a part for each account."""
        parts = self._parts(decodes, prefills, budget, prompt_budget)
        is_shared = sum([not part.account.is_background for part in parts]) > 1
        filling = Filling(self._admission, self.limits, self._turn, is_shared=is_shared)
        filling.add_rows(rows_of_parts(decodes, parts), budget)
        for part in parts:
            of_account = [sequence for sequence in prefills if sequence.account is part.account]
            filling.add_prompts(of_account, [part.account], part.num_prompt_tokens)
        chunks = filling.result()
        self._settle(parts, chunks)
        return chunks

    @contextlib.contextmanager
    def outsider(self, request: GenerationRequest) -> Iterator[Chunk]:
        """A temporary sequence outside the queues: yields the chunk of its prompt. There must be free blocks."""
        sequence = Sequence(request=request, table=BlockTable(self.layout), rank=(0.0, 0), arrived_s=self._clock())
        blocks = self.pool.take(sequence.table.missing(sequence.num_prompt))
        assert blocks is not None
        sequence.table.add(blocks)
        try:
            yield Chunk(sequence, 0, sequence.num_prompt, sequence.samples)
        finally:
            sequence.is_over = True
            self.pool.give_back(sequence.table.pop_all())

    def _parts(self, decodes: list[Sequence], prefills: list[Sequence], budget: int, prompt_budget: int) -> list[Part]:
        """Each account's part of this step."""
        demands = {account: Demand(account=account) for account in self.waiting.accounts()}
        for sequence in decodes:
            demands.setdefault(sequence.account, Demand(account=sequence.account)).num_rows += 1
        for sequence in prefills:
            demand = demands.setdefault(sequence.account, Demand(account=sequence.account))
            demand.num_prompt_tokens += sequence.num_pending
        for sequence in self._admission.newcomers(prompt_budget):
            demands[sequence.account].num_prompt_tokens += sequence.num_pending
        now_s = self._clock()
        for account, demand in demands.items():
            if account.bucket is not None:
                demand.num_rows = min(demand.num_rows, max(0, int(account.bucket.available(now_s))))
        first = [demand for demand in demands.values() if not demand.account.is_background]
        last = [demand for demand in demands.values() if demand.account.is_background]
        limits, turn = self.limits.shares, self._turn
        parts = divide(first, limits, budget, prompt_budget, turn)
        return parts + divide_in_background(last, parts, limits, budget, prompt_budget, turn) if last else parts

    def _settle(self, parts: list[Part], chunks: list[Chunk]) -> None:
        """Record each account's usage of a shared step."""
        used = {
            part.account: 0
            for part in parts
            if (part.num_rows or part.num_prompt_tokens) and not part.account.is_background
        }
        for chunk in chunks:
            if not chunk.sequence.account.is_background:
                used[chunk.sequence.account] += chunk.length
        if len(used) > 1:
            settle(used, self.limits.shares)
            self._shared_until_s = self._clock() + SHARED_FOR_S

    def apply(self, chunks: list[Chunk], sampled: list[list[int]]) -> list[tuple[Sequence, list[int]]]:
        """Record a finished step; `sampled` has the tokens of each chunk, none where it does not sample.

        Steps are recorded in the order of scheduling. Blocks get their keys and are freed only now that their tokens
        are known; tokens of ended sequences are dropped.

        Returns sequences with their new tokens; sequences without an answer are included, without tokens, when their
        prompt is computed. The caller ends them (`remove`).
        """
        grown: list[tuple[Sequence, list[int]]] = []
        for (sequence, start, length, samples, draft), tokens in zip(chunks, sampled, strict=True):
            computed = start + length
            if sequence.is_over:
                continue
            # A sequence preempted during the step has lost its blocks but gets the step's tokens.
            if samples:
                if len(tokens) == 1:
                    sequence.tokens.append(tokens[0])
                else:
                    sequence.tokens.extend(tokens)
                    sequence.num_tokens += len(tokens) - 1  # one was counted at scheduling
                if draft:  # keys of its rejected tokens are overwritten before a query sees them
                    computed = start + length - len(draft) + len(tokens) - 1
                    sequence.num_launched = computed
                    sequence.draft = ()
            if sequence.is_running:
                sequence.num_computed = computed
                if computed >= sequence.next_full_at:
                    self._admission.kept.settle(sequence)
            if samples:
                grown.append((sequence, tokens))
            elif computed == len(sequence.tokens):
                grown.append((sequence, tokens))
        return grown

    def rewind(self, sequence: Sequence, count: int) -> None:
        """Undo the last `count` tokens of an answer; see `Sequence.rewind`."""
        if not self._admission.kept.rewind(sequence, count) and sequence.is_running:
            self._admission.preempt(sequence)
