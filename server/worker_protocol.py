"""What the parent of several HTTP processes says to each, and hears: lines of JSON on stdin, one on stdout.

The first line is a `WorkerStart`; each further one has the keys of the file --keys, whenever it was read again.
"""

import msgspec

from server.engine.messages import EngineInfo
from server.keys import Key
from server.settings import ServerSettings


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told when the engine is ready; file descriptors are inherited."""

    number: int  # from 1; the log names it
    settings: ServerSettings
    keys: tuple[Key, ...]  # of the file --keys
    listener_fd: int
    engine_end_fd: int  # see EngineProcess.end_fd
    endpoint: str
    info: EngineInfo
    started_at: int  # Unix seconds


class WorkerReady(msgspec.Struct, frozen=True, tag_field="state", tag="ready"):
    """Connections are accepted."""


class WorkerFailed(msgspec.Struct, frozen=True, tag_field="state", tag="failed"):
    """The worker could not start; `message` is one sentence for the user."""

    message: str
