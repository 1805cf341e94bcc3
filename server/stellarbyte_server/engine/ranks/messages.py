"""What rank 0 and the other ranks send each other over their pipes: a length of 8 bytes, then msgpack."""

import struct
from typing import BinaryIO, TypeVar

import msgspec

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.run.step_plan import Finish, StepPlan


class RankStart(msgspec.Struct, frozen=True, tag="start"):
    """The first message to a rank."""

    settings: EngineSettings
    rank: int
    num_threads: int


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """All ranks have loaded their model: they meet now."""

    store: str  # path by which they find each other


class ServeCache(msgspec.Struct, frozen=True, tag="cache"):
    """What is served and in how much cache, once all ranks have met."""

    max_model_len: int
    num_blocks: int


class StartStep(msgspec.Struct, frozen=True, tag="step"):
    plan: StepPlan


class FinishStep(msgspec.Struct, frozen=True, tag="finish"):
    """Of the newest step."""

    finish: Finish


class ReadStep(msgspec.Struct, frozen=True, tag="read"):
    """Wait for the oldest step that was not read."""


class Recover(msgspec.Struct, frozen=True, tag="recover"):
    """A step has failed on all ranks; see `Executor.recover`."""


class Capture(msgspec.Struct, frozen=True, tag="capture"):
    """Capture the next program, which all ranks have compiled. No step is in flight."""


class AdapterBytes(msgspec.Struct, frozen=True, tag="bytes"):
    """The next bytes of the rank's part of an adapter: its numbers, then the matrices that it replaces, in the bank's
    dtype. Few, so that no step waits long until they are written."""

    content: memoryview


class FillSlot(msgspec.Struct, frozen=True, tag="fill"):
    """The rank's part of an adapter, whose bytes were sent, for a slot of its bank; see `PackedAdapter`."""

    slot: int
    num_numbers: int
    adapter_ranks: list[list[int]]  # [L][P]
    has_factors: list[list[bool]]  # [L][P]
    replaced: dict[str, tuple[int, int]]  # shapes


class ClearSlot(msgspec.Struct, frozen=True, tag="clear"):
    slot: int


ToRank = (
    RankStart | Connect | ServeCache | StartStep | FinishStep | ReadStep | Recover | Capture | AdapterBytes | FillSlot
    | ClearSlot
)  # fmt: skip


class RankLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The rank has its model."""


class RankMeasured(msgspec.Struct, frozen=True, tag="measured"):
    """The rank has met the others.

    Attributes:
        cache_bytes: that it has for its part of the cache.
        no_symmetric_memory: why it has none; "": it has, or needs none.
    """

    cache_bytes: int
    no_symmetric_memory: str = ""


class RankServes(msgspec.Struct, frozen=True, tag="serves"):
    """The rank has its cache and takes plans."""


class RankCompiled(msgspec.Struct, frozen=True, tag="compiled"):
    """The rank can capture one more program, or will never be able to."""

    has_failed: bool = False


class RankRefused(msgspec.Struct, frozen=True, tag="refused"):
    """The rank cannot start."""

    message: str  # one sentence


class SlotFilled(msgspec.Struct, frozen=True, tag="filled"):
    error: str  # "": none


class StepFailed(msgspec.Struct, frozen=True, tag="failed"):
    """A step has raised an error, which rank 0 should have seen as well.

    Attributes:
        position: see `RankExecutor.position`, afterwards.
    """

    error: str
    position: int


FromRank = RankLoaded | RankMeasured | RankServes | RankCompiled | RankRefused | SlotFilled | StepFailed

_LENGTH = struct.Struct("<Q")
_T = TypeVar("_T")


def write_message(stream: BinaryIO, message: ToRank | FromRank) -> None:
    """Raises OSError: the other side has ended."""
    content = msgspec.msgpack.encode(message)
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def read_message(stream: BinaryIO, kind: type[_T]) -> _T | None:
    """The next message; None: the other side has ended."""
    length = stream.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(length)
    content = stream.read(size)
    return msgspec.msgpack.decode(content, type=kind) if len(content) == size else None
