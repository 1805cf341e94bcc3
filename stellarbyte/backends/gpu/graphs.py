"""CUDA graphs of repeated programs."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Graphs:
    """Runs a program eagerly the first time, which compiles kernels and initialises libraries; then as a graph.

    Graphs share memory: after another graph has run, only returned results may be read. Engine thread only, except
    `note_compiled`; on a device other than CUDA every run is eager.

    The current stream must not be the default one, which cannot be captured.

    Attributes:
        num_runs: of programs, also of those that failed.
    """

    def __init__(self, device: torch.device) -> None:
        self._captures = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self.num_runs = 0
        self._compiled: set[Hashable] = set()  # programs with compiled kernels
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, program: Callable[[], Result], *, will_recur: bool = True) -> Result:
        """Run `program`, which must launch the same kernels on the same addresses each time with this key.

        It is captured after its first run, or with `will_recur` False before its second: a capture takes as long as
        several launches.
        """
        self.num_runs += 1
        if not self._captures:
            return program()
        if key not in self._compiled:
            self._compiled.add(key)
            result = program()
            if will_recur:
                self.capture(key, program)
            return result
        self.capture(key, program)
        graph, captured_result = self._graphs[key]
        graph.replay()
        return captured_result  # type: ignore[return-value]

    def note_compiled(self, key: Hashable) -> None:
        """Note that the program's kernels are compiled: it can be captured without a first run. On any thread."""
        self._compiled.add(key)

    def capture(self, key: Hashable, program: Callable[[], object]) -> None:
        """Capture a program that was run or noted, unless it is captured."""
        if self._captures and key not in self._graphs:
            self._graphs[key] = self._capture(program)

    def _capture(self, program: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads copy adapters during the capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = program()
        finally:
            graph.capture_end()
        return graph, result
