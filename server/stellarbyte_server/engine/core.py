"""The engine core: runs scheduler, runner and answers step by step."""

import logging

import tokenizers

from stellarbyte_server.engine.adapters.refusals import not_invoked
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.answer import Answer
from stellarbyte_server.engine.compiling import CompilingRequests
from stellarbyte_server.engine.drafts.drafts import Drafts, DraftTotals
from stellarbyte_server.engine.events.publisher import EventPublisher
from stellarbyte_server.engine.faults.recovery import compute_again, require_sound
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.followed import Grammar
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.engine.live_answers import LiveAnswers
from stellarbyte_server.engine.offload.offload import Offload
from stellarbyte_server.engine.probing import Probes
from stellarbyte_server.engine.reasoning.reasoning_grammar import ReasoningGrammar
from stellarbyte_server.engine.run.executor import DeviceLost
from stellarbyte_server.engine.run.runner import Runner, RunningStep
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.adapter_versions import LocateAdapter, RestoreAdapters, SetVersions
from stellarbyte_server.protocol.grammar import GrammarRefused
from stellarbyte_server.protocol.messages import (
    FAILED,
    Accepted,
    AdapterResidency,
    Call,
    Delta,
    EngineStats,
    LoadAdapter,
    News,
    Rejected,
    Reply,
    Settle,
    Settled,
    UnloadAdapter,
    failure,
)
from stellarbyte_server.protocol.offload_stats import OffloadStats
from stellarbyte_server.protocol.request import (
    QUEUE_FULL,
    QUEUE_TIMEOUT,
    Channels,
    GenerationRequest,
    RequestRejected,
)

logger = logging.getLogger("server.engine")


