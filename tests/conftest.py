"""Options of the test suite: what takes minutes runs only when asked for. Where GPU kernels run is decided here."""

import os
import signal
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certifi
import hypothesis
import pytest
import torch

# An ignored SIGINT, as of `nohup` and some CI runners, is inherited: Ctrl-C would not reach what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests never time things, and Hypothesis' deadline would.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# Tiny models: a second thread costs more than it computes. Of this process only; servers that tests start have theirs.
torch.set_num_threads(1)

# Servers' child processes do not import from the current folder; those of tests run modules of tests/.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def _roots_read_once(create: Callable[..., ssl.SSLContext]) -> Callable[..., ssl.SSLContext]:
    """httpx reads all root certificates for every client, 40 ms each, also for `httpx.get` of http on 127.0.0.1."""
    of_roots = {"cafile": os.environ.get("SSL_CERT_FILE") or certifi.where()}
    roots = create(**of_roots)

    def create_or_reuse(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        return roots if not args and kwargs == of_roots else create(*args, **kwargs)

    return create_or_reuse


ssl.create_default_context = _roots_read_once(ssl.create_default_context)

if not torch.cuda.is_available():
    # By Triton's interpreter; read when Triton is first imported, which other libraries do as well.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where GPU kernels run: a CUDA device, or the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if item.get_closest_marker("slow_without_gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="takes minutes without a GPU; run with --slow"))
