"""Blocks that come back from memory and disk: each has the content of its key, and requests get their tokens."""

import errno
import logging
import os
import random
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from stellarbyte_server.engine.offload import offload as offload_module
from stellarbyte_server.engine.offload.block_folder import BlockFolder
from stellarbyte_server.engine.state.sequence import Sequence
from tests.support.cases import each_pair_once
from tests.support.engines.engine import generated, is_complete, make_request
from tests.support.engines.symbolic_cache import continuation
from tests.support.tiers.offload_engine import Engines, OffloadEngine, run_one
from tests.support.tools.readable import readable

W = 12


def test_a_chat_returns_after_its_blocks_were_evicted(make_engine: Engines) -> None:
    engine = make_engine()
    chat = run_one(engine, [1] * 50)
    engine.wait_stored()
    engine.forget_pool()
    returned = run_one(engine, [*chat.tokens, 2])
    assert returned.num_cached == 52  # all full blocks but for the token that is only sampled: as from the pool
    assert engine.offload.totals.num_memory_loads == 13
    assert engine.scheduler.loading.num_loaded_tokens == 52
    assert engine.scheduler.totals.prefix_hits == 52
    assert engine.scheduler.pool.num_used == 0


def test_a_chat_returns_after_a_restart(make_engine: Engines, tmp_path: Path) -> None:
    first = make_engine(tmp_path)
    chat = run_one(first, [1] * 50)
    first.wait_stored()
    second = make_engine(tmp_path)
    returned = run_one(second, [*chat.tokens, 2])
    assert returned.num_cached == 52
    assert second.offload.totals.num_disk_loads == 13
    second.forget_pool()
    assert run_one(second, [*chat.tokens, 2]).num_cached == 52
    assert second.offload.totals.num_memory_loads == 13  # kept in memory since


def test_only_the_part_that_the_pool_lacks_is_loaded(make_engine: Engines) -> None:
    engine = make_engine(num_blocks=20)
    run_one(engine, [1] * 42, max_tokens=1)
    engine.wait_stored()
    run_one(engine, [0] * 60, max_tokens=1)  # takes the longest free blocks: the last ones of the chat
    assert run_one(engine, [1] * 42, max_tokens=1).num_cached == 40
    assert 0 < engine.offload.totals.num_memory_loads < 10


@pytest.mark.parametrize(
    ("field", "first", "second"), [("cache_salt", "a", "b"), ("cache_salt", "", "a"), ("cache_salt", "a", "")]
)
def test_salts_share_nothing(make_engine: Engines, tmp_path: Path, field: str, first: str, second: str) -> None:
    engine = make_engine(tmp_path)
    run_one(engine, [1] * 40, **{field: first})
    engine.wait_stored()
    restarted = make_engine(tmp_path)
    assert run_one(restarted, [1] * 40, **{field: second}).num_cached == 0
    assert run_one(restarted, [1] * 40, **{field: first}).num_cached == 36


