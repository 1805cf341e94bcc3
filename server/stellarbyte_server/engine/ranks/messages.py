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
    store: str  # path by which the ranks find each other
    num_threads: int


class ServeCache(msgspec.Struct, frozen=True, tag="cache"):
    """What is served and in how much cache, once all ranks have loaded their model."""

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


class PackedTensor(msgspec.Struct, frozen=True):
    numbers: bytes  # in the bank's dtype
    shape: tuple[int, ...]


class FillSlot(msgspec.Struct, frozen=True, tag="fill"):
    """The rank's part of an adapter, for a slot of its bank; see `PackedAdapter`."""

    slot: int
    numbers: PackedTensor
    adapter_ranks: list[list[int]]  # [L][P]
    has_factors: list[list[bool]]  # [L][P]
    replaced: dict[str, PackedTensor]


class ClearSlot(msgspec.Struct, frozen=True, tag="clear"):
    slot: int


ToRank = RankStart | ServeCache | StartStep | FinishStep | ReadStep | Recover | FillSlot | ClearSlot


class RankLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The rank has its model."""


class RankMeasured(msgspec.Struct, frozen=True, tag="measured"):
    """The rank has met the others."""

    cache_bytes: int  # that it has for its part of the cache


class RankServes(msgspec.Struct, frozen=True, tag="serves"):
    """The rank has its cache and takes plans."""


class RankRefused(msgspec.Struct, frozen=True, tag="refused"):
    """The rank cannot start."""

    message: str  # one sentence


class SlotFilled(msgspec.Struct, frozen=True, tag="filled"):
    error: str  # "": none


class StepFailed(msgspec.Struct, frozen=True, tag="failed"):
    """A step has raised an error, which rank 0 should have seen as well."""

    error: str


FromRank = RankLoaded | RankMeasured | RankServes | RankRefused | SlotFilled | StepFailed

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
