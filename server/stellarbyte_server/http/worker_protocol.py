"""Messages between HTTP workers and their parent: lines of JSON on stdin, one line on stdout.

The first line is a `WorkerStart`; further lines are changes of the keys or of the engine's process.
"""

import msgspec

from stellarbyte_server.access.keys import Key
from stellarbyte_server.client.restart import EngineEnded, EngineGone, EngineNews, EngineRestarted
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.protocol.messages import EngineInfo, EngineTotals


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """An engine at the start of a worker."""

    endpoint: str  # of its newest process
    so_far: tuple[EngineNews, ...]  # what became of that process
    past: EngineTotals | None  # totals of earlier processes
    info: EngineInfo  # as its first process reported


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's start message, sent when the engine is ready; file descriptors are inherited."""

    number: int  # from 1, for the log
    settings: ServerSettings
    keys: tuple[Key, ...]  # of the file --keys
    listener_fd: int
    admin_fd: int | None  # of --admin-listen
    engines: tuple[EngineState, ...]
    folder: str  # of the server
    started_at: int  # Unix seconds


class NewKeys(msgspec.Struct, frozen=True, tag_field="news", tag="keys"):
    """The file --keys was read again."""

    keys: tuple[Key, ...]


News = NewKeys | EngineEnded | EngineRestarted | EngineGone


class WorkerReady(msgspec.Struct, frozen=True, tag_field="state", tag="ready"):
    """Connections are accepted."""


class WorkerFailed(msgspec.Struct, frozen=True, tag_field="state", tag="failed"):
    """The worker could not start; `message` is one sentence for the user."""

    message: str