def test_another_model_finds_nothing(make_engine: Engines, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    run_one(engine, [1] * 40)
    engine.wait_stored()
    assert run_one(make_engine(tmp_path, identity=b"o" * 32), [1] * 40).num_cached == 0
    assert run_one(make_engine(tmp_path), [1] * 40).num_cached == 36


def test_damaged_files_are_computed_again(make_engine: Engines, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    run_one(engine, [1] * 40)
    engine.wait_stored()
    files = sorted(tmp_path.glob("*.kv"), key=lambda file: file.stat().st_mtime_ns)  # last blocks first: see `touch`
    assert len(files) == 10
    files[5].write_bytes(b"x")
    restarted = make_engine(tmp_path)
    returned = run_one(restarted, [1] * 40)
    assert returned.num_cached == 16  # up to the damaged one, the fifth
    assert restarted.scheduler.pool.num_used == 0


def test_a_full_disk_ends_writing_with_one_line(
    make_engine: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tmp_path)
    writes: list[bytes] = []

    def write(self: BlockFolder, key: bytes, content: object) -> bool:
        del self, content
        writes.append(key)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(BlockFolder, "write", write)
    with caplog.at_level(logging.WARNING):
        run_one(engine, [1] * 40)
        engine.wait_stored()
    assert len(writes) == len(caplog.records) == 1
    assert "--kv-offload-dir: writes no more blocks, since one failed: No space left on device" in caplog.text
    engine.forget_pool()
    assert run_one(engine, [1] * 40).num_cached == 36  # memory goes on


@pytest.mark.parametrize("is_copied", [True, False])
def test_a_block_that_lost_its_key_is_not_kept(make_engine: Engines, is_copied: bool) -> None:
    """Before the engine thread knows of its copy, which may have read what was written to the block afterwards."""
    engine, chat = make_engine(), [1] * 40
    with nullcontext() if is_copied else engine.paused():
        engine.scheduler.add(make_request(chat, 1))
        chunks = engine.scheduler.schedule()
        ((sequence, _),) = engine.scheduler.apply(chunks, engine.compute(chunks))
        engine.scheduler.remove(sequence)
        deadline_s = time.monotonic() + 30
        while is_copied and engine.offload._tasks:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        engine.forget_pool()
    engine.wait_stored()
    assert engine.offload.totals.num_memory_stores == 0 and engine.offload.totals.num_dropped == 10
    assert run_one(engine, chat).num_cached == 0


def test_content_of_a_failed_request_is_forgotten_everywhere(make_engine: Engines, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    sequence = engine.scheduler.add(make_request([1] * 40, 10))
    engine.step()
    engine.wait_stored()
    assert engine.offload.totals.num_disk_stores == 10 and list(tmp_path.glob("*.kv"))
    engine.scheduler.remove(sequence, keep_content=False)
    engine.wait_stored()
    assert not list(tmp_path.glob("*.kv"))
    assert run_one(engine, [1] * 40).num_cached == 0


def test_content_that_is_discarded_while_it_is_loaded_is_not_used(make_engine: Engines, tmp_path: Path) -> None:
    """It may have been read before the engine thread knew that it is wrong."""
    first = make_engine(tmp_path)
    run_one(first, [1] * 40)
    first.wait_stored()
    engine = make_engine(tmp_path)
    sequence = engine.scheduler.add(make_request([1] * 40, 3))
    assert engine.scheduler.schedule() == []
    assert readable([engine.offload.wake_up.fd], 10)  # all are filled, and the engine has not looked
    for key in sequence.keys.keys:
        engine.offload.discard(key)
    engine.run()
    assert sequence.num_cached == 0 and generated(sequence) == continuation(sequence.request)
    engine.wait_stored()
    assert run_one(make_engine(tmp_path), [1] * 40).num_cached == 36  # what was computed in their place


@pytest.mark.parametrize(
    ("copy", "message"), [("read", "could not be copied"), ("write", "could not be loaded")], ids=["copy", "load"]
)
def test_a_copy_that_fails_costs_only_itself(
    make_engine: Engines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, copy: str, message: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no copies")

    engine = make_engine()
    monkeypatch.setattr(engine.offload._copies, copy, fail)
    run_one(engine, [1] * 40)
    engine.wait_stored()
    engine.forget_pool()
    assert run_one(engine, [1] * 40).num_cached == 0
    assert message in caplog.text and engine.scheduler.pool.num_used == 0
    monkeypatch.undo()
    engine.forget_pool()
    run_one(engine, [1] * 40)
    engine.wait_stored()
    engine.forget_pool()
    assert run_one(engine, [1] * 40).num_cached == 36


def test_the_answer_of_an_endless_stream_leaves_only_its_window(make_engine: Engines, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, window=W, sink_tokens=4, max_model_len=10**6)
    stream = run_one(engine, [0] * 20, max_tokens=600)
    engine.wait_stored()
    assert len(list(tmp_path.glob("*.kv"))) <= 12  # prompt, sinks, last window
    restarted = make_engine(tmp_path, window=W, sink_tokens=4)
    assert run_one(restarted, [*stream.tokens, 1]).num_cached == 616


def test_the_first_blocks_of_a_chat_are_kept_longest(make_engine: Engines, tmp_path: Path) -> None:
    """Without them all later blocks would be of no use."""
    engine = make_engine(tmp_path, num_files=10)
    run_one(engine, [1] * 40, max_tokens=1)
    engine.wait_stored()
    run_one(engine, [2] * 16, max_tokens=1)
    engine.wait_stored()
    restarted = make_engine(tmp_path, num_files=10)
    assert run_one(restarted, [1] * 40, max_tokens=1).num_cached == 24
    assert run_one(restarted, [2] * 17, max_tokens=1).num_cached == 16


def test_running_requests_go_on_while_blocks_are_loaded(make_engine: Engines) -> None:
    engine = make_engine()
    chat = run_one(engine, [1] * 50)
    engine.wait_stored()
    engine.forget_pool()
    stream = engine.scheduler.add(make_request([0] * 5, 30, "stream"))
    engine.step()
    engine.wait_stored()
    with engine.paused():
        returned = engine.scheduler.add(make_request([*chat.tokens], 3, "returned"))
        for _ in range(2):
            assert [chunk.sequence for chunk in engine.step()] == [stream]
        assert returned.load is not None and engine.scheduler.num_blocked == 1
    engine.run()
    assert returned.num_cached == 52 and generated(returned) == continuation(returned.request)


def test_an_abort_while_loading_frees_all_blocks(make_engine: Engines) -> None:
    engine = make_engine()
    chat = run_one(engine, [1] * 50)
    engine.wait_stored()
    engine.forget_pool()
    with engine.paused():
        returned = engine.scheduler.add(make_request([*chat.tokens], 3))
        engine.scheduler.schedule()
        assert engine.scheduler.pool.num_used == 13
        engine.scheduler.remove(returned)
        assert engine.scheduler.pool.num_used == 0 and not engine.scheduler.has_work
    engine.wait_until(lambda: len(engine.scheduler.loading) == 0)
    assert engine.scheduler.pool.num_used == 0


def test_a_running_request_takes_blocks_from_a_load(make_engine: Engines) -> None:
    """Rather than being preempted for a request that waits."""
    engine = make_engine(num_blocks=20)
    run_one(engine, [1] * 41, max_tokens=1)
    engine.wait_stored()
    engine.forget_pool()
    stream = engine.scheduler.add(make_request([0] * 30, 45, "stream"))  # eight blocks at first, nineteen at last
    engine.step()
    engine.wait_stored()
    with engine.paused():
        returned = engine.scheduler.add(make_request([1] * 41, 1, "returned"))
        while not is_complete(stream):
            engine.step()
        assert stream.num_preemptions == 0 and returned.load is not None
    engine.run()
    for sequence in (stream, returned):
        assert generated(sequence) == continuation(sequence.request)
    assert engine.scheduler.pool.num_used == 0


def test_a_queue_that_is_full_drops_blocks(make_engine: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_module, "MAX_QUEUED_BLOCKS", 4)
    engine = make_engine()
    with engine.paused():
        run_one(engine, [1] * 40, max_tokens=1)
    engine.wait_stored()
    totals = engine.offload.totals
    assert (totals.num_memory_stores, totals.num_dropped) == (4, 6)
    engine.forget_pool()
    assert run_one(engine, [1] * 40, max_tokens=1).num_cached == 16


@pytest.mark.parametrize(
    ("window", "sinks", "num_slots", "num_files", "block_size"),
    each_pair_once([None, W], [0, 4], [3, 1000], [0, 20, 1000], [1, 4]),
)
def test_random_requests_against_what_each_position_must_hold(
    make_engine: Engines, tmp_path: Path, window: int | None, sinks: int, num_slots: int, num_files: int,
    block_size: int,
) -> None:  # fmt: skip
    """The runner compares every position that a query sees with its name. Chats return, fork and are cut short, pools
    run out, and an engine takes over the folder of one before."""
    chance = random.Random(f"{window} {sinks} {num_slots} {num_files} {block_size}")
    heads = [[chance.randrange(3) for _ in range(60)] for _ in range(4)]
    num_loads = num_cached = 0
    for _ in range(2):
        engine: OffloadEngine = make_engine(
            tmp_path if num_files else None, 100 // block_size, block_size, num_slots, num_files=max(1, num_files),
            window=window, sink_tokens=sinks if window else 0, max_num_batched_tokens=16, max_num_seqs=4,
            max_model_len=90,
        )  # fmt: skip
        sequences: list[Sequence] = []
        cut: set[Sequence] = set()
        for number in range(25):
            head = chance.choice(heads)[: chance.randint(1, 60)]
            request = make_request(
                head + [chance.randrange(3) for _ in range(chance.randint(0, 9))], chance.randint(1, 20), str(number),
                cache_salt=chance.choice(["", "", "x"]), priority=chance.randint(-1, 1),
            )  # fmt: skip
            sequences.append(engine.scheduler.add(request))
            for _ in range(chance.randint(0, 12)):
                if engine.scheduler.has_work:
                    engine.step()
            if number == 12:  # a slow thread of copies would leave nothing to load
                engine.wait_stored()
            if chance.random() < 0.2 and not (victim := chance.choice(sequences)).is_over:
                cut.add(victim)
                engine.scheduler.remove(victim, keep_content=chance.random() < 0.5)
        engine.run()
        engine.wait_until(lambda engine=engine: not len(engine.scheduler.loading))
        assert engine.scheduler.pool.num_used == 0
        for sequence in sequences:
            tokens, expected = generated(sequence), continuation(sequence.request)
            assert tokens == (expected[: len(tokens)] if sequence in cut else expected)
        engine.wait_stored()
        num_loads += engine.num_loads
        num_cached += engine.scheduler.totals.prefix_hits
    assert num_cached and (num_loads or num_slots == 3)
