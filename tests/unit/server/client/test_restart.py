"""An engine that fails is replaced, so often and no more; what its owner tells reaches those who serve with it."""

import asyncio
import dataclasses
import os
import signal

import msgspec
import pytest

from stellarbyte_server.client import progress
from stellarbyte_server.client.engine_client import EngineClient, EngineDead
from stellarbyte_server.client.http_observations import SENT_AFTER_S
from stellarbyte_server.client.launch import EngineProcess, EngineStartError
from stellarbyte_server.client.replicas.replicas import Replicas
from stellarbyte_server.client.restart import (
    STEADY_AFTER_S,
    AttachedEngine,
    EngineEnded,
    EngineGone,
    EngineNews,
    EngineRestarted,
    RestartingEngine,
    restarts_left,
    serves_the_same,
)
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.observe.routing_metrics import cache_config
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters
from tests.support.engines.engine_client import a_request, read, until
from tests.support.servers.fake_engine import HANG, SLOW, build_fake_core, make_model_folder
from tests.support.servers.server_process import ROOT


@pytest.fixture
def settings(tmp_path, monkeypatch) -> EngineSettings:
    monkeypatch.chdir(ROOT)  # the engine process finds the tests package from here
    return EngineSettings(model=str(make_model_folder(tmp_path / "model")))


def test_restarts_are_counted_in_a_row() -> None:
    left, lives = 3, [0.0, 1.0, STEADY_AFTER_S, 1.0, 0.0, 5.0]
    for lived_s, expected in zip(lives, [2, 1, 2, 1, 0, -1], strict=True):
        left = restarts_left(left, 3, lived_s)
        assert left == expected
    assert restarts_left(0, 0, 1e9) == -1, "without the flag there is none, however long it ran"


def test_an_engine_with_other_weights_is_another(settings) -> None:
    _, info = build_fake_core(settings)
    assert serves_the_same(info, msgspec.structs.replace(info, num_blocks=7))
    for change in ({"weights_hash": "other"}, {"max_model_len": 1}, {"dtype": "bfloat16"}):
        assert not serves_the_same(info, msgspec.structs.replace(info, **change))


def with_restarts(settings, restarts: int, use) -> None:
    async def run() -> None:
        engine = RestartingEngine(
            lambda: EngineProcess(settings, "warning", "tests.support.servers.fake_engine"), restarts
        )
        told: list[str] = []
        try:
            client = EngineClient(engine, lambda news: told.append(type(news).__name__))
            await client.start()
            try:
                await use(client, engine, told)
            finally:
                await client.close()
        finally:
            engine.stop()

    asyncio.run(asyncio.wait_for(run(), 120))


async def answer_of(client: EngineClient, text: str) -> str:
    (stream,) = await client.submit(a_request(text))
    answer, deltas = await read(stream)
    assert deltas[-1].finish_reason == "length"
    return answer


def test_the_next_process_serves_and_what_was_in_flight_ends_with_an_error(settings) -> None:
    async def use(client, engine, told) -> None:
        for number in range(2):
            (stream,) = await client.submit(a_request(SLOW, f"s{number}", max_tokens=100_000))
            await anext(stream)
            os.kill(engine._process.process_id, signal.SIGKILL)
            _, deltas = await read(stream)
            assert deltas[-1].finish_reason == "error"
            await until(lambda: client.health() is not None)
            with pytest.raises(EngineDead):
                await client.submit(a_request("late"))
            client.observer.note_rejected("engine_unavailable")
            await asyncio.sleep(2 * SENT_AFTER_S)  # while there is no engine to tell
            await until(lambda: client.health() is None, 20)
            totals = await client.fresh_totals()
            assert totals.rejected == {"engine_unavailable": 1}, "of this process: the count of the one before is gone"
            assert await answer_of(client, "again") == "againagain"
            assert client.stats.num_running == 0
        (stream,) = await client.submit(a_request(SLOW, "last", max_tokens=100_000))
        os.kill(engine._process.process_id, signal.SIGKILL)
        await asyncio.wait_for(client.dead.wait(), 30)
        assert told == ["EngineEnded", "EngineRestarted"] * 2 + ["EngineEnded", "EngineGone"]

    with_restarts(settings, 2, use)


