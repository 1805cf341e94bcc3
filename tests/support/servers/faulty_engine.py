"""`python -m tests.support.servers.faulty_engine`: the real engine process with faults planted in it.

A request's `cache_salt` says what goes wrong with it (`Fault`); nothing in the server knows of this. Adapters whose
folders begin with `FAULTY_READ` or `FAULTY_COPY` fail to be read, or to be copied to a slot, for no reason of theirs.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Iterable
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch

from stellarbyte.lora import read_adapter
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine import process
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.loop import Core, EngineLoop
from stellarbyte_server.engine.run import adapter_store
from stellarbyte_server.engine.run.adapter_store import AdapterStore
from stellarbyte_server.engine.run.device_errors import device_errors
from stellarbyte_server.engine.run.executor import OutOfDeviceMemory
from stellarbyte_server.engine.run.runner import Runner, RunningStep
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.start.load import build_core
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import EngineInfo, Event, StepOutput
from stellarbyte_server.protocol.request import GenerationRequest

FAULTY_READ, FAULTY_COPY = "faulty-read", "faulty-copy"
FAULTY_ONCE = "faulty-once"  # adapters of such a folder fail to be read by the first engine of several that tries
PLANTED = "a planted fault"  # which no client may read


def salt_given(request: GenerationRequest) -> str:
    """The `cache_salt` as the client wrote it: the server adds whose it is."""
    is_of_a_client = request.cache_salt.startswith("[")  # not of a probe
    return json.loads(request.cache_salt)[-1] if is_of_a_client else ""


class Fault(Enum):
    """What is wrong with a request."""

    QUEUE = "fault:queue"  # it cannot be queued
    PREFILL = "fault:prefill"  # steps with a part of its prompt fail
    DECODE = "fault:decode"  # steps with its fourth token fail
    SAMPLE = "fault:sample"  # its third token cannot be sampled
    MEMORY = "fault:memory"  # there is no memory for its prompt
    WRITE = "fault:write"  # what is generated for it cannot be written into a message
    LOSS = "fault:loss"  # it takes the device along
    SWAP = "fault:swap"  # it gets the token of the request after it, which gets its token: no fault that is noticed

    def is_of(self, sequence: Sequence) -> bool:
        return self.is_in(sequence.request)

    def is_in(self, request: GenerationRequest) -> bool:
        return salt_given(request) == self.value


class PlantedError(Exception):
    def __init__(self) -> None:
        super().__init__(PLANTED)


class FaultyRunner:
    """Runs the real runner's steps, unless a request in them makes them fail."""

    def __init__(self, runner: Runner) -> None:
        self.num_steps_ahead = runner.num_steps_ahead
        self._runner = runner

    def prepare(self) -> bool:
        return self._runner.prepare()

    def recover(self, sequences: Iterable[Sequence]) -> None:
        self._runner.recover(sequences)

    def start(self, chunks: list[Chunk]) -> RunningStep:
        step = self._runner.start(chunks)
        for sequence in (chunk.sequence for chunk in chunks):
            if Fault.PREFILL.is_of(sequence) or (Fault.DECODE.is_of(sequence) and sequence.num_generated >= 3):
                raise PlantedError
            if Fault.MEMORY.is_of(sequence):
                raise OutOfDeviceMemory
            if Fault.LOSS.is_of(sequence):
                with device_errors():
                    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return _FaultyStep(step, chunks)


class _FaultyStep:
    def __init__(self, step: RunningStep, chunks: list[Chunk]) -> None:
        self._step, self._chunks = step, chunks

    def finish(self) -> None:
        self._step.finish()
        sampling = [chunk.sequence for chunk in self._chunks if chunk.samples]
        if any(Fault.SAMPLE.is_of(sequence) and sequence.num_generated >= 2 for sequence in sampling):
            raise PlantedError

    def result(self) -> StepResult:
        result = self._step.result()
        sampling = [i for i, chunk in enumerate(self._chunks) if chunk.samples]
        for i, following in pairwise(sampling):
            if Fault.SWAP.is_of(self._chunks[i].sequence):
                result.tokens[i], result.tokens[following] = result.tokens[following], result.tokens[i]
        return result


class FaultyLoop(EngineLoop):
    """Cannot write the deltas of some requests."""

    def __init__(self, core: Core, *rest: Any) -> None:
        super().__init__(core, *rest)
        self._unwritable: set[str] = set()
        self._encoder: Any = self

    def encode(self, event: Event) -> bytes:
        for delta in event.deltas if isinstance(event, StepOutput) else ():
            if delta.request_id in self._unwritable and delta.finish_reason != "error":
                raise PlantedError
        return msgspec.msgpack.encode(event)

    def _submit(self, peer_id: bytes, peer: Any, submit: Any) -> None:
        self._unwritable |= {r.request_id for r in submit.requests if Fault.WRITE.is_in(r)}
        super()._submit(peer_id, peer, submit)


def plant_in_core(core: EngineCore) -> None:
    core.runner = FaultyRunner(core.runner)
    queue = core.scheduler.add

    def add(request: GenerationRequest, *rest: Any, **options: Any) -> Sequence:
        if Fault.QUEUE.is_in(request):
            raise PlantedError
        return queue(request, *rest, **options)

    mock.patch.object(core.scheduler, "add", add).start()


def plant_in_adapters(settings: EngineSettings) -> None:
    """Before the registry is made."""
    read, read_files, fill = read_adapter, AdapterStore._read_files, AdapterStore.fill
    reading = threading.local()

    def noted_read(self: AdapterStore, version: AdapterVersion) -> Any:
        assert version.files is not None
        reading.folder = Path(settings.adapter_dir or "") / version.files.shown  # it may be a copy that is read
        return read_files(self, version)

    def faulty_read(config: Any, *rest: Any, **options: Any) -> Any:
        if reading.folder.name.startswith(FAULTY_READ) or _is_first(reading.folder):
            raise PlantedError
        return read(config, *rest, **options)

    def faulty_fill(self: AdapterStore, version: AdapterVersion, slot: int) -> None:
        if version.name.startswith(FAULTY_COPY):
            self._packed[version] = None  # type: ignore[assignment]
        fill(self, version, slot)

    mock.patch.object(adapter_store, "read_adapter", faulty_read).start()
    mock.patch.object(AdapterStore, "_read_files", noted_read).start()
    mock.patch.object(AdapterStore, "fill", faulty_fill).start()


def _is_first(folder: Path) -> bool:
    if not folder.name.startswith(FAULTY_ONCE):
        return False
    with contextlib.suppress(FileExistsError):
        (folder / "was-tried").touch(exist_ok=False)
        return True
    return False


def build_faulty_core(settings: EngineSettings) -> tuple[EngineCore, EngineInfo]:
    plant_in_adapters(settings)
    core, info = build_core(settings)
    plant_in_core(core)
    return core, info


if __name__ == "__main__":
    mock.patch.object(process, "EngineLoop", FaultyLoop).start()
    sys.exit(process.main(build_faulty_core))
