"""The registry of an engine without adapters."""

from collections.abc import Callable
from typing import TypeVar

from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.memory import FillDone, Looked, ReadDone
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.protocol.messages import Reply

T = TypeVar("T")


def no_adapters() -> Adapters:
    """A registry that has no adapter and no slot."""
    return Adapters(AdapterFolder(None, {}), NoStore(), num_slots=0, max_in_memory=1)


class NoStore:
    """The store of an engine without adapters."""

    wake_up = None

    def __init__(self) -> None:
        self._looked: list[Looked] = []

    def close(self) -> None:
        """There is nothing to stop."""

    def look(self, look: Callable[[], T], note: Callable[[T | None], list[Reply]]) -> None:
        found = look()  # on this thread: there is no folder to wait for
        self._looked.append(Looked(lambda: note(found)))

    def read(self, *_: object) -> None:
        raise AssertionError("there is no adapter to read")

    def fill(self, *_: object) -> None:
        raise AssertionError("there is no slot to fill")

    def clear(self, *_: object) -> None:
        raise AssertionError("there is no slot to clear")

    def forget(self, *_: object) -> None:
        raise AssertionError("there is no adapter to forget")

    def finished(self) -> list[ReadDone | FillDone | Looked]:
        looked, self._looked = self._looked, []
        return [*looked]