class EngineCore:
    """From requests to text. Engine thread only."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: frozenset[int],
        adapters: Adapters,
        grammars: GrammarCompiler,
        events: EventPublisher | None = None,
        drafts: Drafts | None = None,
        offload: Offload | None = None,
    ) -> None:
        """`events` publishes what the scheduler's pool logs; `offload` has the tiers below the pool."""
        self.scheduler = scheduler
        self.runner = runner
        self.adapters = adapters
        self.grammars = grammars
        self.events = events
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.drafts = drafts
        self.offload = offload
        self.answers = LiveAnswers(scheduler, adapters, drafts)
        self._probes = Probes(scheduler, adapters, self.answers, tokenizer)
        self._compiling = CompilingRequests(grammars)
        self._rejected: list[Rejected] = []  # since the last step
        self._num_prompt_tokens = 0
        self._in_flight: tuple[list[Chunk], RunningStep] | None = None  # between two calls of `step`
        self._had_nothing_to_run = False  # in the last step
        self._num_reads = 0  # of adapters, at the last check of waiting requests

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._rejected or self.answers.failed) or self._in_flight is not None

    @property
    def is_blocked(self) -> bool:
        """Whether all work waits for an adapter or a key's limit, with no step in flight."""
        return self._had_nothing_to_run

    @property
    def patience_s(self) -> float | None:
        """Seconds until a key's limit allows more; None: no request waits for that."""
        return self.scheduler.seconds_until_allowed()

    @property
    def wake_fds(self) -> tuple[int, ...]:
        """File descriptors; one becomes readable when an adapter was read or copied, a grammar compiled, or blocks
        were copied."""
        of_adapters = () if self.adapters.wake_fd is None else (self.adapters.wake_fd,)
        of_offload = () if self.offload is None else (self.offload.wake_up.fd,)
        return (*of_adapters, self.grammars.wake_up.fd, *of_offload)

    def close(self) -> None:
        """End its threads and close its files; nothing may be called afterwards."""
        self.grammars.close()
        self.adapters.close()
        for part in (self.events, self.offload):
            if part is not None:
                part.close()

    def submit(self, request: GenerationRequest, account: Account | None = None) -> None:
        """Queue a request of an account; None: no key.

        Raises:
            RequestRejected: it exceeds the context, or the queue is full.
        """
        account = self.scheduler.account_of(request, account)
        if request.sampling.grammar is None:
            self._queue(request, account)
        else:
            self._compiling.add(request, request.sampling.grammar, account, self.scheduler)

    def _queue(self, request: GenerationRequest, account: Account | None, grammar: TokenGrammar | None = None) -> None:
        adapter = None if request.adapter is None else self.adapters.bind(request.adapter, request.caller)
        leader = self.answers.sequence(request.follows)
        try:
            if adapter is not None and (refusal := not_invoked(adapter, request)) is not None:
                raise refusal
            sequence = self.scheduler.add(request, adapter, leader, account)
        except Exception:
            if adapter is not None:
                self.answers.replies += self.adapters.release(adapter)
            raise
        if adapter is not None:
            for version in adapter.of_files:
                version.totals.num_requests += 1
                version.own_totals.num_requests += 1
        ends = frozenset() if request.sampling.ignore_eos else self.eos_token_ids
        if isinstance(request.reasoning, Channels) and not request.sampling.ignore_eos:
            ends |= frozenset(request.reasoning.final_ids)  # files may name only one of them
        sequence.end_token_ids = ends | frozenset(request.sampling.stop_token_ids)
        followed = self._with_reasoning(request, grammar, sequence.end_token_ids)
        sequence.grammar = followed
        self.answers.add(Answer(sequence, self.tokenizer, followed))

    def _with_reasoning(
        self, request: GenerationRequest, grammar: TokenGrammar | None, end_token_ids: frozenset[int]
    ) -> Grammar | None:
        """The grammar of all that is generated for a request with this grammar of its answer."""
        reasoning = request.reasoning
        if reasoning is None or (grammar is None and reasoning.max_tokens is None):
            return grammar
        return ReasoningGrammar(reasoning, self.tokenizer, self.grammars.vocab_size, grammar, end_token_ids)

    def abort(self, request_id: str) -> None:
        """Abort a request and free its blocks; unknown ids are ignored (it may just have ended)."""
        sequence = self.answers.sequence(request_id)
        if sequence is not None:
            self.answers.end(sequence)
        else:
            self._compiling.drop(request_id, self.scheduler)

    def prepare(self) -> bool:
        """Do one piece of preparation while idle; returns whether more is left."""
        return self.runner.prepare()

    def call(self, call: Call) -> None:
        """Execute an operator's call; `take_replies` returns the answer, now or after a later step."""
        adapters, replies = self.adapters, self.answers.replies
        if isinstance(call, LoadAdapter):
            replies += adapters.load(call)
        elif isinstance(call, LocateAdapter):
            replies += adapters.locate(call.call_id, call.path)
        elif isinstance(call, SetVersions):
            replies += adapters.set_versions(call)
        elif isinstance(call, RestoreAdapters):
            replies += [*adapters.restore(call.recorded), Settled(call.call_id)]
        elif isinstance(call, Settle):
            adapters.settle(call.call_id)
        elif isinstance(call, UnloadAdapter):
            replies += adapters.unload(call.call_id, call.name)
        else:
            replies += adapters.list_all(call.call_id)

    def abandon_load(self, name: str) -> None:
        """Give up what the calls of a process that has ended have prepared for an adapter."""
        self.answers.replies += self.adapters.abandon_load(name)

    def take_replies(self) -> list[Reply]:
        """Answers to calls since the last `take_replies`; also processes other threads' results."""
        self._collect()
        self._publish()  # an abort removes blocks, too, and no step may follow
        replies, self.answers.replies = self.answers.replies, []
        return replies

    def step(self) -> list[News]:
        """Advance every scheduled sequence by one forward pass.

        Returns the requests that began to run or were rejected, and deltas: of the step started now, or, if the runner
        works ahead, of the one before. If drafts are likely to pay for that, the step before is read first, and that
        with the drafts as well. A request that makes steps fail ends with an error.

        Raises:
            DeviceLost, EngineBroken: every step fails.
        """
        self._collect()
        news: list[News] = [*self._rejected, *self._refuse_unserviceable()]
        self._rejected = []
        has_drafts = False
        is_ahead = self._in_flight is not None
        if self.drafts is not None and self.drafts.may_draft(self.scheduler.running, is_ahead=is_ahead):
            if self._in_flight is not None:
                newest, self._in_flight = self._in_flight, None
                news += self._receive(*newest, is_last=True)
            has_drafts = self.drafts.propose(self.scheduler.running)
        chunks = self.scheduler.schedule(has_drafts=has_drafts)
        step = self._start(chunks)
        before, self._in_flight = self._in_flight, None
        self._had_nothing_to_run = not chunks and before is None
        news += [self._accept(sequence) for sequence in self.scheduler.admitted]
        news += [self._expire(sequence) for sequence in self.scheduler.expire()]
        news += [self._displace(sequence) for sequence in self.scheduler.take_displaced()]
        if before is not None:
            news += self._receive(*before, is_last=not chunks)
        if not isinstance(step, Exception | None):
            step = self._finish(step)
        if isinstance(step, Exception):
            news += self._compute_again(chunks, step)
        elif step is not None and self.runner.num_steps_ahead and not has_drafts:
            self._in_flight = (chunks, step)
        elif step is not None:
            news += self._receive(chunks, step, is_last=True)
        news += self.answers.failed
        self.answers.failed = []
        self._publish()
        return self._probes.take(news)

    def _collect(self) -> None:
        """Process other threads' results."""
        self.answers.replies += self.adapters.collect()
        if self.offload is not None:
            self.offload.settle()
            self.scheduler.settle_loads()
        self._probes.begin()
        self._queue_compiled()

    def _publish(self) -> None:
        if self.events is not None:
            self.events.flush()

    def _start(self, chunks: list[Chunk]) -> RunningStep | Exception | None:
        try:
            return self.runner.start(chunks) if chunks else None
        except DeviceLost:
            raise
        except Exception as error:  # `_compute_again` finds the requests at fault
            return error

    def _finish(self, step: RunningStep) -> RunningStep | Exception:
        try:
            step.finish()
        except DeviceLost:
            raise
        except Exception as error:
            return error
        return step

    def _compute_again(self, chunks: list[Chunk], error: Exception) -> list[Delta]:
        """Recompute a failed step without the requests that make it fail, and end those.

        Raises:
            DeviceLost, EngineBroken
        """
        findings = compute_again(self.runner, chunks, error)
        for fault in findings.faults:
            self.answers.end_faulty(fault)
        if findings.faults and not findings.computed:
            require_sound(self.runner, self.scheduler)
        return [delta for part, result in findings.computed for delta in self.answers.record(part, result)]

    def _receive(self, chunks: list[Chunk], step: RunningStep, *, is_last: bool) -> list[Delta]:
        """Wait for a step and turn its results into deltas. `is_last`: none was started after it."""
        try:
            result = step.result()
        except DeviceLost:
            raise
        except Exception as error:
            if not is_last:  # the next step was started from it
                raise
            return self._compute_again(chunks, error)
        return self.answers.record(chunks, result)

    def stats(self) -> EngineStats:
        pool, totals = self.scheduler.pool, self.scheduler.totals
        drafted = DraftTotals() if self.drafts is None else self.drafts.totals
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._compiling),
            kv_cache_usage=pool.num_used / pool.num_blocks,
            num_blocks_used=pool.num_used,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self.answers.num_generated_tokens,
            num_preemptions_total=totals.num_preemptions,
            num_steps_total=self.answers.num_steps,
            num_blocked=min(self.scheduler.num_blocked, len(self.scheduler.running) + len(self.scheduler.waiting))
            + len(self._compiling),  # some may have ended since the last step
            prefix_cache_queries_total=totals.prefix_queries,
            prefix_cache_hits_total=totals.prefix_hits,
            evicted_tokens_total=self.scheduler.num_evicted,
            step_tokens_total=self.answers.num_step_tokens,
            kv_event_batches_total=0 if self.events is None else self.events.num_batches,
            kv_event_batches_dropped_total=0 if self.events is None else self.events.num_dropped,
            drafts_total=drafted.num_drafts,
            draft_tokens_total=drafted.num_draft_tokens,
            accepted_tokens_total=drafted.num_accepted_tokens,
            accepted_by_place=tuple(drafted.accepted_by_place),
            offload=OffloadStats() if self.offload is None else self.offload.stats(self.scheduler.loading),
        )

    def residency(self) -> AdapterResidency:
        return self.adapters.memory.residency()

    def _queue_compiled(self) -> None:
        """Queue the requests whose grammars are ready."""
        step_s = 0.0 if self.drafts is None else self.drafts.step_s
        for request, account, grammar in self._compiling.collect(self.scheduler, step_s):
            request_id = request.request_id
            if isinstance(grammar, GrammarRefused):
                self._rejected.append(Rejected(request_id, str(grammar), grammar.code))
                continue
            try:
                self._queue(request, account, grammar)
            except RequestRejected as refusal:
                self._rejected.append(Rejected(request_id, str(refusal), refusal.code, refusal.param))
            except Exception:
                logger.exception("request %s could not be queued", request_id)
                self.answers.failed.append(failure(request_id, FAILED))

    def _accept(self, sequence: Sequence) -> Accepted:
        if not self._probes.has(sequence.request.request_id):
            self._num_prompt_tokens += sequence.num_prompt
        adapter_hash = "" if sequence.adapter is None else sequence.adapter.content_hash
        return Accepted(sequence.request.request_id, adapter_hash)

    def _refuse_unserviceable(self) -> list[News]:
        """End the waiting requests whose adapter cannot be used, or is not the requested version."""
        news: list[News] = []
        if self._num_reads == self.adapters.num_reads:
            return news
        self._num_reads = self.adapters.num_reads
        for sequence in [s for s in self.scheduler.waiting if s.adapter is not None]:
            assert sequence.adapter is not None
            refusal = self.adapters.refusal(sequence) or not_invoked(sequence.adapter, sequence.request)
            if refusal is None:
                continue
            request_id = sequence.request.request_id
            self.abort(request_id)
            if sequence.was_admitted:  # its answer has started
                news.append(failure(request_id, str(refusal)))
            else:
                news.append(Rejected(request_id, str(refusal), refusal.code, refusal.param))
        return news

    def _displace(self, sequence: Sequence) -> Rejected:
        """Reject a sequence that lost its place in the full queue to a key with fewer places."""
        request_id = sequence.request.request_id
        self.answers.forget(sequence)
        return Rejected(request_id, "Too many requests of this key are already waiting; try again later.", QUEUE_FULL)

    def _expire(self, sequence: Sequence) -> Rejected:
        request_id = sequence.request.request_id
        self.answers.forget(sequence)
        message = f"The request waited for more than {self.scheduler.limits.queue_timeout_s:g} s; try again later."
        return Rejected(request_id, message, QUEUE_TIMEOUT)
