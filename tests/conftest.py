"""Options of the test suite: what takes minutes runs only when asked for. Where GPU kernels run is decided here."""

import os

import pytest
import torch

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
