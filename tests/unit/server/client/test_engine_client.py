"""The client and the engine process, over the real protocol, around a scripted engine."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from stellarbyte_server.client import heartbeats, progress
from stellarbyte_server.client.engine_client import EngineClient, EngineDead
from stellarbyte_server.client.launch import EngineProcess, EngineStartError
from stellarbyte_server.client.restart import AttachedEngine, EngineEnded, EngineGone
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.loop import PEER_SILENCE_LIMIT_S
from stellarbyte_server.protocol.request import RequestRejected
from tests.support.engines.engine_client import a_request, read, until
from tests.support.servers.fake_engine import CRASH, HANG, LONG, REJECT, SLOW, make_model_folder
from tests.support.servers.server_process import ROOT


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """The engine process finds the tests package from here."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def settings(tmp_path) -> EngineSettings:
    return EngineSettings(model=str(make_model_folder(tmp_path / "model")))


def with_engine(settings: EngineSettings, use) -> None:
    """Run `use(client, process)` against a fresh engine process."""

    async def run() -> None:
        process = EngineProcess(settings, "warning", "tests.support.servers.fake_engine")
        try:
            client = EngineClient(process)
            await client.start()
            try:
                await use(client, process)
            finally:
                await client.close()
        finally:
            process.stop()

    asyncio.run(asyncio.wait_for(run(), 120))


def test_many_streams_at_once_get_their_own_text(settings):
    async def use(client, _):
        async def one(i: int) -> None:
            text = f"request {i} "
            (stream,) = await client.submit(a_request(text, f"r{i}", max_tokens=3 * len(text)))
            answer, deltas = await read(stream)
            assert answer == text * 3
            assert sum(delta.num_tokens for delta in deltas) == 3 * len(text)
            assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]

        await asyncio.gather(*(one(i) for i in range(50)))
        await until(lambda: client.stats.num_running == 0)
        assert client.stats.num_blocks_used == 0

    with_engine(settings, use)


def test_a_reader_that_lags_gets_one_merged_delta(settings):
    async def use(client, _):
        (stream,) = await client.submit(a_request("abc", max_tokens=30))
        await until(lambda: client.stats.generation_tokens_total == 30)
        answer, deltas = await read(stream)
        assert (answer, len(deltas), deltas[0].num_tokens) == ("abc" * 10, 1, 30)

    with_engine(settings, use)


def test_a_refused_request_says_why(settings):
    async def use(client, _):
        with pytest.raises(RequestRejected, match="does not want this") as refusal:
            await client.submit(a_request(REJECT))
        assert (refusal.value.code, refusal.value.param) == ("unwanted", "prompt")

    with_engine(settings, use)


def test_closing_a_stream_frees_what_the_request_held(settings):
    async def use(client, _):
        (stream,) = await client.submit(a_request(SLOW, max_tokens=100_000))
        await anext(stream)
        assert client.stats.num_blocks_used == 1
        stream.close()
        await until(lambda: client.stats.num_blocks_used == 0)

    with_engine(settings, use)


def test_a_failing_step_ends_every_stream_and_the_process(settings):
    async def use(client, _):
        (healthy,) = await client.submit(a_request(SLOW, "healthy", max_tokens=100_000))
        await anext(healthy)
        (failing,) = await client.submit(a_request(CRASH, "failing"))
        for stream in (healthy, failing):
            _, deltas = await read(stream)
            assert deltas[-1].finish_reason == "error"
            assert "told to crash" not in deltas[-1].error
        await asyncio.wait_for(client.dead.wait(), 30)
        assert client.health() == "The engine process ended."
        with pytest.raises(EngineDead):
            await client.submit(a_request("late"))

    with_engine(settings, use)


def test_a_killed_engine_ends_every_stream_within_a_second(settings):
    async def use(client, process):
        (stream,) = await client.submit(a_request(SLOW, max_tokens=100_000))
        await anext(stream)
        waiting = asyncio.create_task(client.submit(a_request("never accepted", "w")))
        os.kill(process.process_id, signal.SIGSTOP)
        await asyncio.sleep(0.05)
        os.kill(process.process_id, signal.SIGKILL)
        killed_at_s = time.monotonic()
        _, deltas = await read(stream)
        assert deltas[-1].finish_reason == "error"
        assert time.monotonic() - killed_at_s < 1
        await asyncio.gather(waiting, return_exceptions=True)

    with_engine(settings, use)


