"""The limits of API keys over several engines.

One engine, the first that serves, counts the requests of all: a request is reserved there before another engine or the
same gets it. Every engine also hears of the tokens that a key uses at the others, so that all pace the key's answers by
one rate.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stellarbyte_server.client.engine_client import EngineClient, EngineDead
from stellarbyte_server.protocol.messages import KeyLimits, NoteKeyTokens, ReleaseKey, ReserveKey
from stellarbyte_server.protocol.request import GenerationRequest

TOLD_AFTER_S = 0.1  # longest delay of a report of tokens


@dataclass(kw_only=True)
class _Group:
    """Requests that were reserved together and have not all ended."""

    group_id: str
    limits: KeyLimits
    counter: EngineClient
    num_tokens: int  # of their prompts
    open_ids: set[str]
    has_begun: bool = False
    was_refused: bool = False


class KeyCounts:
    """The requests of one HTTP process; on its event loop."""

    def __init__(self, clients: Sequence[EngineClient], serving: Callable[[], list[EngineClient]]) -> None:
        """`serving`: the clients of the engines that serve now, in one order for all processes."""
        self._clients = clients
        self._serving = serving
        self._groups: dict[str, _Group] = {}  # by the id of each of their requests
        self._used: Counter[tuple[int, KeyLimits]] = Counter()  # tokens to report, by the replica that knows them
        self._telling: asyncio.TimerHandle | None = None

    async def reserve(self, limits: KeyLimits, requests: Sequence[GenerationRequest], num_later_tokens: int) -> None:
        """Count a group of requests, until each of them has ended; RequestRejected or EngineDead."""
        if limits == KeyLimits(key_name=limits.key_name):
            return
        prompts = [len(request.prompt_token_ids) for request in requests if request.sampling.choice == 0]
        num_tokens = sum(prompts) + num_later_tokens
        counter, group_id = self._counter(), f"reserved {requests[0].request_id}"
        try:
            await counter.call(ReserveKey(group_id, group_id, limits, num_tokens))
        except asyncio.CancelledError:
            counter.tell(ReleaseKey(group_id, was_refused=True))
            raise
        ids = {request.request_id for request in requests}
        group = _Group(group_id=group_id, limits=limits, counter=counter, num_tokens=num_tokens, open_ids=ids)
        self._groups |= dict.fromkeys(ids, group)
        self._tell_others(counter.replica, limits, num_tokens)

    async def charge(self, limits: KeyLimits) -> None:
        """Count a request that is not submitted; RequestRejected or EngineDead."""
        await self._counter().charge(limits)

    def note_tokens(self, replica: int, request_id: str, num_tokens: int) -> None:
        """Note tokens of an answer; unknown ids have no limits, as below."""
        group = self._groups.get(request_id)
        if group is None:
            return
        group.has_begun = True
        if group.limits.tokens_per_minute is not None:
            self._used[replica, group.limits] += num_tokens
            if self._telling is None:
                self._telling = asyncio.get_running_loop().call_later(TOLD_AFTER_S, self._tell)

    def note_end(self, request_id: str, *, was_refused: bool = False) -> None:
        """Note the end of a request."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return
        group.open_ids.discard(request_id)
        group.was_refused |= was_refused
        if not group.open_ids:
            is_free = group.was_refused and not group.has_begun
            group.counter.tell(ReleaseKey(group.group_id, is_free))
            if is_free:
                self._tell_others(group.counter.replica, group.limits, -group.num_tokens)

    def _counter(self) -> EngineClient:
        serving = self._serving()
        if not serving:
            raise EngineDead("No replica takes requests.")
        return serving[0]

    def _tell(self) -> None:
        self._telling = None
        used, self._used = self._used, Counter()
        for (replica, limits), num_tokens in used.items():
            self._tell_others(replica, limits, num_tokens)

    def _tell_others(self, replica: int, limits: KeyLimits, num_tokens: int) -> None:
        if limits.tokens_per_minute is not None and num_tokens:
            for client in self._clients:
                if client.replica != replica:
                    client.tell(NoteKeyTokens(limits, num_tokens))
