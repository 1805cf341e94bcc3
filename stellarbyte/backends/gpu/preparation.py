"""Compiles and captures what steps will run, beside the engine's own thread.

Triton compiles a kernel when it is first launched, which takes up to a second, and a stream that waits for it stands
still. So the programs of usual steps are run once on a thread, over other slots and another cache; the engine's thread
captures them as graphs when it has nothing else to do, or when a step first needs one.
"""

import atexit
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

import torch

from stellarbyte.backends.gpu.prompts import MAX_PADDED_TOKENS, usual_shapes
from stellarbyte.backends.gpu.steps import Decoding, Prefill, Steps

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0005


def first_programs(max_rows: int, max_tokens: int) -> list[Decoding | Prefill]:
    """What the first answer needs and, compiled for other sizes, the largest steps."""
    shapes = list(usual_shapes(max_tokens, with_adapters=False))
    decoding = [Decoding(rows, 0, truncates=False) for rows in {1, max_rows}]
    return [*decoding, *(Prefill(shape, truncates=False) for shape in {shapes[0], shapes[-1]})]


def usual_programs(steps: Steps) -> Iterator[Decoding | Prefill]:
    """What steps run, the likeliest first; what is not among it is compiled and captured when it is needed."""
    for has_adapters in (False, True) if steps.model.bank.num_slots else (False,):
        for rows in steps.row_counts:
            for segments in _segment_counts(rows) if has_adapters else [0]:
                yield Decoding(rows, segments, truncates=False)
        for shape in usual_shapes(steps.max_tokens, with_adapters=has_adapters):
            yield Prefill(shape, truncates=False)
    for rows in steps.row_counts:
        yield Decoding(rows, 0, truncates=True)


def _segment_counts(rows: int) -> list[int]:
    """Those of `Steps.decode`."""
    counts = [1]
    while counts[-1] < rows:
        counts.append(min(2 * counts[-1], rows))
    return counts


class Preparation:
    """One thread's work, and what the engine's takes over of it."""

    def __init__(self, steps: Steps, rehearsal: Steps) -> None:
        """For `steps`, by `rehearsal` of the same model and as many rows, over slots and a cache that nobody uses."""
        self._steps = steps
        self._rehearsal: Steps | None = rehearsal
        self._compiled: deque[Decoding | Prefill] = deque()
        self._thread = threading.Thread(target=self._compile, name="compiler", daemon=True)
        self._stopping = threading.Event()
        self._started_s = time.monotonic()
        self._has_failed = False

    def start(self) -> None:
        """Begin to compile, on a thread."""
        # It would keep the engine's thread from Python for the usual 5 ms at a time.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._thread.start()
        atexit.register(self.stop)  # a compiler that runs while the process is taken down aborts it

    def stop(self) -> None:
        """Compile nothing more; returns when the program at hand is done."""
        self._stopping.set()
        self._thread.join()
        atexit.unregister(self.stop)

    @property
    def is_done(self) -> bool:
        return not self._compiled and not self._thread.is_alive()

    def capture_next(self) -> bool:
        """Capture one program, if one is ready; whether there is more to come. Engine thread only."""
        if self._compiled:
            with torch.inference_mode():
                self._steps.capture(self._compiled.popleft())
        is_done = self.is_done  # asked once: the thread may end meanwhile
        if is_done and not self._has_failed:
            logger.info("kernels are ready after %.1f s", time.monotonic() - self._started_s)
        return not is_done

    def _compile(self) -> None:
        try:
            self.run_all()
        except Exception:
            self._has_failed = True
            logger.exception("could not prepare all kernels; the others are compiled when they are needed")

    def run_all(self) -> None:
        """Run every program on the calling thread, on a stream of its own."""
        rehearsal, self._rehearsal = self._rehearsal, None
        assert rehearsal is not None, "this is done once"
        stream = torch.cuda.Stream() if rehearsal.model.device.type == "cuda" else None
        with torch.inference_mode(), torch.cuda.stream(stream):
            for key in usual_programs(rehearsal):
                if self._stopping.is_set():
                    break
                rehearsal.run_program(key)
                if isinstance(key, Decoding) or key.shape.tokens <= MAX_PADDED_TOKENS:
                    self._steps.note_compiled(key)
                    self._compiled.append(key)
            if stream is not None:
                stream.synchronize()
