"""A Hub and a store, known to this process and to those that it starts, and a cache folder of a test's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stubs.hub import Hub, running_hub, use_hub, write_repository
from tests.support.stubs.s3 import Store, running_store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of fetched adapters."""
    monkeypatch.setenv("STELLARBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapters"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as a repository of an adapter has it, with files that no server needs."""
    return write_repository(tmp_path / "repository", b"weights")


@pytest.fixture
def hub(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With hf://org/x."""
    with running_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "hub")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        hub.add("org/x", adapter)
        yield hub


@pytest.fixture
def store(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """With s3://bucket/a/x."""
    with running_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        store.add("bucket/a/x", adapter)
        yield store
