"""The runner of batches with scripted answers: refusals, ends of all kinds, and a server that stops at any point."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from stellarbyte_server.batch import runner as runner_module
from stellarbyte_server.batch.batches import Batch
from stellarbyte_server.batch.files import StoreLimits
from stellarbyte_server.batch.results import Answer
from stellarbyte_server.batch.runner import BatchRunner, OwnerGone
from stellarbyte_server.batch.storage import Storage, claim_folder
from tests.support.batches import line

ENDPOINT = "/v1/completions"
LIMITS = StoreLimits(file_bytes=10**6, owner_bytes=10**6)
Ask = Callable[[str, str, bytes], Awaitable[Answer]]


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(runner_module, "LOOK_S", 0.01)
    monkeypatch.setattr(runner_module, "_RETRY_S", 0.01)
    os.close(claim_folder(str(tmp_path)))
    return Storage.open(str(tmp_path), LIMITS)


def make_batch(storage: Storage, number: int, owner: str = "") -> Batch:
    upload = storage.files.upload()
    upload.write(b"".join(line(f"r{i}", {"n": i}) for i in range(number)))
    file = storage.files.keep(upload, owner=owner, filename="a", purpose="batch", kept_s=3600)
    return storage.batches.create(
        owner=owner, endpoint=ENDPOINT, input_file_id=file.id, metadata=None, outputs_kept_s=3600
    )


def answer(status: int, body: object, **others: float) -> Answer:
    return Answer(status=status, request_id="x", body=json.dumps(body).encode(), **others)


async def echo(owner: str, endpoint: str, body: bytes) -> Answer:
    del owner, endpoint
    return answer(200, json.loads(body))


def refusal(code: str, status: int = 429) -> Answer:
    return answer(status, {"error": {"code": code}}, retry_after_s=0.01)


def run(
    storage: Storage, ask: Ask, *batches: Batch, at_once: int = 4, has_stopped: Callable[[], bool] = lambda: False
) -> list[Batch]:
    """Run until the batches have ended, or the process has."""

    def are_over() -> bool:
        return all((found := storage.batches.find(batch.id)) and found.is_over for batch in batches)

    async def run_all() -> list[Batch]:
        runner = BatchRunner(storage, ask, is_open=lambda: True, at_once=at_once, max_body_bytes=1000)
        running = asyncio.create_task(runner.run())
        try:
            async with asyncio.timeout(60):
                while not (are_over() or has_stopped()):
                    await asyncio.sleep(0.01)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return [found for batch in batches if (found := storage.batches.find(batch.id))]

    return asyncio.run(run_all())


def lines_of(storage: Storage, batch: Batch, file_id: str | None) -> dict[str, dict[str, object]]:
    if file_id is None:
        return {}
    file = storage.files.find(batch.owner, file_id)
    assert file is not None
    with storage.files.open(file) as content:
        text = content.read()
    assert len(text) == file.bytes
    found = [json.loads(each) for each in text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def test_never_more_requests_run_at_once_than_may_over_all_batches(storage: Storage) -> None:
    now = most = 0

    async def ask(owner: str, endpoint: str, body: bytes) -> Answer:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.002)
        now -= 1
        return await echo(owner, endpoint, body)

    ended = run(storage, ask, *(make_batch(storage, 20) for _ in range(3)), at_once=5)
    assert most == 5
    assert [(batch.status, batch.counts.completed) for batch in ended] == [("completed", 20)] * 3


def test_batches_share_what_runs_at_once(storage: Storage) -> None:
    order: list[str] = []

    async def ask(owner: str, endpoint: str, body: bytes) -> Answer:
        order.append(owner)
        await asyncio.sleep(0.001)
        return await echo(owner, endpoint, body)

    run(storage, ask, make_batch(storage, 200, "long"), make_batch(storage, 10, "short"), at_once=2)
    assert "long" in order[order.index("short") + 30 :]
    assert max(index for index, owner in enumerate(order) if owner == "short") < 100


def test_refusals_for_now_are_tried_again_until_they_are_answered(storage: Storage) -> None:
    refused: dict[bytes, int] = {}

    async def ask(owner: str, endpoint: str, body: bytes) -> Answer:
        refused[body] = refused.get(body, 0) + 1
        codes = ["queue_full", "shutting_down", "queue_full", "engine_unavailable", "engine_unavailable"]
        if refused[body] <= len(codes):
            return refusal(codes[refused[body] - 1], 503 if refused[body] % 2 == 0 else 429)
        return await echo(owner, endpoint, body)

    (ended,) = run(storage, ask, make_batch(storage, 3))
    assert (ended.counts.completed, ended.counts.failed) == (3, 0)


@pytest.mark.parametrize(("code", "most"), [("engine_unavailable", 3), ("rate_limit_exceeded", 100)])
def test_what_is_refused_again_and_again_is_given_up(storage: Storage, code: str, most: int) -> None:
    tries = 0

    async def ask(owner: str, endpoint: str, body: bytes) -> Answer:
        nonlocal tries
        if json.loads(body) != {"n": 0}:
            return await echo(owner, endpoint, body)
        tries += 1
        return refusal(code)

    (ended,) = run(storage, ask, make_batch(storage, 3))
    assert (ended.status, ended.counts.completed, ended.counts.failed) == ("completed", 2, 1)
    assert lines_of(storage, ended, ended.error_file_id).keys() == {"r0"}
    assert tries == most


def test_what_waits_for_its_key_holds_up_no_others(storage: Storage) -> None:
    async def ask(owner: str, endpoint: str, body: bytes) -> Answer:
        return refusal("queue_full") if owner == "slow" else await echo(owner, endpoint, body)

    make_batch(storage, 50, "slow")
    other = make_batch(storage, 20, "other")
    (ended,) = run(storage, ask, other, at_once=2)
    assert ended.counts.completed == 20


def test_a_batch_ends_with_its_window(storage: Storage) -> None:
    batch = make_batch(storage, 6)

    async def ask(owner: str, endpoint: str, body: bytes) -> Answer:
        if json.loads(body)["n"] < 2:
            return await echo(owner, endpoint, body)
        if json.loads(body)["n"] == 2:
            expired = int(time.time()) - 1
            storage.batches.change(batch.id, lambda now: msgspec.structs.replace(now, expires_at=expired))
        await asyncio.Event().wait()
        raise AssertionError

    (ended,) = run(storage, ask, batch)
    assert ended.status == "expired"
    assert lines_of(storage, ended, ended.output_file_id).keys() == {"r0", "r1"}
    left = lines_of(storage, ended, ended.error_file_id)
    assert left.keys() == {"r2", "r3", "r4", "r5"}
    assert {each["error"]["code"] for each in left.values()} == {"batch_expired"}
    assert {each["response"] for each in left.values()} == {None}


def test_a_batch_whose_results_would_be_too_large_ends(storage: Storage) -> None:
    async def ask(owner: str, endpoint: str, body: bytes) -> Answer:
        await asyncio.sleep(0.002)
        return answer(200, [await echo(owner, endpoint, body) and "x" * 100_000])

    (ended,) = run(storage, ask, make_batch(storage, 1000))
    assert ended.status == "failed" and ended.problems[0].code == "storage_full"
    assert 9 <= ended.counts.completed < 100
    assert len(lines_of(storage, ended, ended.output_file_id)) == ended.counts.completed


def test_a_batch_of_a_key_that_is_gone_ends(storage: Storage) -> None:
    async def ask(owner: str, endpoint: str, body: bytes) -> Answer:
        if json.loads(body)["n"] == 3:
            raise OwnerGone
        return await echo(owner, endpoint, body)

    (ended,) = run(storage, ask, make_batch(storage, 10), at_once=1)
    assert ended.status == "failed" and ended.problems[0].code == "invalid_api_key"
    assert ended.counts.completed == 3


POINTS = ["batch.Batches.change", "files.Files.adopt", "folder.DataFolder.move", "results.Results.add_answer"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_server_that_ends_anywhere_does_nothing_twice_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, before: bool
) -> None:
    """Whatever call is the last one: the next server ends the batch with every request answered once."""
    from stellarbyte_server.batch.batches import Batches
    from stellarbyte_server.batch.files import Files
    from stellarbyte_server.batch.folder import DataFolder
    from stellarbyte_server.batch.results import Results

    owner = {"Batches": Batches, "Files": Files, "DataFolder": DataFolder, "Results": Results}[point.split(".")[1]]
    name = point.split(".")[2]
    monkeypatch.setattr(runner_module, "LOOK_S", 0.01)
    monkeypatch.setattr(runner_module, "_RETRY_S", 3600)
    real = getattr(owner, name)
    for last in range(8):
        folder = str(tmp_path / str(last))
        os.close(claim_folder(folder))
        storage = Storage.open(folder, LIMITS)
        batch = make_batch(storage, 3)
        asked: list[bytes] = []

        async def ask(owner: str, endpoint: str, body: bytes, asked: list[bytes] = asked) -> Answer:
            asked.append(body)
            return await echo(owner, endpoint, body)

        calls, has_stopped = 0, False

        def stopping(*args: object, last: int = last, **others: object) -> object:
            nonlocal calls, has_stopped
            calls += 1
            if has_stopped or (before and calls == last + 1):
                has_stopped = True
                raise OSError("the process ended here")
            result = real(*args, **others)
            if calls == last + 1:
                has_stopped = True
                raise OSError("the process ended here")
            return result

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, stopping)
            run(storage, ask, batch, at_once=1, has_stopped=lambda: has_stopped)  # noqa: B023
        storage.close()
        # The next server, with what this one has left:
        os.close(claim_folder(folder))
        again = Storage.open(folder, LIMITS)
        (ended,) = run(again, ask, batch)
        assert (ended.status, ended.counts.completed, ended.counts.failed) == ("completed", 3, 0)
        assert lines_of(again, ended, ended.output_file_id).keys() == {"r0", "r1", "r2"}
        assert len(asked) <= 4, "only what was in flight is asked again"
        assert not list((tmp_path / str(last) / "work").iterdir())
        again.close()


def test_expired_files_and_old_batches_are_removed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(storage, 1)
    (ended,) = run(storage, echo, batch)
    waiting = make_batch(storage, 1)
    now, day_s = time.time(), 86_400
    for days, is_left, is_remembered in ((0, True, True), (1, False, True), (32, False, False)):
        monkeypatch.setattr(time, "time", lambda days=days: now + days * day_s)
        storage.remove_old()
        for file_id in (batch.input_file_id, ended.output_file_id):
            assert (storage.files.find("", file_id, even_expired=True) is not None) == is_left
        assert (storage.batches.find(batch.id) is not None) == is_remembered
        assert storage.batches.find(waiting.id) and storage.files.find("", waiting.input_file_id, even_expired=True)
    assert storage.files.find("", waiting.input_file_id) is None, "it has expired for all but its batch"
    assert storage.folder.names("files") == [waiting.input_file_id]
