"""CUDA graphs of programs that run again and again. Knows nothing of what they compute."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Graphs:
    """Runs a program eagerly the first time, which compiles kernels and sets libraries up; from then on as a graph.

    Graphs share memory, so none of their results but those returned may be read after another one has run. Engine
    thread only; on a device other than CUDA every run is eager.

    The current stream must not be the default one, which cannot be captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._captures = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, program: Callable[[], Result], *, will_recur: bool = True) -> Result:
        """Run `program`, which must do the same kernels on the same addresses whenever it is run with this key.

        It is captured right after its first run, or with `will_recur` False before its second: capturing takes as long
        as launching it several times.
        """
        captured = self._graphs.get(key)
        if captured is None:
            is_first = key not in self._seen
            self._seen.add(key)
            if not self._captures:
                return program()
            if is_first:
                result = program()
                if will_recur:
                    self._graphs[key] = self._capture(program)
                return result
            captured = self._graphs[key] = self._capture(program)
        graph, captured_result = captured
        graph.replay()
        return captured_result  # type: ignore[return-value]

    def _capture(self, program: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads go on copying adapters meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = program()
        finally:
            graph.capture_end()
        return graph, result
