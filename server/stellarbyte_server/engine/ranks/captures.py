"""When the ranks capture their programs: rank 0 says so, once all have compiled the next one. See `CaptureOrder`.

Programs have the same order on all ranks. Apart from these messages, a rank's graphs depend on its steps alone, which
are the same on all ranks.
"""

from collections.abc import Callable

from stellarbyte_server.engine.ranks.messages import Capture, FromRank, RankCompiled
from stellarbyte_server.engine.ranks.processes import RankProcesses


class LeadingOrder:
    """Of rank 0."""

    leads = True

    def __init__(self, others: RankProcesses) -> None:
        self._others = others
        self._is_over = False

    def note_compiled(self) -> None:
        pass

    def note_failed(self) -> None:
        pass

    def may_capture(self) -> bool | None:
        compiled = None if self._is_over else self._others.answered(RankCompiled)
        if compiled is not None and not any(said.has_failed for said in compiled):
            self._others.send(Capture())
            return True
        self._is_over |= compiled is not None
        return None if self._is_over else False


class FollowingOrder:
    """Of a rank that captures when rank 0 says so."""

    leads = False

    def __init__(self, reply: Callable[[FromRank], None]) -> None:
        self._reply = reply

    def note_compiled(self) -> None:
        self._reply(RankCompiled())

    def note_failed(self) -> None:
        self._reply(RankCompiled(has_failed=True))

    def may_capture(self) -> bool:
        return True
