"""Threads for texts: short ones wait for no long one, nobody waits for all that another sent, and little may wait."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from stellarbyte_server.tokens.text_work import SHORT_CHARACTERS, TextWork, TooMuchText

LONG = SHORT_CHARACTERS + 1
LIMIT_S = 60


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


class Held:
    """Works that note their names when they are done, and wait until they may be."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        self.done: list[str] = []

    def named(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.has_begun.set()
            assert self.may_end.wait(LIMIT_S)
            self.done.append(name)
            return name

        return work

    def before_last(self, *names: str) -> list[str]:
        """What was done before the last of these."""
        return self.done[: max(number for number, name in enumerate(self.done) if name in names)]


def run(test: Callable[[TextWork, Held], Coroutine[Any, Any, None]], **options: Any) -> None:
    held = Held()

    async def limited() -> None:
        try:
            await asyncio.wait_for(test(TextWork(**options), held), LIMIT_S)
        finally:
            held.may_end.set()

    asyncio.run(limited())


async def start(*works: Coroutine[Any, Any, str]) -> list[asyncio.Task[str]]:
    """Tasks that have a thread or wait for one, in this order."""
    tasks = [asyncio.create_task(work) for work in works]
    await asyncio.sleep(0)
    return tasks


def test_a_short_text_does_not_wait_for_long_ones() -> None:
    async def test(texts: TextWork, held: Held) -> None:
        tasks = await start(*(texts.run(held.named("long"), "a", LONG) for _ in range(20)))
        for owner in ("a", "b"):
            assert await texts.run(lambda: "short", owner, SHORT_CHARACTERS) == "short"
        assert held.done == []
        held.may_end.set()
        assert await asyncio.gather(*tasks) == ["long"] * 20

    run(test)


@pytest.mark.parametrize("num_characters", [1, LONG])
def test_callers_take_turns_however_much_one_of_them_sends(num_characters: int) -> None:
    async def test(texts: TextWork, held: Held) -> None:
        greedy = await start(*(texts.run(held.named("greedy"), "a", num_characters) for _ in range(50)))
        modest = await start(*(texts.run(held.named(name), name, num_characters) for name in ("b", "c", "b")))
        held.may_end.set()
        await asyncio.gather(*modest, *greedy)
        assert held.before_last(*"bc").count("greedy") <= 8

    run(test)


def test_turns_are_by_characters_not_by_texts(monkeypatch) -> None:
    monkeypatch.setattr(
        "stellarbyte_server.tokens.text_work.LONG_REST", 0.0
    )  # else the thread would be free for large ones meanwhile

    async def test(texts: TextWork, held: Held) -> None:
        large = await start(*(texts.run(held.named("large"), "a", 50 * LONG) for _ in range(5)))
        small = await start(*(texts.run(held.named("small"), "b", LONG) for _ in range(50)))
        held.may_end.set()
        await asyncio.gather(*small, *large)
        assert held.before_last("small").count("large") <= 2

    run(test)


def test_what_one_caller_may_have_waiting_is_bounded_and_others_are_not_refused_for_it() -> None:
    async def test(texts: TextWork, held: Held) -> None:
        running = await start(texts.run(held.named("a"), "a", LONG))
        waiting = await start(*(texts.run(held.named("a"), "a", LONG) for _ in range(10)))
        with pytest.raises(TooMuchText):
            await texts.run(held.named("a"), "a", LONG)
        others = await start(*(texts.run(held.named("b"), "b", LONG) for _ in range(10)))
        held.may_end.set()
        await asyncio.gather(*running, *waiting, *others)
        assert await texts.run(held.named("a"), "a", LONG) == "a"

    run(test, max_waiting_characters=10 * LONG)


def test_what_its_caller_left_while_it_waited_is_not_done_and_its_thread_goes_on() -> None:
    async def test(texts: TextWork, held: Held) -> None:
        running = await start(texts.run(held.named("first"), "a", LONG))
        left = await start(*(texts.run(held.named("left"), "a", LONG) for _ in range(3)))
        last = await start(texts.run(held.named("last"), "a", LONG))
        assert await asyncio.to_thread(held.has_begun.wait, LIMIT_S)
        for task in (*running, *left):
            task.cancel()
        held.may_end.set()
        await asyncio.gather(*last)
        await asyncio.wait([*running, *left])
        assert held.done == ["first", "last"]  # what a thread has begun cannot be stopped

    run(test)


def test_errors_are_the_callers_and_take_no_thread_away() -> None:
    async def test(texts: TextWork, held: Held) -> None:
        def fail() -> str:
            raise ValueError("no text")

        for _ in range(5):
            with pytest.raises(ValueError, match="no text"):
                await texts.run(fail, "a", LONG)
        held.may_end.set()
        assert await texts.run(held.named("next"), "a", LONG) == "next"

    run(test)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="elsewhere niceness belongs to the process")
def test_the_threads_are_nicer_than_the_event_loop() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def test(texts: TextWork, held: Held) -> None:
        del held
        for num_characters in (1, LONG):
            assert await texts.run(niceness, "a", num_characters) > niceness() or niceness() >= 3

    run(test)


def test_no_caller_has_all_the_threads_for_short_texts() -> None:
    async def test(texts: TextWork, held: Held) -> None:
        greedy = await start(*(texts.run(held.named("greedy"), "greedy", 10) for _ in range(5)))
        assert await asyncio.wait_for(texts.run(lambda: "quick", "other", 10), LIMIT_S) == "quick"
        assert held.done == []
        held.may_end.set()
        await asyncio.gather(*greedy)

    run(test)


@pytest.mark.parametrize("kind", [TextWork.parse, TextWork.run], ids=["bodies", "long texts"])
def test_bodies_and_long_texts_of_one_caller_take_a_part_of_the_time_and_those_of_others_go_between(
    monkeypatch, kind
) -> None:
    """However many it sends, and though each ends at once."""
    monkeypatch.setattr("stellarbyte_server.tokens.text_work.BODY_REST", 1000.0)
    monkeypatch.setattr("stellarbyte_server.tokens.text_work.LONG_REST", 1000.0)

    async def test(texts: TextWork, held: Held) -> None:
        held.may_end.set()
        assert await kind(texts, held.named("greedy"), "a", LONG) == "greedy"
        greedy = await start(*(kind(texts, held.named("greedy"), "a", LONG) for _ in range(5)))
        for other in "bcd":
            assert await kind(texts, lambda: "other", other, LONG) == "other"
        assert held.done == ["greedy"]
        for task in greedy:
            task.cancel()
        await asyncio.wait(greedy)

    run(test)
