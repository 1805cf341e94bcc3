"""Downloads into the cache folder, in this process: what is fetched, and what each failure says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stellarbyte_server.config.adapter_source import AdapterSource, folder_name
from stellarbyte_server.sources.child import fetch_into_cache
from stellarbyte_server.sources.outcome import FetchError
from tests.support.stubs.hub import TOKEN, Hub, commit_of, write_repository
from tests.support.stubs.s3 import Store

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def fetch(text: str, max_bytes: int = 1000) -> AdapterSource:
    return fetch_into_cache(AdapterSource.parse(text), max_bytes)


def files(cache: Path, pinned: AdapterSource) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (cache / folder_name(str(pinned))).iterdir()}


def test_only_the_two_files_of_an_adapter_come_from_the_hub(hub: Hub, cache: Path, adapter: Path) -> None:
    pinned = fetch("hf://org/x")
    assert str(pinned) == f"hf://org/x@{commit_of(adapter)}"
    assert files(cache, pinned) == {CONFIG: b"{}", WEIGHTS: b"weights"}
    assert {Path(path).name for path in hub.downloads} == {CONFIG, WEIGHTS}
    assert [*cache.iterdir()] == [cache / folder_name(str(pinned))]  # nothing is left beside it


def test_a_version_is_downloaded_once_and_a_new_one_beside_it(hub: Hub, cache: Path, tmp_path: Path) -> None:
    first = fetch("hf://org/x")
    num_downloads = len(hub.downloads)
    assert fetch("hf://org/x@main") == first and len(hub.downloads) == num_downloads
    hub.add("org/x", write_repository(tmp_path / "newer", b"newer"))
    second = fetch("hf://org/x")
    assert files(cache, first)[WEIGHTS] == b"weights" and files(cache, second)[WEIGHTS] == b"newer"


def test_a_revision_is_fetched_by_its_name(hub: Hub, cache: Path, tmp_path: Path) -> None:
    hub.add("org/x", write_repository(tmp_path / "other", b"other"), "refs/pr/1")
    assert files(cache, fetch("hf://org/x@refs/pr/1"))[WEIGHTS] == b"other"


def test_only_the_two_files_of_an_adapter_come_from_s3(store: Store, cache: Path) -> None:
    pinned = fetch("s3://bucket/a/x")
    assert files(cache, pinned) == {CONFIG: b"{}", WEIGHTS: b"weights"}
    assert store.reads == [f"bucket/a/x/{CONFIG}", f"bucket/a/x/{WEIGHTS}"]
    assert fetch("s3://bucket/a/x") == pinned and len(store.reads) == 2
    store.objects[f"bucket/a/x/{WEIGHTS}"] = b"newer"
    assert files(cache, fetch("s3://bucket/a/x"))[WEIGHTS] == b"newer"
    assert files(cache, pinned)[WEIGHTS] == b"weights"


def check_refused(text: str, status: int, said: str, cache: Path, max_bytes: int = 1000) -> None:
    """One sentence, and nothing in the cache folder."""
    with pytest.raises(FetchError) as refused:
        fetch(text, max_bytes)
    assert refused.value.status == status and said in str(refused.value), str(refused.value)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    assert not cache.exists() or not [*cache.iterdir()]


def gate(hub: Hub, adapter: Path) -> None:
    del adapter
    hub.gated.add("org/x")


def rename(hub: Hub, adapter: Path) -> None:
    hub.add("elsewhere/x", adapter)
    del hub.repositories["org/x", "main"], hub.repositories["org/x", commit_of(adapter)]
    hub.renamed["org/x"] = "elsewhere/x"


def fail(hub: Hub, adapter: Path) -> None:
    del adapter
    hub.is_failing = True


def only_pickle(hub: Hub, adapter: Path) -> None:
    del hub
    (adapter / WEIGHTS).unlink()


def large_config(hub: Hub, adapter: Path) -> None:
    del hub
    (adapter / CONFIG).write_bytes(b" " * 1_000_001)


def nothing(hub: Hub, adapter: Path) -> None:
    del hub, adapter


@pytest.mark.parametrize(
    ("change", "text", "status", "said"),
    [
        (nothing, "hf://org/none", 404, "no repository org/none"),
        (nothing, "hf://org/x@v9", 404, "no revision 'v9'"),
        (nothing, "hf://org/-x-", 400, "not a name that the Hub allows"),
        (gate, "hf://org/x", 403, "is gated"),
        (rename, "hf://org/x", 403, "now called elsewhere/x"),
        (only_pickle, "hf://org/x", 404, f"no file {WEIGHTS}"),
        (large_config, "hf://org/x", 400, "1000001 bytes; at most 1000000"),
        (fail, "hf://org/x", 502, "status 500"),
    ],
)
def test_what_the_hub_does_not_give_is_said(
    hub: Hub, cache: Path, adapter: Path, change: Callable[[Hub, Path], None], text: str, status: int, said: str
) -> None:
    change(hub, adapter)
    check_refused(text, status, said, cache)


def test_a_token_opens_a_gated_repository(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("org/x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert files(cache, fetch("hf://org/x"))[WEIGHTS] == b"weights"


def test_weights_that_are_too_large_are_not_downloaded(hub: Hub, store: Store, cache: Path) -> None:
    check_refused("hf://org/x", 400, "has 7 bytes; at most 6", cache, max_bytes=6)
    check_refused("s3://bucket/a/x", 400, "has 7 bytes; at most 6", cache, max_bytes=6)
    assert not hub.downloads and not store.reads


def test_weights_that_are_larger_than_the_store_says_are_refused(store: Store, cache: Path) -> None:
    store.claimed[f"bucket/a/x/{WEIGHTS}"] = 3
    check_refused("s3://bucket/a/x", 400, "has 7 bytes; at most 6", cache, max_bytes=6)


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("s3://bucket/a/none", 404, "S3 has no s3://bucket/a/none/adapter_config.json"),
        ("s3://bucket/secret/x", 403, "may not read"),
        ("s3://b=c/a", 400, "not a name that S3 allows"),
        ("s3://bucket/broken/x", 502, "cannot be read"),
    ],
)
def test_what_s3_does_not_give_is_said(
    store: Store, cache: Path, adapter: Path, text: str, status: int, said: str
) -> None:
    for prefix in ("bucket/secret/x", "bucket/broken/x"):
        store.add(prefix, adapter)
    store.forbidden.add(f"bucket/secret/x/{WEIGHTS}")
    store.broken.add(f"bucket/broken/x/{WEIGHTS}")
    check_refused(text, status, said, cache)


def test_without_credentials_or_a_host_s3_is_one_sentence(
    store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    check_refused("s3://bucket/a/x", 502, "cannot be read from S3", cache)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    check_refused("s3://bucket/a/x", 403, "no credentials", cache)


def test_a_partial_download_of_a_killed_process_is_removed(store: Store, cache: Path) -> None:
    pinned = fetch("s3://bucket/a/x")
    assert len(store.reads) == 2
    folder = cache / folder_name(str(pinned))
    folder.rename(cache / f".{folder.name}.partial-0123")
    assert fetch("s3://bucket/a/x") == pinned
    assert [*cache.iterdir()] == [folder]
