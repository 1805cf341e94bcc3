"""Moves adapters between disk, CPU memory and slots, on separate threads.

The threads have the lowest priority, so that running streams keep their pace.
"""

import functools
import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora import Adapter, AdapterError, read_adapter
from stellarbyte.lora.bank import EMBEDDING, REPLACEABLE, PackedAdapter, pack_adapter
from stellarbyte.lora.dora import row_factors
from stellarbyte.lora.mixing import mixed
from stellarbyte.lora.peft_config import MODULES_TO_SAVE, USE_DORA
from stellarbyte.model.parts import adaptable_modules
from stellarbyte_server.engine.adapters.memory import FillDone, Looked, ReadDone
from stellarbyte_server.engine.run.device_errors import device_errors
from stellarbyte_server.engine.run.executor import DeviceLost, OutOfDeviceMemory
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.give_way import give_way
from stellarbyte_server.opening import open_inside
from stellarbyte_server.protocol.messages import Reply
from stellarbyte_server.wake_up import WakeUp

logger = logging.getLogger("server.engine")

T = TypeVar("T")
MAX_READERS = 6  # a core reads, checks and packs about 400 MB a second; more threads slow each other down


class Bank(Protocol):
    """A `LoraBank` for adapters of the whole model, or the banks of several ranks."""

    config: ByteModelConfig
    num_slots: int
    max_rank: int
    dtype: torch.dtype

    def fence(self) -> torch.cuda.Event | None: ...

    def fill(self, slot: int, adapter: PackedAdapter, fence: torch.cuda.Event | None = None) -> None: ...

    def clear(self, slot: int) -> None: ...


