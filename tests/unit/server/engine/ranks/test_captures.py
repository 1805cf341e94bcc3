"""Ranks run the same steps as graphs, however fast each compiles."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.gpu import preparation as preparation_module
from stellarbyte.backends.gpu.graphs import Graphs
from stellarbyte.backends.gpu.preparation import CaptureOrder, Preparation
from stellarbyte.backends.gpu.steps import Decoding
from stellarbyte_server.engine.ranks.captures import FollowingOrder, LeadingOrder
from stellarbyte_server.engine.ranks.messages import Capture, FromRank, RankCompiled, ToRank
from stellarbyte_server.engine.run.slot_executor import SlotExecutor

CPU = torch.device("cpu")
PROGRAMS = [Decoding(rows, 0, truncates=False) for rows in (1, 2, 4, 8)]


class FakeGraph:
    def __init__(self, ran: list[tuple[Any, str]], key: Any) -> None:
        self._ran, self._key = ran, key

    def replay(self) -> None:
        self._ran.append((self._key, "graph"))


class FakeGraphs(Graphs):
    """Graphs of a device that captures; `ran`: each program, and how. No memory for the programs of `too_large`."""

    def __init__(self, too_large: tuple[Any, ...] = ()) -> None:
        super().__init__(CPU)
        self._captures = True
        self.too_large = set(too_large)
        self.ran: list[tuple[Any, str]] = []

    def step(self, key: Any) -> None:
        self.run(key, lambda: self.ran.append((key, "eager")))

    def capture(self, key: Any, _program: Any = None) -> None:
        if key in self.too_large:
            self.too_large.remove(key)
            raise torch.OutOfMemoryError
        self._graphs.setdefault(key, (FakeGraph(self.ran, key), None))  # type: ignore[arg-type]


class Rank:
    """The preparation of a rank, which compiles as far as it is told."""

    def __init__(self, order: CaptureOrder | None, too_large: tuple[Any, ...] = ()) -> None:
        self.graphs = FakeGraphs(too_large)
        self._may_compile = threading.Semaphore(0)
        self._has_compiled = threading.Semaphore(0)
        self._fails = False
        rehearsal: Any = SimpleNamespace(model=SimpleNamespace(device=CPU), run_program=self._run)
        self.preparation = Preparation(self.graphs, rehearsal, order)  # type: ignore[arg-type]
        self.executor: Any = SlotExecutor.__new__(SlotExecutor)
        self.executor._preparation = self.preparation
        self.preparation._thread.start()
        self._has_compiled.acquire()

    def _run(self, _key: Any) -> None:
        self._has_compiled.release()  # the one before
        self._may_compile.acquire()
        if self._fails:
            raise RuntimeError("planted")

    def compile(self) -> None:
        self._may_compile.release()
        self._has_compiled.acquire()

    def fail(self) -> None:
        self._fails = True
        self._may_compile.release()


class Others:
    """Rank 1, in this process."""

    def __init__(self) -> None:
        self.said: list[FromRank] = []
        self.sent: list[ToRank] = []

    def answered(self, kind: type[RankCompiled]) -> list[Any] | None:
        assert kind is RankCompiled
        return [self.said.pop(0)] if self.said else None

    def send(self, message: ToRank) -> None:
        self.sent.append(message)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    monkeypatch.setattr(preparation_module, "usual_programs", lambda _: [*PROGRAMS, Decoding(0, 0, truncates=False)])
    return Others()


def follow(rank: Rank, others: Others) -> None:
    while others.sent:
        assert others.sent.pop(0) == Capture()
        rank.executor.prepare()


@pytest.mark.usefixtures("others")
def test_a_rank_alone_runs_what_its_thread_has_compiled_as_a_graph() -> None:
    rank = Rank(None)
    rank.compile()
    rank.graphs.step(PROGRAMS[0])
    assert rank.graphs.ran == [(PROGRAMS[0], "graph")]


@pytest.mark.parametrize("is_first_faster", [False, True])
def test_programs_run_as_graphs_on_all_ranks_or_on_none(others: Others, is_first_faster: bool) -> None:
    leader, follower = Rank(LeadingOrder(others)), Rank(FollowingOrder(others.said.append))  # type: ignore[arg-type]
    fast, slow = (leader, follower) if is_first_faster else (follower, leader)

    def step(key: Decoding) -> None:
        for rank in (leader, follower):
            rank.graphs.step(key)
        assert leader.graphs.ran == follower.graphs.ran

    fast.compile()
    fast.compile()
    assert leader.executor.prepare()  # nothing, since the other rank has not compiled the program
    assert not others.sent
    step(PROGRAMS[0])
    slow.compile()
    for key in (PROGRAMS[1], PROGRAMS[2]):
        assert leader.executor.prepare()
        follow(follower, others)
        step(key)
    slow.compile()
    assert leader.executor.prepare()
    follow(follower, others)
    for key in PROGRAMS:
        step(key)
    how = [how for _, how in leader.graphs.ran]
    assert how == ["eager", "eager", "eager", "graph", "graph", "graph", "eager"]


def test_a_follower_without_memory_for_a_capture_goes_on_and_captures_when_a_step_needs_it(others: Others) -> None:
    leader = Rank(LeadingOrder(others))  # type: ignore[arg-type]
    follower = Rank(FollowingOrder(others.said.append), too_large=(PROGRAMS[0],))
    for rank in (leader, follower):
        rank.compile()
        rank.compile()
    for _ in range(2):
        assert leader.executor.prepare()
        follow(follower, others)
    for rank in (leader, follower):
        for key in PROGRAMS[:2]:
            rank.graphs.step(key)
        assert rank.graphs.ran == [(key, "graph") for key in PROGRAMS[:2]]


def test_without_memory_on_rank_0_no_rank_captures_more(others: Others) -> None:
    leader = Rank(LeadingOrder(others), too_large=(PROGRAMS[0],))  # type: ignore[arg-type]
    follower = Rank(FollowingOrder(others.said.append))
    for rank in (leader, follower):
        rank.compile()
        rank.compile()
    assert not leader.executor.prepare()
    follow(follower, others)
    assert not leader.executor.prepare() and not others.sent
    for rank in (leader, follower):
        for key in PROGRAMS[:2]:
            rank.graphs.step(key)
        assert rank.graphs.ran == [(PROGRAMS[0], "graph"), (PROGRAMS[1], "eager")]


def test_programs_after_one_that_a_rank_cannot_compile_are_not_captured(others: Others) -> None:
    leader, follower = Rank(LeadingOrder(others)), Rank(FollowingOrder(others.said.append))  # type: ignore[arg-type]
    for _ in range(3):
        leader.compile()
    follower.compile()
    follower.fail()
    for _ in range(1000):
        if len(others.said) == 2:
            break
        threading.Event().wait(0.01)
    assert leader.executor.prepare()
    follow(follower, others)
    leader.executor.prepare()
    leader.compile()
    leader.executor.prepare()
    assert not others.sent and len(leader.graphs) == len(follower.graphs) == 1
