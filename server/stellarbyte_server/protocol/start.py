"""The messages between the engine process and its parent at the start.

The parent writes one `EngineStart` as a line of JSON to the engine's stdin, and reads one `EngineReady` or
`EngineFailed` from its stdout. The engine runs as long as its stdin is open.
"""

from typing import Literal

import msgspec

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters
from stellarbyte_server.protocol.messages import EngineInfo


class EngineStart(msgspec.Struct, frozen=True):
    """Start message of an engine process."""

    settings: EngineSettings
    endpoint: str  # ZeroMQ address to bind
    log_level: str
    log_format: Literal["text", "json"] = "text"
    process_name: str = "engine"  # in log lines
    recorded: RecordedAdapters = RecordedAdapters()  # what was loaded and unloaded over HTTP before
    folders: tuple[str, ...] = ()  # to remove when the parent has ended


class EngineReady(msgspec.Struct, frozen=True, tag_field="state", tag="ready"):
    info: EngineInfo


class EngineFailed(msgspec.Struct, frozen=True, tag_field="state", tag="failed"):
    """The engine could not start; `message` is one sentence for the user."""

    message: str
