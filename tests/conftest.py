"""Options of the test suite: what takes minutes runs only when asked for. Where GPU kernels run is decided here."""

import contextlib
import functools
import gc
import importlib
import os
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import certifi
import hypothesis
import pytest
import torch

# An ignored SIGINT, as of `nohup` and some CI runners, is inherited: Ctrl-C would not reach what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests never time things, and Hypothesis' deadline would.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.register_profile("slow", deadline=None, max_examples=100)
hypothesis.settings.load_profile("quick")

# Modules and tests are hundreds of thousands of objects that live to the end: collecting garbage among them, again and
# again while they are made, takes a fifth of that time.
gc.disable()

# Tiny models: a second thread costs more than it computes. Of this process only; servers that tests start have theirs.
torch.set_num_threads(1)

# Several processes share the cores: OpenMP's threads would wait for each other by keeping a core busy that the awaited
# one needs, and a small product would take several times as long. Read by processes that start from now on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).parents[1]
# Servers' child processes do not import from the current folder; those of tests run modules of tests/.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _roots_read_once(create: Callable[..., ssl.SSLContext]) -> Callable[..., ssl.SSLContext]:
    """httpx reads all root certificates for every client, 40 ms each, also for `httpx.get` of http on 127.0.0.1."""
    of_roots = {"cafile": os.environ.get("SSL_CERT_FILE") or certifi.where()}
    roots = create(**of_roots)

    def create_or_reuse(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        return roots if not args and kwargs == of_roots else create(*args, **kwargs)

    return create_or_reuse


ssl.create_default_context = _roots_read_once(ssl.create_default_context)


def _patch_language_once(interpreter: ModuleType) -> None:
    """Triton's interpreter replaces the functions of `triton.language` for each call of a device function, 10 ms each:
    half of its time. Here once for each module with kernels, for the rest of the process."""
    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()
    patched: set[str] = set()

    def patch_lang(function: Callable[..., Any]) -> Any:
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return nothing

    interpreter._patch_lang = patch_lang


if not torch.cuda.is_available() and "tests.support.gpu.compile_only" not in sys.modules:
    # By Triton's interpreter; read when Triton is first imported, which other libraries do as well.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        _patch_language_once(importlib.import_module("triton.runtime.interpreter"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where GPU kernels run: a CUDA device, or the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


COMPILING = (
    "tests/unit/ops/test_cpu.py",
    "tests/unit/ops/cpu/",
    "tests/unit/backends/test_cpu_experts.py",
    "tests/unit/backends/test_quantized_formats.py",
    "tests/unit/backends/test_invariance.py",
)
NOT_COMPILED = ("tests/unit/ops/triton/", "tests/unit/backends/gpu/", "tests/unit/train/", "tests/unit/analysis/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--slow"):
        hypothesis.settings.load_profile("slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(item.nodeid))
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if item.get_closest_marker("slow_without_gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="takes minutes without a GPU; run with --slow"))


def _turn(nodeid: str) -> int:
    """One process begins with what compiles the CPU's kernels, of every kind, and the other with what needs none of
    them: afterwards none is compiled, and no process waits for one that does."""
    if nodeid.startswith(COMPILING):
        return 0
    if nodeid.startswith(NOT_COMPILED):
        return 1
    return 3 if nodeid.startswith("tests/unit/") else 2  # the shortest files last: all processes end together


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests in one process, as `--dist loadfile` has it; in the same process all files of the demo model's
    server, of the terminal and of the browser, which share servers, and all that compile."""
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith(COMPILING):
                return "the CPU's kernels"
            for folder in ("tests/terminal/", "tests/web/"):
                if file.startswith(folder):
                    return folder
            return "the demo model's server" if _asks_demo_server(file) else file

    return ByServer(config, log)


@functools.cache
def _asks_demo_server(file: str) -> bool:
    return file.startswith("tests/integration/") and "demo_server" in (ROOT / file).read_text(encoding="utf-8")
