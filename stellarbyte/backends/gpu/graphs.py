"""CUDA graphs of programs that run again and again."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Graphs:
    """Runs a program eagerly the first time, which compiles kernels and sets libraries up; from then on as a graph.

    Graphs share memory, so none of their results but those returned may be read after another one has run. Engine
    thread only, but for `note_compiled`; on a device other than CUDA every run is eager.

    The current stream must not be the default one, which cannot be captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._captures = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._compiled: set[Hashable] = set()  # programs whose kernels are there
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, program: Callable[[], Result], *, will_recur: bool = True) -> Result:
        """Run `program`, which must do the same kernels on the same addresses whenever it is run with this key.

        It is captured right after its first run, or with `will_recur` False before its second: capturing takes as long
        as launching it several times.
        """
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
        """The same kernels have run elsewhere: the program need not be run before it is captured. On any thread."""
        self._compiled.add(key)

    def capture(self, key: Hashable, program: Callable[[], object]) -> None:
        """Capture a program that was run or noted, unless it is."""
        if self._captures and key not in self._graphs:
            self._graphs[key] = self._capture(program)

    def _capture(self, program: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads go on copying adapters meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = program()
        finally:
            graph.capture_end()
        return graph, result
