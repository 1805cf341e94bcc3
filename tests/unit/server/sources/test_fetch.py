"""The process that downloads: what it is started with, that it ends in time, and its bounds."""

import asyncio
import os
from pathlib import Path

import pytest

from stellarbyte_server.config.adapter_source import AdapterSource, folder_name
from stellarbyte_server.sources.fetch import child_environment, fetch
from stellarbyte_server.sources.outcome import FetchError
from tests.support.stubs.hub import Hub, commit_of
from tests.support.stubs.s3 import Store

WEIGHTS = "adapter_model.safetensors"
FROM_S3 = AdapterSource.parse("s3://bucket/a/x")


def refused(source: AdapterSource, **limits: float) -> FetchError:
    with pytest.raises(FetchError) as error:
        asyncio.run(fetch(source, **limits))
    return error.value


def test_the_process_fetches_and_says_the_version(hub: Hub, cache: Path, adapter: Path) -> None:
    del hub
    pinned = asyncio.run(fetch(AdapterSource.parse("hf://org/x@main")))
    assert str(pinned) == f"hf://org/x@{commit_of(adapter)}"
    assert (cache / folder_name(str(pinned)) / WEIGHTS).read_bytes() == b"weights"


def test_a_process_that_takes_too_long_is_ended_and_leaves_nothing(store: Store, cache: Path) -> None:
    store.is_open.clear()

    async def fetch_until_it_reads() -> None:
        """Cancelled as at a shutdown, while the download waits."""
        task = asyncio.create_task(fetch(FROM_S3))
        await asyncio.to_thread(store.is_asked.wait)
        assert [*cache.iterdir()]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(fetch_until_it_reads())
    assert not [*cache.iterdir()]
    error = refused(FROM_S3, limit_s=0.01)
    assert error.status == 504 and "0.01 seconds" in str(error)


def test_a_host_cannot_write_more_than_is_allowed(store: Store, cache: Path) -> None:
    """The store says less than it sends."""
    store.objects[f"bucket/a/x/{WEIGHTS}"] = bytes(2**22)
    store.claimed[f"bucket/a/x/{WEIGHTS}"] = 100
    error = refused(FROM_S3, max_bytes=1000)
    assert error.status == 400 and "larger than the limit of 1000 bytes" in str(error)
    assert not [*cache.iterdir()]


def test_without_boto3_the_error_says_what_to_install(
    store: Store, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del store, cache
    (tmp_path / "boto3.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    error = refused(FROM_S3)
    assert error.status == 400 and "pip install 'stellarbyte[s3]'" in str(error)


def test_nothing_is_imported_from_the_current_folder(
    store: Store, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the server's, nor of the folder that an empty entry of PYTHONPATH means."""
    del store, cache
    for name in ("boto3", "msgspec", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}{os.pathsep}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert str(asyncio.run(fetch(FROM_S3))).startswith("s3://bucket/a/x@")


def test_the_process_does_not_get_the_servers_keys() -> None:
    ours = {"STELLARBYTE_ADMIN_API_KEY": "k", "STELLARBYTE_API_KEY": "k", "STELLARBYTE_CACHE": "c", "HF_TOKEN": "t"}
    given = child_environment(ours)
    assert "k" not in given.values() and (given["STELLARBYTE_CACHE"], given["HF_TOKEN"]) == ("c", "t")
