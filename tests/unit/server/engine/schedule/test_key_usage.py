"""Limits of keys: never more in any minute than allowed, and the time to wait is enough and not much too long."""

import random

import pytest

from stellarbyte_server.engine.schedule.key_usage import WINDOW_S, KeyUsage, SlidingSum
from stellarbyte_server.protocol.messages import (
    CallFailed,
    KeyCharged,
    KeyCommand,
    KeyLimits,
    NoteKeyTokens,
    ReleaseKey,
    ReserveKey,
)
from stellarbyte_server.protocol.request import RATE_LIMITED, RequestRejected
from tests.support.engines.engine import make_request


class Clocked:
    """A KeyUsage with a clock that the test moves."""

    def __init__(self) -> None:
        self.usage = KeyUsage()
        self.now_s = 1000.25
        self._count = 0

    def submit(self, limits: KeyLimits, *prompt_lengths: int, num_later_tokens: int = 0) -> list[str]:
        """Ids of the requests, which run until they are ended; RequestRejected."""
        requests = []
        for length in prompt_lengths or (1,):
            self._count += 1
            requests.append(make_request([1] * length, request_id=f"r{self._count}"))
        self.usage.check(limits, requests, self.now_s, num_later_tokens)
        self.usage.add(limits, requests, self.now_s, num_later_tokens)
        return [request.request_id for request in requests]

    def refused(self, limits: KeyLimits, *prompt_lengths: int) -> int:
        """Seconds to wait."""
        with pytest.raises(RequestRejected) as refusal:
            self.submit(limits, *prompt_lengths)
        assert refusal.value.code == RATE_LIMITED and repr(limits.key_name) in str(refusal.value)
        assert refusal.value.retry_after_s is not None and refusal.value.retry_after_s >= 1
        return refusal.value.retry_after_s


def test_requests_per_minute_are_never_more_and_come_back():
    clocked, limits = Clocked(), KeyLimits(key_name="a", requests_per_minute=3)
    for _ in range(3):
        clocked.submit(limits)
        clocked.now_s += 1
    wait_s = clocked.refused(limits)
    clocked.now_s += wait_s
    clocked.submit(limits)
    clocked.refused(limits)
    clocked.submit(KeyLimits(key_name="b", requests_per_minute=3))


def test_a_refused_request_does_not_count():
    clocked, limits = Clocked(), KeyLimits(key_name="a", requests_per_minute=1)
    clocked.submit(limits)
    for _ in range(100):
        wait_s = clocked.refused(limits)
    clocked.now_s += wait_s
    clocked.submit(limits)


def test_what_was_queued_and_then_refused_does_not_count():
    clocked = Clocked()
    limits = KeyLimits(key_name="a", requests_per_minute=2, tokens_per_minute=100, concurrent_streams=1)
    for wait_s in [0, 1, 30, 59, 61] * 4:
        group = clocked.submit(limits, 20, 20, num_later_tokens=50)
        clocked.refused(limits)
        clocked.now_s += wait_s
        for request_id in group:
            clocked.usage.refuse(request_id)
            clocked.usage.end(request_id)
    (last,) = clocked.submit(limits, 100)
    clocked.usage.end(last)
    assert clocked.refused(limits, 100) == WINDOW_S, "all that there was"


def test_a_group_of_which_something_ran_counts_and_so_does_one_that_its_client_left():
    for fate in ("ran", "left"):
        clocked, limits = Clocked(), KeyLimits(key_name="a", requests_per_minute=1, tokens_per_minute=100)
        first, second = clocked.submit(limits, 5, 5)
        if fate == "ran":
            clocked.usage.begin(second)
            clocked.usage.refuse(first)
        for request_id in (first, second):
            clocked.usage.end(request_id)
        clocked.refused(limits)


def test_a_group_is_refused_with_its_first_request_even_if_the_others_are_then_dropped():
    clocked, limits = Clocked(), KeyLimits(key_name="a", requests_per_minute=1)
    first, second = clocked.submit(limits, 5, 5)
    clocked.usage.refuse(first)
    for request_id in (first, second):
        clocked.usage.end(request_id)
    clocked.submit(limits)