def test_an_engine_that_makes_no_progress_is_reported(settings, monkeypatch):
    monkeypatch.setattr(progress, "STALL_LIMIT_S", 2.0)

    async def use(client, process):
        await asyncio.sleep(2.5)
        assert client.health() is None, "an idle engine is healthy"
        await read((await client.submit(a_request("a first step", "first")))[0])
        submitting = asyncio.create_task(client.submit(a_request(HANG)))
        await until(lambda: client.health() is not None)
        assert "requests are waiting" in client.health()
        with pytest.raises(EngineDead, match="requests are waiting"):  # a queue that nobody reads has no limits
            await client.submit(a_request("one more", "late"))
        os.kill(process.process_id, signal.SIGKILL)
        with pytest.raises(EngineDead):
            await submitting

    with_engine(settings, use)


def test_a_first_step_may_take_longer_than_others(settings, monkeypatch):
    """It may compile kernels: a supervisor that restarts what stands still must not restart that for ever."""
    monkeypatch.setattr(progress, "STALL_LIMIT_S", 0.5)
    monkeypatch.setattr(progress, "FIRST_STEP_LIMIT_S", 3.0)

    async def use(client, process):
        submitting = asyncio.create_task(client.submit(a_request(HANG)))
        await asyncio.sleep(2)
        assert client.health() is None
        await until(lambda: client.health() is not None)
        os.kill(process.process_id, signal.SIGKILL)
        with pytest.raises(EngineDead):
            await submitting

    with_engine(settings, use)


def test_an_engine_that_falls_silent_without_work_is_reported_as_that(settings, monkeypatch):
    monkeypatch.setattr(progress, "STALL_LIMIT_S", 2.0)

    async def use(client, process):
        await read((await client.submit(a_request("a first step")))[0])
        os.kill(process.process_id, signal.SIGSTOP)
        try:
            await until(lambda: client.health() is not None)
            assert "not sent a message" in client.health()
        finally:
            os.kill(process.process_id, signal.SIGCONT)
        await until(lambda: client.health() is None)

    with_engine(settings, use)


def test_what_two_clients_see_adds_up_and_is_known_although_the_engine_hangs(settings):
    async def use(client, process):
        second = EngineClient(AttachedEngine(client.info, process.endpoint))
        await second.start()
        try:
            await read((await client.submit(a_request("one", "1")))[0])
            await read((await second.submit(a_request("two", "2")))[0])
            for each in (client, second, second):
                each.observer.note_rejected("queue_full")
            await asyncio.sleep(0.3)  # they tell by themselves
            totals = await client.fresh_totals()
            assert totals.rejected == {"queue_full": 3}
            assert totals.first_token_s.num_values == 2
            assert 2 <= totals.stream_lag_s.num_values <= 20
            hanging = asyncio.create_task(client.submit(a_request(HANG)))
            await asyncio.sleep(0.5)
            assert await client.fresh_totals() == await second.fresh_totals() == totals
            hanging.cancel()
            await asyncio.gather(hanging, return_exceptions=True)
        finally:
            await second.close()

    with_engine(settings, use)


def test_totals_are_known_from_the_start_although_nobody_has_asked(settings):
    async def use(client, process):
        await until(lambda: client.totals is not None)
        os.kill(process.process_id, signal.SIGSTOP)
        try:
            assert (await client.fresh_totals()).finished == {"stop": 0, "length": 0}
        finally:
            os.kill(process.process_id, signal.SIGCONT)

    with_engine(settings, use)


def test_requests_of_a_client_that_falls_silent_are_dropped_and_it_hears_of_it(settings):
    async def use(client, _):
        (stream,) = await client.submit(a_request(SLOW, max_tokens=100_000))
        client._heartbeats.stop()
        for task in client._tasks:
            task.cancel()
        await asyncio.sleep(5.5)
        client._tasks = [asyncio.create_task(client._read())]
        await client.fresh_totals()  # it speaks again
        _, deltas = await read(stream)
        assert deltas[-1].finish_reason == "error"
        await until(lambda: client.stats.num_running == 0)

    with_engine(settings, use)


