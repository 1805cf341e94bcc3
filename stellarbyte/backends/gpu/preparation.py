"""Compiles and captures the programs of usual steps in the background.

Triton compiles a kernel at its first launch, which takes up to a second and stalls the streams that wait for it. So a
thread runs these programs once, on separate slots and a separate cache; the engine's thread captures them as graphs
when it is idle, or when a step first needs one.
"""

import atexit
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import torch

from stellarbyte.backends.gpu.prompts import MAX_PADDED_TOKENS, usual_shapes, verified_shapes
from stellarbyte.backends.gpu.steps import Decoding, Prefill, Steps

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0005


def first_programs(max_rows: int, max_tokens: int) -> list[Decoding | Prefill]:
    """The programs of a first answer, and those of the largest steps, which are compiled for other sizes."""
    shapes = list(usual_shapes(max_tokens, with_adapters=False))
    decoding = [Decoding(rows, 0, truncates=False) for rows in {1, max_rows}]
    return [*decoding, *(Prefill(shape, truncates=False) for shape in {shapes[0], shapes[-1]})]


def usual_programs(steps: Steps) -> Iterator[Decoding | Prefill]:
    """Programs of steps, the likeliest first; others are compiled and captured on first use."""
    for has_adapters in (False, True) if steps.model.bank.num_slots else (False,):
        for rows in steps.row_counts:
            for segments in _segment_counts(rows) if has_adapters else [0]:
                yield Decoding(rows, segments, truncates=False)
        for shape in usual_shapes(steps.max_tokens, with_adapters=has_adapters):
            yield Prefill(shape, truncates=False)
        for shape in verified_shapes(with_adapters=has_adapters) if steps.max_drafted else ():
            yield Prefill(shape, truncates=False, verifies=True)
    for rows in steps.row_counts:
        yield Decoding(rows, 0, truncates=True)
    for shape in verified_shapes(with_adapters=False) if steps.max_drafted else ():
        yield Prefill(shape, truncates=True, verifies=True)
    if steps.model.bank.num_slots:  # for their few kernels; most steps of adapters are of plain ones
        for rows in sorted({1, steps.row_counts[-1]}):
            yield Decoding(rows, 1, truncates=False, beyond_plain=True)
        yield Prefill(next(usual_shapes(steps.max_tokens, with_adapters=True)), truncates=False, beyond_plain=True)


def _segment_counts(rows: int) -> list[int]:
    """The values of `num_segments` in `Steps.decode`."""
    counts = [1]
    while counts[-1] < rows:
        counts.append(min(2 * counts[-1], rows))
    return counts


class CaptureOrder(Protocol):
    """How one of several ranks captures the same programs as the others, at the same place in the order of steps.

    A collective must run as part of a graph on all ranks or on none. So no rank's graphs may depend on how fast its own
    thread compiles.
    """

    leads: bool
    """Whether this rank decides when all ranks capture their next program."""

    def note_compiled(self) -> None:
        """One more program is compiled on this rank. Compiler thread."""
        ...

    def note_failed(self) -> None:
        """This rank compiles no more programs. Compiler thread."""
        ...

    def may_capture(self) -> bool | None:
        """Whether this rank captures its next program now, as all others do; None: a rank will never have compiled it.
        Engine thread only."""
        ...


class Preparation:
    """The background thread, and the captures that the engine's thread takes over."""

    def __init__(self, steps: Steps, rehearsal: Steps, order: CaptureOrder | None = None) -> None:
        """Prepares `steps` by running `rehearsal`: the same model and rows, with unused slots and cache.

        `order`: with other ranks; None: this process computes alone.
        """
        self._steps = steps
        self._rehearsal: Steps | None = rehearsal
        self._order = order
        self._compiled: deque[Decoding | Prefill] = deque()
        self._thread = threading.Thread(target=self._compile, name="compiler", daemon=True)
        self._stopping = threading.Event()
        self._started_s = time.monotonic()
        self._has_failed = False

    def start(self) -> None:
        """Start the thread."""
        # The default interval of 5 ms would block the engine's thread for as long.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._thread.start()
        atexit.register(self.stop)  # a compiler that runs during the interpreter's shutdown aborts the process

    def stop(self) -> None:
        """Stop; returns when the current program is done."""
        self._stopping.set()
        self._thread.join()
        atexit.unregister(self.stop)

    @property
    def is_done(self) -> bool:
        return not self._compiled and not self._thread.is_alive()

    @property
    def is_led(self) -> bool:
        """Whether another rank decides when this one captures."""
        return self._order is not None and not self._order.leads

    def capture_next(self) -> bool:
        """Capture one program, if one is ready; returns whether more may follow. Engine thread only.

        A program that could not be captured is captured when a step first needs it.
        """
        if self._compiled:
            may_capture = True if self._order is None else self._order.may_capture()
            if may_capture:
                key = self._compiled.popleft()
                self._steps.note_compiled(key)
                with torch.inference_mode():
                    self._steps.capture(key)
            elif may_capture is None:
                self._has_failed = True
                self._compiled.clear()
        is_done = self.is_done  # read once: the thread may end meanwhile
        if is_done and not self._has_failed:
            logger.info("kernels are ready after %.1f s", time.monotonic() - self._started_s)
        return not is_done

    def _compile(self) -> None:
        try:
            self.run_all()
        except Exception:
            self._has_failed = True
            logger.exception("not all kernels could be prepared; the others are compiled on first use")
            if self._order is not None:
                self._order.note_failed()

    def run_all(self) -> None:
        """Run every program on the calling thread, on a separate stream."""
        rehearsal, self._rehearsal = self._rehearsal, None
        assert rehearsal is not None, "run_all must be called once"
        device = rehearsal.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread's is the first one, of which other ranks need all memory
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.inference_mode(), torch.cuda.stream(stream):
            for key in usual_programs(rehearsal):
                if self._stopping.is_set():
                    break
                rehearsal.run_program(key)
                if isinstance(key, Decoding) or key.shape.tokens <= MAX_PADDED_TOKENS:
                    if self._order is None:
                        self._steps.note_compiled(key)
                    self._compiled.append(key)
                    if self._order is not None:  # after it is there, as the order to capture it may come at once
                        self._order.note_compiled()
            if stream is not None:
                stream.synchronize()