def test_requests_that_are_not_queued_count_until_there_is_no_room():
    clocked, limits = Clocked(), KeyLimits(key_name="a", requests_per_minute=3, concurrent_streams=1)
    clocked.submit(limits)
    clocked.usage.charge(limits, clocked.now_s)
    clocked.usage.charge(limits, clocked.now_s)
    for _ in range(100):
        with pytest.raises(RequestRejected) as refusal:
            clocked.usage.charge(limits, clocked.now_s)
    assert refusal.value.code == RATE_LIMITED and refusal.value.retry_after_s is not None
    clocked.now_s += refusal.value.retry_after_s
    clocked.usage.charge(limits, clocked.now_s)


def test_streams_count_until_their_last_request_ends():
    clocked, limits = Clocked(), KeyLimits(key_name="a", concurrent_streams=2)
    first = clocked.submit(limits, 1, 1, 1)
    second = clocked.submit(limits)
    clocked.refused(limits)
    clocked.usage.end(first[0])
    clocked.usage.end(first[2])
    clocked.usage.end("unknown")
    clocked.refused(limits)
    clocked.usage.end(first[1])
    third = clocked.submit(limits)
    clocked.refused(limits)
    for request_id in (*second, *third):
        clocked.usage.end(request_id)
    assert clocked.usage._running == {}


def test_tokens_of_prompts_and_answers_count():
    clocked, limits = Clocked(), KeyLimits(key_name="a", tokens_per_minute=120)
    (running,) = clocked.submit(limits, 40)
    clocked.usage.note_tokens(running, 50, clocked.now_s)
    clocked.usage.note_tokens("unknown", 500, clocked.now_s)
    assert clocked.refused(limits, 31) == 1
    clocked.submit(limits, 30)
    assert clocked.refused(limits, 121) == WINDOW_S  # never possible
    wait_s = clocked.refused(limits, 9)
    assert wait_s == 5  # two tokens a second come back
    clocked.now_s += wait_s
    clocked.submit(limits, 9)


def test_a_stream_at_its_keys_rate_gets_that_rate():
    clocked, limits = Clocked(), KeyLimits(key_name="a", tokens_per_minute=120)
    (running,) = clocked.submit(limits, 20)
    bucket = clocked.usage.account(limits).bucket
    began_s, num_tokens = clocked.now_s, 0
    while clocked.now_s < began_s + 600:
        if bucket.available(clocked.now_s) < 1:
            clocked.now_s += bucket.seconds_until(1, clocked.now_s)
            continue
        clocked.usage.note_tokens(running, 1, clocked.now_s)
        num_tokens += 1
    assert num_tokens == pytest.approx(100 + 600 * 2, abs=2)  # what was left at first, then two a second


def test_another_rate_holds_from_the_next_request_on():
    clocked = Clocked()
    clocked.submit(KeyLimits(key_name="a", tokens_per_minute=120), 100)
    clocked.submit(KeyLimits(key_name="a"), 1000)
    assert clocked.usage.account(KeyLimits(key_name="a")).bucket is None
    assert clocked.refused(KeyLimits(key_name="a", tokens_per_minute=60), 61) == WINDOW_S


def test_several_answers_to_one_prompt_have_its_tokens_once():
    limits, usage = KeyLimits(key_name="a", tokens_per_minute=10), KeyUsage()
    requests = [make_request([1] * 10, request_id=f"r{choice}", choice=choice) for choice in range(3)]
    usage.check(limits, requests, 0.0)


def test_what_comes_in_parts_is_checked_and_counted_whole_with_the_first():
    clocked, limits = Clocked(), KeyLimits(key_name="a", requests_per_minute=2, tokens_per_minute=10)
    with pytest.raises(RequestRejected, match="11 tokens"):
        clocked.submit(limits, 3, num_later_tokens=8)
    clocked.submit(limits, 3, num_later_tokens=6)
    rest = [make_request([1] * 6, request_id="rest")]
    clocked.usage.add(limits, rest, clocked.now_s, continues=True)
    clocked.submit(limits, 1)
    assert clocked.refused(limits, 1) > 29  # the second request of two