def test_streams_of_a_client_whose_event_loop_is_held_up_go_on(settings):
    """For longer than a client may be silent: a large body, a library that sleeps."""

    async def use(client, _):
        (stream,) = await client.submit(a_request(SLOW, max_tokens=400))
        time.sleep(PEER_SILENCE_LIMIT_S + 1)
        text, deltas = await read(stream)
        assert deltas[-1].finish_reason == "length" and text == SLOW * (400 // len(SLOW))

    with_engine(settings, use)


@pytest.mark.slow
def test_an_event_loop_that_does_not_turn_for_long_is_found(settings, monkeypatch):
    monkeypatch.setattr(heartbeats, "LOOP_LIMIT_S", 1.0)

    async def use(client, _):
        (stream,) = await client.submit(a_request(SLOW, max_tokens=100_000))
        time.sleep(PEER_SILENCE_LIMIT_S + 2.5)
        _, deltas = await read(stream)
        assert deltas[-1].finish_reason == "error"

    with_engine(settings, use)


@pytest.mark.slow
def test_a_step_longer_than_a_client_may_be_silent_drops_nothing(settings):
    """A cold model's first step took six seconds; heartbeats sent meanwhile were missed before they were read."""

    async def use(client, _):
        _, deltas = await read((await client.submit(a_request(LONG, max_tokens=1)))[0])
        assert deltas[-1].finish_reason == "length"

    with_engine(settings, use)


def test_a_second_client_has_its_own_streams_and_the_same_figures_and_sees_the_engine_end(settings):
    async def use(client, process):
        attached = AttachedEngine(client.info, process.endpoint)
        second = EngineClient(attached)
        await second.start()
        try:
            await second.fresh_totals()
            own, others = await asyncio.gather(
                client.submit(a_request("one", "1", max_tokens=300)), second.submit(a_request("two", "2"))
            )
            assert [(await read(stream))[0] for (stream,) in (own, others)] == ["one" * 100, "twotwotwot"]
            await client.fresh_totals()  # what it saw of the answer is told, too
            totals = await second.fresh_totals()
            assert totals == await client.fresh_totals()
            assert totals.finished == {"length": 2, "stop": 0} and totals.first_token_s.num_values == 2
            assert second.stats.generation_tokens_total == 310
            os.kill(process.process_id, signal.SIGKILL)
            attached.hear(EngineEnded())
            attached.hear(EngineGone())
            await asyncio.wait_for(asyncio.gather(client.dead.wait(), second.dead.wait()), 2)
        finally:
            await second.close()

    with_engine(settings, use)


def test_totals_that_another_client_asked_for_do_not_stand_for_ones_own(settings):
    async def use(client, process):
        second = EngineClient(AttachedEngine(client.info, process.endpoint))
        await second.start()

        async def ask_always():
            while True:
                await second.fresh_totals()

        asking = asyncio.create_task(ask_always())
        try:
            for count in range(1, 201):
                client.observer.note_rejected("timeout")
                assert (await client.fresh_totals()).rejected == {"timeout": count}
        finally:
            asking.cancel()
            await second.close()

    with_engine(settings, use)


def test_an_engine_that_cannot_start_says_why():
    async def use(*_):
        raise AssertionError("it started")

    with pytest.raises(EngineStartError, match="there is no model folder /no/such/folder"):
        with_engine(EngineSettings(model="/no/such/folder"), use)


def test_an_engine_that_dies_while_loading_is_noticed():
    async def run() -> None:
        process = EngineProcess(EngineSettings(model="any"), "warning", "tests.no_such_module")
        try:
            await EngineClient(process).start()
        finally:
            process.stop()

    with pytest.raises(EngineStartError, match="ended while it loaded"):
        asyncio.run(asyncio.wait_for(run(), 120))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_never_outlives_its_parent(settings, signal_number):
    code = (
        "import sys, time; from stellarbyte_server.client.launch import EngineProcess;"
        "from stellarbyte_server.config.settings import EngineSettings;"
        f"p = EngineProcess(EngineSettings(model={settings.model!r}), 'warning', 'tests.support.servers.fake_engine');"
        "print(p.process_id, p._folder, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    engine_pid, folder = parent.stdout.readline().split()
    time.sleep(1)  # it is past reading its settings
    os.kill(int(engine_pid), 0)
    parent.send_signal(signal_number)
    parent.communicate()
    deadline_s = time.monotonic() + 60
    while os.path.exists(folder) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not os.path.exists(folder)
