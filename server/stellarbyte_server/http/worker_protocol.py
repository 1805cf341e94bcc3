"""What the parent of several HTTP processes says to each, and hears: lines of JSON on stdin, one on stdout.

The first line is a `WorkerStart`; each further one is what has changed since: the keys, or the engine's process.
"""

import msgspec

from stellarbyte_server.access.keys import Key
from stellarbyte_server.client.restart import EngineEnded, EngineGone, EngineRestarted
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.protocol.messages import EngineInfo


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told when the engine is ready; file descriptors are inherited."""

    number: int  # from 1; the log names it
    settings: ServerSettings
    keys: tuple[Key, ...]  # of the file --keys
    listener_fd: int
    endpoint: str
    info: EngineInfo
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
