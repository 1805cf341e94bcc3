"""Requests whose grammars are being compiled. Each reserves a place in the scheduler's queue."""

from collections.abc import Iterator

from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.protocol.grammar import GrammarRefused
from stellarbyte_server.protocol.request import GenerationRequest


class CompilingRequests:
    """Engine thread only."""

    def __init__(self, grammars: GrammarCompiler) -> None:
        self._grammars = grammars
        self._requests: dict[str, tuple[GenerationRequest, Account | None]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: GenerationRequest, grammar: str, account: Account | None, scheduler: Scheduler) -> None:
        """Have a request's grammar compiled.

        Raises:
            RequestRejected: the queue is full.
        """
        scheduler.reserve(account)
        self._requests[request.request_id] = request, account
        # Grammars of further answers to one prompt are compiled after those of other requests.
        self._grammars.submit(
            request.request_id,
            grammar,
            can_wait=request.follows is not None,
            owner="" if account is None else account.name,
        )

    def drop(self, request_id: str, scheduler: Scheduler) -> None:
        """Forget a request; unknown ids are ignored."""
        if (compiling := self._requests.pop(request_id, None)) is not None:
            self._grammars.cancel(request_id)
            scheduler.give_up_place(compiling[1])

    def collect(
        self, scheduler: Scheduler, step_s: float
    ) -> Iterator[tuple[GenerationRequest, Account | None, TokenGrammar | GrammarRefused]]:
        """Return the requests with compiled or refused grammars and free their places: the caller queues them at
        once. `step_s`: as of `GrammarCompiler.collect`."""
        for request_id, grammar in self._grammars.collect(step_s):
            compiling = self._requests.pop(request_id, None)
            if compiling is not None:  # otherwise aborted meanwhile
                request, account = compiling
                scheduler.give_up_place(account)
                yield request, account, grammar
