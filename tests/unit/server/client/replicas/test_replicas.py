"""Several engine processes behind one client, around a scripted engine."""

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.client.launch import EngineProcess, EngineStartError
from stellarbyte_server.client.replicas.replicas import Replicas
from stellarbyte_server.client.restart import EngineRestarted
from stellarbyte_server.config.settings import EngineSettings
from tests.support.engines.engine_client import a_request, read, until
from tests.support.servers.fake_engine import SLOW, make_model_folder
from tests.support.servers.server_process import ROOT

FAKE_ENGINE = "tests.support.servers.fake_engine"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSettings:
    monkeypatch.chdir(ROOT)  # the engine processes find the tests package from here
    return EngineSettings(model=str(make_model_folder(tmp_path / "model")))


def test_if_one_engine_does_not_start_the_connections_to_the_others_are_closed(settings, tmp_path) -> None:
    async def run() -> None:
        engines = [EngineProcess(settings, "warning", module) for module in (FAKE_ENGINE, "tests.no_such_module")]
        replicas = Replicas(engines, tmp_path)
        try:
            await until(lambda: engines[1]._process.poll() is not None)
            with pytest.raises(EngineStartError):
                await replicas.start()
            contexts = [getattr(client, "_context", None) for client in replicas.clients]
            assert all(context is None or context.closed for context in contexts)
        finally:
            for engine in engines:
                engine.stop()

    asyncio.run(asyncio.wait_for(run(), 120))


def test_an_engine_may_be_restarted_before_another_has_started(tmp_path: Path) -> None:
    async def run() -> None:
        replicas = Replicas([EngineProcess.__new__(EngineProcess) for _ in range(2)], tmp_path)
        (record, _) = replicas._records
        record.client.info = SimpleNamespace(num_blocks=5)  # type: ignore[assignment]
        replicas._changes = SimpleNamespace(sync=lambda *_: asyncio.sleep(0))  # type: ignore[assignment]
        replicas._hear(EngineRestarted("second", 5, 0))
        assert record.endpoint == "second"
        await asyncio.gather(*replicas._tasks)

    asyncio.run(run())


def test_a_process_that_ends_as_it_gets_its_adapters_does_not_stand_for_the_next(tmp_path) -> None:
    async def run() -> None:
        replicas = Replicas([EngineProcess.__new__(EngineProcess) for _ in range(2)], tmp_path)
        (record, _) = replicas._records
        record.note_process("first")

        async def sync(client: object, endpoint: str) -> None:
            assert (client, endpoint) == (record.client, "first")
            record.note_process("second")

        replicas._changes = SimpleNamespace(sync=sync)  # type: ignore[assignment]
        await replicas._sync(record)
        assert not record.is_in_step

    asyncio.run(run())


def test_requests_are_spread_and_one_end_costs_its_streams_only(settings, tmp_path) -> None:
    async def run() -> None:
        engines = [EngineProcess(settings, "warning", FAKE_ENGINE) for _ in range(2)]
        replicas = Replicas(engines, tmp_path)
        try:
            await replicas.start()
            try:
                streams = [
                    (await replicas.submit(a_request(f"{SLOW} {number}", f"r{number}", max_tokens=60)))[0]
                    for number in range(8)
                ]
                assert [client.num_requests for client in replicas.clients] == [4, 4]
                os.kill(engines[1].process_id, signal.SIGKILL)
                ends = [(await read(stream))[1][-1].finish_reason for stream in streams]
                assert sorted(str(end) for end in ends) == ["error"] * 4 + ["length"] * 4
                assert (replicas.health(), replicas.degradation()) == (None, "1 of 2 replicas serve.")
                assert replicas.num_lost == 1
                totals = await replicas.fresh_totals()
                assert totals is not None and totals.stats.num_running == 0
                (stream,) = await replicas.submit(a_request("again"))
                assert (await read(stream))[0] == "againagain"
                counted = (await replicas.fresh_totals()).finished["length"]
                os.kill(engines[0].process_id, signal.SIGKILL)
                await asyncio.wait_for(replicas.dead.wait(), 30)
                with pytest.raises(EngineDead):
                    await replicas.submit(a_request("late"))
                assert replicas.health() is not None and replicas.degradation() is None
                assert sum(past.finished["length"] for past in replicas.past if past is not None) == counted == 5
            finally:
                await replicas.close()
        finally:
            for engine in engines:
                engine.stop()

    asyncio.run(asyncio.wait_for(run(), 120))
