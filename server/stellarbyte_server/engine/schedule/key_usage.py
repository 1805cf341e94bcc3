"""Recent and current usage of each API key, for the limits sent with its requests. No sockets, no clock.

Only the engine receives the requests of all HTTP processes. Limits are checked on arrival; admitted requests run to
their end, as fast as the key's tokens per minute allow (see `Account.bucket`). Requests refused from the queue, before
any of them ran, do not count.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from stellarbyte_server.engine.state.account import Account, TokenBucket
from stellarbyte_server.protocol.messages import (
    CallFailed,
    ChargeKey,
    KeyCharged,
    KeyCommand,
    KeyLimits,
    NoteKeyTokens,
    ReleaseKey,
    Reply,
)
from stellarbyte_server.protocol.request import RATE_LIMITED, GenerationRequest, RequestRejected

WINDOW_S = 60
_SOON_S = 1  # retry time if unknown


class SlidingSum:
    """A sum over the last WINDOW_S seconds, or up to one second more: amounts are kept by whole seconds."""

    def __init__(self) -> None:
        self.total = 0
        self._seconds: deque[list[int]] = deque()  # [second, amount], oldest first

    def add(self, amount: int, now_s: float) -> None:
        self.forget_old(now_s)
        if not self._seconds or self._seconds[-1][0] != int(now_s):
            self._seconds.append([int(now_s), 0])
        self._seconds[-1][1] += amount
        self.total += amount

    def take_back(self, amount: int, added_s: float) -> None:
        """Undo `add`, if that amount still counts."""
        for entry in self._seconds:
            if entry[0] == int(added_s):
                entry[1] -= amount
                self.total -= amount

    def forget_old(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] + 1 + WINDOW_S <= now_s:
            self.total -= self._seconds.popleft()[1]

    def seconds_until(self, most: int, now_s: float) -> int:
        """Whole seconds, at least 1, after which the sum is at most `most` if nothing is added."""
        total = self.total
        for second, amount in self._seconds:
            total -= amount
            if total <= most:
                return max(1, math.ceil(second + 1 + WINDOW_S - now_s))
        return WINDOW_S + 1


@dataclass(slots=True)
class _Group:
    """Requests queued together, which count as one."""

    num_open: int  # not ended
    counted_s: float
    num_requests: int  # counted for it, like its tokens: 1, or 0 if it continues another group
    num_tokens: int
    is_reserved: bool = False  # counted by a `ReserveKey`, here or at another engine
    has_begun: bool = False
    was_refused: bool = False


@dataclass
class _Use:
    account: Account
    requests: SlidingSum = field(default_factory=SlidingSum)
    groups: dict[str, _Group] = field(default_factory=dict)  # by the id of their first request
    num_reserved: int = 0  # of the groups


class KeyUsage:
    """Usage of all keys. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}  # by the key's name
        self._running: dict[str, tuple[_Use, str]] = {}  # request id → its key's use, its group
        self._reserved: defaultdict[bytes, set[str]] = defaultdict(set)  # by HTTP process, groups at other engines

    def account(self, limits: KeyLimits) -> Account:
        """The key's account, with the key's current rate."""
        return self._use(limits).account

    def _use(self, limits: KeyLimits) -> _Use:
        use = self._uses.get(limits.key_name)
        if use is None:
            use = self._uses[limits.key_name] = _Use(account=Account(limits.key_name))
        account, rate = use.account, limits.tokens_per_minute
        if rate != (None if account.bucket is None else account.bucket.tokens_per_minute):
            account.bucket = None if rate is None else TokenBucket(rate)
        return use

    def check(
        self, limits: KeyLimits, requests: Sequence[GenerationRequest], now_s: float, num_later_tokens: int = 0
    ) -> None:
        """RequestRejected, with the time to wait, if a group of requests exceeds the limits.

        `num_later_tokens`: of prompts that will follow in the same group.
        """
        self._check(limits, _prompt_tokens(requests) + num_later_tokens, now_s)

    def _check(self, limits: KeyLimits, wanted: int, now_s: float) -> None:
        """RequestRejected if a group of requests with so many tokens of prompts exceeds the limits."""
        use = self._use(limits)
        most = limits.concurrent_streams
        if most is not None and len(use.groups) - use.num_reserved >= most:
            raise _refusal(limits, f"{most} requests at once", _SOON_S)
        _check_requests(limits, use, now_s)
        bucket = use.account.bucket
        if bucket is not None:
            most = bucket.tokens_per_minute
            if wanted > most:
                raise RequestRejected(
                    f"The prompt has {wanted} tokens; the key {limits.key_name!r} allows at most {most} per minute.",
                    RATE_LIMITED,
                    retry_after_s=WINDOW_S,
                )
            if (wait_s := bucket.seconds_until(max(1, wanted), now_s)) > 0:
                raise _refusal(limits, f"{most} tokens per minute", math.ceil(wait_s))

    def add(
        self,
        limits: KeyLimits,
        requests: Sequence[GenerationRequest],
        now_s: float,
        num_later_tokens: int = 0,
        continues: bool = False,
        is_reserved: bool = False,
    ) -> None:
        """Count queued requests: a group, or with `continues` more of a group with all its prompts counted.

        With `is_reserved` a `ReserveKey` has counted them.
        """
        ids = [request.request_id for request in requests]
        is_counted = continues or is_reserved
        num_tokens = 0 if is_counted else _prompt_tokens(requests) + num_later_tokens
        self._add(limits, ids, now_s, num_requests=0 if is_counted else 1, num_tokens=num_tokens)
        if is_reserved:
            use = self._use(limits)
            use.groups[ids[0]].is_reserved = True
            use.num_reserved += 1

    def _add(self, limits: KeyLimits, ids: Sequence[str], now_s: float, *, num_requests: int, num_tokens: int) -> None:
        use = self._use(limits)
        use.requests.add(num_requests, now_s)
        if use.account.bucket is not None:
            use.account.bucket.take(num_tokens, now_s)
        use.groups[ids[0]] = _Group(len(ids), now_s, num_requests, num_tokens)
        for request_id in ids:
            self._running[request_id] = (use, ids[0])

    def handle(self, command: KeyCommand, sender: bytes, now_s: float) -> Reply | None:
        """Count requests that this engine does not get; returns the answer to the command, if it has one."""
        if isinstance(command, NoteKeyTokens):
            if (bucket := self._use(command.limits).account.bucket) is not None:
                bucket.take(command.num_tokens, now_s)
            return None
        if isinstance(command, ReleaseKey):
            self._reserved[sender].discard(command.group_id)
            self._release(command.group_id, was_refused=command.was_refused)
            return None
        try:
            if isinstance(command, ChargeKey):
                self.charge(command.limits, now_s)
            else:
                self._check(command.limits, command.num_tokens, now_s)
                self._add(command.limits, [command.group_id], now_s, num_requests=1, num_tokens=command.num_tokens)
                self._reserved[sender].add(command.group_id)
        except RequestRejected as refusal:
            return CallFailed(command.call_id, str(refusal), refusal.code, retry_after_s=refusal.retry_after_s)
        return KeyCharged(command.call_id)

    def _release(self, group_id: str, *, was_refused: bool) -> None:
        (self.refuse if was_refused else self.begin)(group_id)
        self.end(group_id)

    def release_all(self, sender: bytes) -> None:
        """Note the end of all requests for which a process has reserved, as it has ended."""
        for group_id in self._reserved.pop(sender, ()):
            self._release(group_id, was_refused=False)

    def charge(self, limits: KeyLimits, now_s: float) -> None:
        """Count a request that is not queued; RequestRejected, without counting, if it exceeds the limits."""
        use = self._use(limits)
        _check_requests(limits, use, now_s)
        use.requests.add(1, now_s)

    def begin(self, request_id: str) -> None:
        """Note that a request runs; unknown ids have no limits, as below."""
        if (running := self._running.get(request_id)) is not None:
            running[0].groups[running[1]].has_begun = True

    def refuse(self, request_id: str) -> None:
        """Note that a queued request will not run; `end` follows."""
        if (running := self._running.get(request_id)) is not None:
            running[0].groups[running[1]].was_refused = True

    def note_tokens(self, request_id: str, num_tokens: int, now_s: float) -> None:
        """Count tokens of an answer; unknown ids have no key."""
        if (running := self._running.get(request_id)) is not None and (bucket := running[0].account.bucket) is not None:
            bucket.take(num_tokens, now_s)

    def end(self, request_id: str) -> None:
        """Note the end of a request; unknown ids have no key."""
        if (running := self._running.pop(request_id, None)) is not None:
            use, first_id = running
            group = use.groups[first_id]
            group.num_open -= 1
            if not group.num_open:
                del use.groups[first_id]
                use.num_reserved -= group.is_reserved
                if group.was_refused and not group.has_begun:
                    use.requests.take_back(group.num_requests, group.counted_s)
                    if use.account.bucket is not None:
                        use.account.bucket.give_back(group.num_tokens)


def _check_requests(limits: KeyLimits, use: _Use, now_s: float) -> None:
    """RequestRejected if one more request exceeds this minute's limit."""
    use.requests.forget_old(now_s)
    most = limits.requests_per_minute
    if most is not None and use.requests.total >= most:
        raise _refusal(limits, f"{most} requests per minute", use.requests.seconds_until(most - 1, now_s))


def _prompt_tokens(requests: Sequence[GenerationRequest]) -> int:
    """Tokens of the prompts, counted once for several answers to one prompt."""
    return sum(len(request.prompt_token_ids) for request in requests if request.sampling.choice == 0)


def _refusal(limits: KeyLimits, limit: str, retry_after_s: int) -> RequestRejected:
    message = f"The key {limits.key_name!r} is at its limit of {limit}; try again in {retry_after_s} s."
    return RequestRejected(message, RATE_LIMITED, retry_after_s=retry_after_s)