def test_a_process_that_makes_no_progress_is_replaced(settings, monkeypatch) -> None:
    monkeypatch.setattr(progress, "STALL_LIMIT_S", 2.0)

    async def use(client, _, told) -> None:
        assert await answer_of(client, "once") == "onceonceon"  # the first step may take longer
        await asyncio.sleep(3.5)
        assert told == [], "an idle engine is left alone"
        with pytest.raises(EngineDead):
            await client.submit(a_request(HANG))
        await until(lambda: client.health() is None, 20)
        assert await answer_of(client, "again") == "againagain"

    with_restarts(settings, 1, use)


def test_a_process_that_cannot_start_again_counts_and_the_engine_is_gone_after_the_last(settings) -> None:
    async def use(client, engine, told) -> None:
        starts = []

        def fail() -> EngineProcess:
            starts.append(1)
            raise EngineStartError("no")

        engine._start = fail
        os.kill(engine._process.process_id, signal.SIGKILL)
        await asyncio.wait_for(client.dead.wait(), 30)
        assert len(starts) == 3 and told == ["EngineEnded", "EngineGone"]

    with_restarts(settings, 3, use)


def test_a_process_that_serves_another_model_ends_the_engine(settings, caplog) -> None:
    async def use(client, engine, _) -> None:
        other = EngineSettings(model=settings.model, max_model_len=77)
        engine._start = lambda: EngineProcess(other, "warning", "tests.support.servers.fake_engine")
        os.kill(engine._process.process_id, signal.SIGKILL)
        await asyncio.wait_for(client.dead.wait(), 30)
        assert "files have changed" in caplog.text

    with_restarts(settings, 5, use)


def test_a_process_with_another_cache_tells_its_blocks_to_every_process(settings, tmp_path) -> None:
    """The first owns the engine, the second is a worker that hears of it."""

    async def run() -> None:
        sizes = iter((100, 70))

        def start() -> EngineProcess:
            sized = dataclasses.replace(settings, kv_cache_memory=next(sizes))
            return EngineProcess(sized, "warning", "tests.support.servers.fake_engine")

        engine = RestartingEngine(start, 1)
        news: list[EngineNews] = []
        owner = Replicas([engine], tmp_path, news.append)
        try:
            await owner.start(RecordedAdapters)
            assert owner.info.num_blocks == 100
            attached = AttachedEngine(owner.info, engine.endpoint)
            worker = Replicas([attached], tmp_path)
            await worker.start(RecordedAdapters)
            os.kill(engine._process.process_id, signal.SIGKILL)
            await until(lambda: len(news) == 2, 20)
            for each in news:
                attached.hear(each)
            await until(lambda: worker.info.num_blocks != 100, 20)
            assert owner.info.num_blocks == worker.info.num_blocks == 70
            assert cache_config(worker.info, settings)["num_gpu_blocks"] == "70"
            await worker.close()
            await owner.close()
        finally:
            engine.stop()

    asyncio.run(asyncio.wait_for(run(), 120))


def test_an_attached_engine_follows_what_it_is_told(settings) -> None:
    async def run() -> None:
        _, info = build_fake_core(settings)
        engine = AttachedEngine(info, "first")
        for news in (EngineEnded(), EngineRestarted("second", 7), EngineEnded(), EngineGone()):
            engine.hear(news)
        await engine.ended()
        assert await engine.restarted() == msgspec.structs.replace(info, num_blocks=7)
        assert engine.endpoint == "second"
        await engine.ended()
        assert await engine.restarted() is None

    asyncio.run(asyncio.wait_for(run(), 5))
