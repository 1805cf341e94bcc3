"""A pytest plugin for tests of GPU kernels: Triton compiles them for an H100 instead of running them.

    python -m pytest -p tests.support.gpu.compile_only tests/unit/ops/triton tests/unit/backends/gpu

Needs no GPU. A test fails if a kernel does not compile or takes more shared memory than there is; numbers, which
nobody has computed, fail none. Triton's interpreter finds neither, as it takes any Python.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_BYTES = 232_448  # of an H100 and an H200
compiled: set[str] = set()
_run = JITFunction.run


class NotCompiled(Exception):
    pass


class _Card:
    """What Triton asks a driver for before it launches a kernel."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _compile(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
    try:
        found = _run(kernel, *args, **(kwargs | {"warmup": True}))
    except Exception as error:
        raise NotCompiled(f"{kernel.fn.__name__}: {error}") from error
    if found.metadata.shared > SHARED_BYTES:
        raise NotCompiled(f"{kernel.fn.__name__} takes {found.metadata.shared} bytes of shared memory")
    compiled.add(found.hash)
    return found


driver.set_active(_Card())
JITFunction.run = _compile


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        return (yield)
    except (NotCompiled, pytest.skip.Exception):
        raise
    except Exception:  # of numbers that were not computed
        return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"compiled {len(compiled)} kernels")