class AdapterStore:
    """See `adapters.memory.AdapterStore`. Engine thread only.

    `wake_up` rings when `finished` has results.
    """

    def __init__(self, bank: Bank, weight_of: Callable[[str], torch.Tensor] | None = None) -> None:
        """`weight_of`: `weight` of the backend's model; None: plain LoRA only."""
        self._bank = bank
        self._weight_of = weight_of
        matrix = bank.config.vocab_size, bank.config.hidden_size
        self._replaceable = {} if weight_of is None else {f"{module}.weight": matrix for module in REPLACEABLE}
        self._shapes = adaptable_modules(bank.config)
        self._packed: dict[AdapterVersion, PackedAdapter] = {}
        self._done: deque[ReadDone | FillDone | Looked | Exception] = deque()
        self._looker = ThreadPoolExecutor(1, "adapter-looker")
        self._reader = _readers()
        self._filler = ThreadPoolExecutor(1, "adapter-filler", give_way)
        self.wake_up = WakeUp()

    def close(self) -> None:
        """Stop without further results."""
        for threads in (self._looker, self._reader, self._filler):
            threads.shutdown(wait=False, cancel_futures=True)
        self.wake_up.close()

    def look(self, look: Callable[[], T], note: Callable[[T | None], list[Reply]]) -> None:
        def work() -> Looked:
            try:
                return Looked(functools.partial(note, look()))
            except Exception:  # adapters in memory still serve
                logger.exception("a scan for adapters failed")
                return Looked(functools.partial(note, None))

        self._start(self._looker, work)

    def read(self, version: AdapterVersion) -> None:
        self._start(self._reader, lambda: self._read(version))

    def fill(self, version: AdapterVersion, slot: int) -> None:
        packed, fence = self._packed[version], self._bank.fence()

        def work() -> FillDone:
            try:
                with device_errors():
                    self._bank.fill(slot, packed, fence)
            except DeviceLost:
                raise
            except OutOfDeviceMemory:  # all but heads and embeddings has memory of its own since the start
                logger.exception("the device has no room for the adapter %s", version.name)
                error = (
                    f"The device has no room for the head or the embedding of the adapter {version.name!r};"
                    " lower --gpu-memory-utilization."
                )
                return FillDone(version=version, slot=slot, error=error)
            except Exception:  # other adapters may still work
                logger.exception("copying the adapter %s to its slot failed", version.name)
                error = f"The adapter {version.name!r} could not be copied to the device; see the server's log."
                return FillDone(version=version, slot=slot, error=error)
            return FillDone(version=version, slot=slot)

        self._start(self._filler, work)

    def clear(self, slot: int) -> None:
        self._bank.clear(slot)

    def forget(self, version: AdapterVersion) -> None:
        self._packed.pop(version, None)

    def finished(self) -> list[ReadDone | FillDone | Looked]:
        self.wake_up.clear()
        done = []
        while self._done:
            result = self._done.popleft()
            if isinstance(result, Exception):
                raise result  # the device is lost
            done.append(result)
        return done

    def _start(self, thread: ThreadPoolExecutor, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                self._done.append(work())
            except Exception as error:
                self._done.append(error)
            self.wake_up.ring()

        thread.submit(run)

    def _read(self, version: AdapterVersion) -> ReadDone:
        """Bring a version into memory."""
        done, packed = self._mixed(version) if version.parts else self._read_files(version)
        if packed is not None:
            version.invocation = done.invocation  # before a mix finds the version here
            self._packed[version] = packed
        return done

    def _read_files(self, version: AdapterVersion) -> tuple[ReadDone, PackedAdapter | None]:
        started_s = time.perf_counter()
        files = version.files
        try:
            assert files is not None, "only versions with files are read"
            opener = functools.partial(open_inside, files.root)
            adapter = read_adapter(
                files.config,
                files.weights,
                self._shapes,
                max_rank=self._bank.max_rank,
                accepts=frozenset() if self._weight_of is None else {USE_DORA, MODULES_TO_SAVE},
                copies=self._replaceable,
                opener=opener,
            )
            invocation = _invocation(adapter, self._bank.config.vocab_size)
            scales = {name: adapter.scale_of(name) for name in adapter.weights}
            factors = self._factors(adapter)
            replaced = self._replaced(adapter)
            packed = pack_adapter(adapter.weights, scales, self._bank.config, self._bank.dtype, factors, replaced)
            if not packed.is_finite():
                raise AdapterError("its weights times alpha / r overflow the serving dtype.")
        except AdapterError as error:
            return self._failed(version, started_s, str(error)), None
        except Exception:  # must not end the engine
            logger.exception("reading the adapter %s failed", version.name)
            return self._failed(version, started_s, "it could not be read; see the server's log.", is_fault=True), None
        done = ReadDone(
            version=version,
            seconds=time.perf_counter() - started_s,
            content_hash=adapter.content_hash,
            num_bytes=packed.num_bytes,
            rank=int(packed.ranks_LP.max()),
            matched=tuple(adapter.weights),
            unmatched=adapter.unmatched_targets,
            is_zero=_is_zero(adapter, factors, replaced),
            changed_tokens=_most_changed(replaced),
            invocation=invocation,
        )
        return done, packed

    def _factors(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        """DoRA's factors of rows, by module."""
        factors: dict[str, torch.Tensor] = {}
        for name, magnitude in adapter.magnitudes.items():
            assert self._weight_of is not None  # else the adapter has been refused
            try:
                factors[name] = row_factors(
                    self._weight_of(name), *adapter.weights[name], adapter.scale_of(name), magnitude
                )
            except ZeroDivisionError as error:
                raise AdapterError(f"it has DoRA, but in {name} {error}.") from None
        return factors

    def _replaced(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        """What the head and the embedding of an adapter differ from the model's."""
        replaced: dict[str, torch.Tensor] = {}
        for parameter, matrix_VC in adapter.copies.items():
            assert self._weight_of is not None  # else the adapter has been refused
            module = parameter.removesuffix(".weight")
            replaced[module] = (matrix_VC.float() - self._weight_of(module).cpu().float()).to(self._bank.dtype)
        return replaced

    def _mixed(self, version: AdapterVersion) -> tuple[ReadDone, PackedAdapter | None]:
        """A mix of its parts, of which those that are not in memory are read from disk and not kept."""
        started_s = time.perf_counter()
        parts: list[tuple[PackedAdapter, float]] = []
        hashes: list[tuple[str, float]] = []
        read: list[ReadDone] = []
        for part, scale in version.parts:
            packed, content_hash, invocation = self._packed.get(part), part.content_hash, part.invocation
            if packed is None or not content_hash:
                done, packed = self._read_files(part)
                read.append(done)
                content_hash, invocation = done.content_hash, done.invocation
            if packed is None:
                failed = ReadDone(
                    version=version,
                    seconds=time.perf_counter() - started_s,
                    error=done.error,
                    is_fault=done.is_fault,
                    parts=tuple(read),
                )
                return failed, None
            if invocation:
                error = f"{part.name!r} is an activated adapter (alora_invocation_tokens), which cannot be mixed."
                return self._failed(version, started_s, error, parts=tuple(read)), None
            parts.append((packed, scale))
            hashes.append((content_hash, scale))
        try:
            whole = mixed(parts, self._bank.config, self._bank.max_rank)
            if not whole.is_finite():
                raise AdapterError("its weights times their scales overflow the serving dtype.")
        except AdapterError as error:
            return self._failed(version, started_s, str(error), parts=tuple(read)), None
        except Exception:  # must not end the engine
            logger.exception("mixing the adapters %s failed", version.name)
            message = "it could not be put together; see the server's log."
            return self._failed(version, started_s, message, is_fault=True, parts=tuple(read)), None
        done = ReadDone(
            version=version,
            seconds=time.perf_counter() - started_s,
            content_hash=hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
            num_bytes=whole.num_bytes,
            rank=int(whole.ranks_LP.max()),
            parts=tuple(read),
        )
        return done, whole

    def _failed(
        self,
        version: AdapterVersion,
        started_s: float,
        error: str,
        *,
        is_fault: bool = False,
        parts: tuple[ReadDone, ...] = (),
    ) -> ReadDone:
        kind = "mix" if version.parts else "adapter"
        return ReadDone(
            version=version,
            seconds=time.perf_counter() - started_s,
            error=f"The {kind} {version.name!r} cannot be loaded: {error}",
            is_fault=is_fault,
            parts=parts,
        )


def _invocation(adapter: Adapter, vocab_size: int) -> tuple[int, ...]:
    """The tokens that activate an adapter; (): it needs none. AdapterError: the model has no such token."""
    tokens = tuple(adapter.config.alora_invocation_tokens or ())
    if tokens and max(tokens) >= vocab_size:
        raise AdapterError(f"alora_invocation_tokens has {max(tokens)}, but the model has {vocab_size} tokens.")
    return tokens


def _is_zero(adapter: Adapter, factors: Mapping[str, torch.Tensor], replaced: Mapping[str, torch.Tensor]) -> bool:
    """Whether an adapter adds nothing to any weight."""
    products = (bool(a.any()) and bool(b.any()) for a, b in adapter.weights.values())
    scaled = (bool((factor != 1).any()) for factor in factors.values())
    return not (any(products) or any(scaled) or any(bool(matrix.any()) for matrix in replaced.values()))


def _most_changed(replaced: Mapping[str, torch.Tensor], most: int = 4) -> tuple[int, ...]:
    """The tokens whose embedding an adapter changes most."""
    change_VC = replaced.get(EMBEDDING)
    if change_VC is None:
        return ()
    sizes_V = torch.linalg.vector_norm(change_VC, torch.inf, dim=1)
    return tuple(token for token in sizes_V.topk(min(most, len(sizes_V))).indices.tolist() if sizes_V[token] > 0)


def _readers() -> ThreadPoolExecutor:
    """Several threads of one core each if there are many cores, otherwise one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_readers = min(MAX_READERS, cores // 2)
    if num_readers <= 1:
        return ThreadPoolExecutor(1, "adapter-reader", give_way)

    def begin() -> None:
        give_way()
        torch.set_num_threads(1)  # for this and later threads, each of which would otherwise use all cores

    return ThreadPoolExecutor(num_readers, "adapter-reader", begin)