@pytest.mark.parametrize("seed", range(20))
def test_no_window_of_a_minute_has_more_and_waiting_as_told_is_enough(seed):
    chance = random.Random(seed)
    most = chance.randint(1, 30)
    total, admitted, now_s = SlidingSum(), [], chance.uniform(0, 100)
    for _ in range(400):
        now_s += chance.expovariate(most / 20)
        total.forget_old(now_s)
        if total.total >= most:
            wait_s = total.seconds_until(most - 1, now_s)
            oldest = sorted(time_s for time_s in admitted if time_s > now_s - WINDOW_S)
            needed_s = 0 if len(oldest) < most else oldest[len(oldest) - most] + WINDOW_S - now_s
            assert needed_s <= wait_s <= needed_s + 2
            if chance.random() < 0.5:
                continue
            now_s += wait_s
            total.forget_old(now_s)
            assert total.total < most
        total.add(1, now_s)
        admitted.append(now_s)
        assert sum(time_s > now_s - WINDOW_S for time_s in admitted) <= most


def handle(clocked: Clocked, command: KeyCommand, sender: bytes = b"http"):
    return clocked.usage.handle(command, sender, clocked.now_s)


def test_requests_at_other_engines_count_once_wherever_they_run():
    clocked, limits = Clocked(), KeyLimits(key_name="a", concurrent_streams=2, requests_per_minute=4)
    for group in ("one", "two"):
        assert isinstance(handle(clocked, ReserveKey("call", group, limits, 5)), KeyCharged)
    own = make_request([1] * 5, request_id="of one")  # this engine gets the first group itself
    clocked.usage.add(limits, [own], clocked.now_s, is_reserved=True)
    refusal = handle(clocked, ReserveKey("call", "three", limits, 5))
    assert isinstance(refusal, CallFailed) and refusal.code == RATE_LIMITED
    clocked.usage.begin(own.request_id)
    clocked.usage.end(own.request_id)
    assert handle(clocked, ReleaseKey("one", was_refused=False)) is None
    assert isinstance(handle(clocked, ReserveKey("call", "three", limits, 5)), KeyCharged)
    handle(clocked, ReleaseKey("three", was_refused=True))
    handle(clocked, ReleaseKey("unknown", was_refused=False))
    for group in ("four", "five"):
        assert isinstance(handle(clocked, ReserveKey("call", group, limits, 5)), KeyCharged), "the refused one is free"
        handle(clocked, ReleaseKey(group, was_refused=False))
    assert isinstance(handle(clocked, ReserveKey("call", "six", limits, 5)), CallFailed), "the minute has its four"


def test_what_a_process_has_reserved_ends_with_it():
    clocked, limits = Clocked(), KeyLimits(key_name="a", concurrent_streams=2)
    for group, sender in (("one", b"dies"), ("two", b"lives")):
        handle(clocked, ReserveKey("call", group, limits, 5), sender)
    clocked.refused(limits)
    clocked.usage.release_all(b"dies")
    clocked.submit(limits)
    clocked.refused(limits)


def test_tokens_of_other_engines_count_towards_the_rate():
    clocked, limits = Clocked(), KeyLimits(key_name="a", tokens_per_minute=100)
    assert isinstance(handle(clocked, ReserveKey("call", "one", limits, 60)), KeyCharged)
    handle(clocked, NoteKeyTokens(limits, 20))
    clocked.refused(limits, 21)
    clocked.submit(limits, 20)
    clocked.refused(limits)
    handle(clocked, NoteKeyTokens(limits, -20))
    handle(clocked, ReleaseKey("one", was_refused=True))
    clocked.submit(limits, 80)
    clocked.refused(limits)
