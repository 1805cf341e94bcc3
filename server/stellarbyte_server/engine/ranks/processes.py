"""The processes of ranks 1, 2 ..., from rank 0: started, spoken to, and watched."""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from stellarbyte_server.engine.ranks.messages import (
    FromRank,
    RankRefused,
    RankStart,
    StepFailed,
    ToRank,
    read_message,
    write_message,
)

logger = logging.getLogger("server.engine")

RANK_MODULE = "stellarbyte_server.engine.start.rank_process"
# After an error of a step, all other ranks should report theirs within this time.
AGREE_LIMIT_S = 10.0
END_LIMIT_S = 30.0
_NOTICE_S = 1.0  # after a rank's connections are closed, until its end is seen

_T = TypeVar("_T")


class RankLost(Exception):
    """A rank has ended, or the ranks no longer agree; str() is one sentence."""


def end_process() -> None:
    """End this process at once: a step may wait for the lost rank."""
    logging.shutdown()
    os._exit(1)


class RankProcesses:
    """Ranks 1 ... of the group whose rank 0 is this process. They end when this process ends.

    Args:
        starts: the first message of each.
        module: is run with `python -m`; tests replace it.
        on_lost: called, on a thread, when a rank ends or fails alone while it serves, after a line in the log.
    """

    def __init__(
        self, starts: Sequence[RankStart], module: str = RANK_MODULE, on_lost: Callable[[], None] = end_process
    ) -> None:
        self.ranks = len(starts) + 1
        self._on_lost = on_lost
        self._said: list[list[FromRank | RankLost]] = [[] for _ in starts]  # by rank - 1, not yet taken
        self._news = threading.Condition()
        self._next = threading.Lock()  # held by the thread that writes next; one that writes again comes after it
        self._writing = threading.Lock()
        self._is_serving = False
        self._is_closed = False
        self._processes = [
            subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in starts
        ]
        self._readers = [
            threading.Thread(target=self._read, args=(number,), name=f"rank-{number + 1}", daemon=True)
            for number in range(len(starts))
        ]
        for reader in self._readers:
            reader.start()
        for number, start in enumerate(starts):
            self._write(number, start)

    @property
    def process_ids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def send(self, message: ToRank) -> None:
        """To every rank. Any thread."""
        with self._turn():
            for number in range(len(self._processes)):
                self._write(number, message)

    def send_each(self, messages: Sequence[ToRank | None]) -> None:
        """One message to each rank, or none. Any thread."""
        with self._turn():
            for number, message in enumerate(messages):
                if message is not None:
                    self._write(number, message)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        with self._next:
            self._writing.acquire()
        try:
            yield
        finally:
            self._writing.release()

    def answers(self, kind: type[_T], limit_s: float | None = None) -> list[_T]:
        """Wait for a message of this kind from every rank, and take it.

        Raises:
            RankLost: a rank has ended, could not start, or has not answered in time.
        """
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        with self._news:
            while (taken := self.answered(kind)) is None:
                found = [self._first(kind, all_said) for all_said in self._said]
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    silent = found.index(None) + 1
                    raise RankLost(f"tensor-parallel rank {silent} of {self.ranks} has not answered for {limit_s:g} s")
                self._news.wait(left_s)
            return taken

    def answered(self, kind: type[_T]) -> list[_T] | None:
        """Take a message of this kind from every rank, without waiting; None: some have sent none.

        Raises:
            RankLost: a rank has ended.
        """
        with self._news:
            found = [self._first(kind, all_said) for all_said in self._said]
            if None in found:
                return None
            return [self._said[i].pop(place) for i, place in enumerate(found)]  # type: ignore

    def while_all_live(self, work: Callable[[], None], limit_s: float) -> None:
        """Do work that waits for the other ranks, on a thread, which is left alone if it does not end.

        Raises:
            RankLost: a rank has ended meanwhile or could not start, or the limit has passed.
            Exception: what the work raises, unless a rank has ended, of which that may come.
        """
        ended: list[Exception | None] = []

        def run() -> None:
            failure = None
            try:
                work()
            except Exception as error:
                failure = error
            with self._news:
                ended.append(failure)
                self._news.notify_all()

        threading.Thread(target=run, name="connect", daemon=True).start()
        with self._news:
            in_time = self._news.wait_for(lambda: ended or self._has_lost(), limit_s)
            if ended and ended[0] is not None:  # often, since a rank has ended, which is known soon
                self._news.wait_for(self._has_lost, _NOTICE_S)
            self._raise_lost()
        if not in_time:
            raise RankLost(f"the {self.ranks} tensor-parallel ranks have not met within {limit_s:g} s")
        if ended[0] is not None:
            raise ended[0]

    def _has_lost(self) -> bool:
        return any(isinstance(said, RankLost) for all_said in self._said for said in all_said)

    def _raise_lost(self) -> None:
        """The first rank that has ended. `_news` is held."""
        for all_said in self._said:
            for said in all_said:
                if isinstance(said, RankLost):
                    raise said

    @staticmethod
    def _first(kind: type[_T], all_said: list[FromRank | RankLost]) -> int | None:
        """The place of the first message of a kind. Raises RankLost."""
        for place, said in enumerate(all_said):
            if isinstance(said, kind):
                return place
            if isinstance(said, RankLost):
                raise said
            if isinstance(said, RankRefused):
                raise RankLost(said.message)
        return None

    def serve(self) -> None:
        """From now on the end of a rank is the end of the group. Raises RankLost: one has ended already."""
        with self._news:
            self._raise_lost()
            self._is_serving = True

    def close(self) -> None:
        """End the ranks and wait for them. May be called twice."""
        self._is_closed = True
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
        for process, reader in zip(self._processes, self._readers, strict=True):
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:  # its threads hang in a library
                process.kill()
                process.wait()
            reader.join()

    def _write(self, number: int, message: ToRank) -> None:
        stdin = self._processes[number].stdin
        assert stdin is not None
        try:
            write_message(stdin, message)  # type: ignore[arg-type]  # of bytes
        except (BrokenPipeError, ValueError):
            pass  # it has ended, which its reader reports, or the group is closed

    def _read(self, number: int) -> None:
        """Take what a rank says until it ends. A thread for each rank."""
        process = self._processes[number]
        assert process.stdout is not None
        with process.stdout:
            while (said := read_message(process.stdout, FromRank)) is not None:  # type: ignore[arg-type]
                self._note(number, said)
                if isinstance(said, StepFailed):
                    threading.Thread(target=self._expect_taken, args=(number, said), daemon=True).start()
        status = process.wait()
        if self._is_closed:
            return
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        with self._news:
            refused = [said.message for said in self._said[number] if isinstance(said, RankRefused)]
        self._lose(number, *refused or [f"tensor-parallel rank {number + 1} of {self.ranks} has ended ({how})"])

    def _expect_taken(self, number: int, failure: StepFailed) -> None:
        """A step that fails on one rank alone leaves the others waiting for it."""
        with self._news:
            taken = self._news.wait_for(lambda: failure not in self._said[number], AGREE_LIMIT_S)
        if not taken and not self._is_closed:
            message = f"tensor-parallel rank {number + 1} of {self.ranks} failed alone in a step: {failure.error}"
            self._lose(number, message)

    def _note(self, number: int, said: FromRank) -> None:
        with self._news:
            self._said[number].append(said)
            self._news.notify_all()

    def _lose(self, number: int, message: str) -> None:
        with self._news:
            is_serving = self._is_serving
            self._said[number].append(RankLost(message))
            self._news.notify_all()
        if is_serving:
            logger.error("%s; the engine ends with it", message)
            self._on_lost()
