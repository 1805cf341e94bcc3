"""Events of the KV cache: who follows them over ZeroMQ knows which blocks the engine has, and what they hold."""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stellarbyte_server.engine.events.form import CacheKind, hash_of
from stellarbyte_server.engine.events.publisher import EventAddresses, EventPublisher, EventsAddressError
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.cache_log import BlockOrigin, CacheLog, StoredBlock
from stellarbyte_server.engine.state.sequence import Sequence
from tests.support.clients.event_subscriber import EventSubscriber
from tests.support.engines.engine import is_complete, make_request, make_scheduler
from tests.support.engines.symbolic_cache import SymbolicRunner
from tests.support.servers.server_process import free_port

ADAPTERS = [
    None,
    AdapterVersion(name="x", files=None, content_hash="old"),
    AdapterVersion(name="x", files=None, content_hash="new"),
    AdapterVersion(name="y", files=None, content_hash="of y"),
]
KIND = CacheKind(medium="CPU", window=None)


@contextmanager
def publishing(
    log: CacheLog, kind: CacheKind = KIND, **options: int
) -> Iterator[tuple[EventPublisher, EventSubscriber]]:
    """A publisher that has not started, and its subscriber."""
    rank = options.pop("rank", 0)
    first, second = free_port(), free_port()
    addresses = [f"tcp://127.0.0.1:{port - rank}" for port in (first, second)]
    publisher = EventPublisher(
        log, kind, EventAddresses(publish=addresses[0], replay=addresses[1], topic="kv", rank=rank), **options
    )
    subscriber = EventSubscriber(f"tcp://127.0.0.1:{first}", f"tcp://127.0.0.1:{second}", b"kv")
    try:
        yield publisher, subscriber
    finally:
        subscriber.close()
        publisher.close()


def random_sequence(scheduler: Scheduler, numbers: random.Random) -> Sequence:
    """A prompt that begins like others, with an adapter, a scale and a salt or without."""
    adapter = numbers.choice(ADAPTERS)
    beginning = [numbers.randrange(2) * 7] * numbers.randrange(1, 40)
    prompt = beginning + [numbers.randrange(2) for _ in range(numbers.randrange(20))]
    request = make_request(
        prompt,
        numbers.randrange(1, 20),
        cache_salt=numbers.choice(["", "mine"]),
        adapter=None if adapter is None else adapter.name,
        adapter_scale=1.0 if adapter is None else numbers.choice([1.0, 0.5]),
    )
    return scheduler.add(request, adapter)


def first_keys(sequence: Sequence) -> list[object] | None:
    adapter, salt = sequence.adapter, sequence.request.cache_salt
    keys = [] if adapter is None else [adapter.name, adapter.content_hash, sequence.request.adapter_scale]
    return [*keys, *([salt] if salt else [])] or None


def step(scheduler: Scheduler, runner: SymbolicRunner, numbers: random.Random) -> None:
    chunks = scheduler.schedule()
    for sequence, _ in scheduler.apply(chunks, runner.run(chunks)):
        if is_complete(sequence):
            scheduler.remove(sequence, keep_content=numbers.random() > 0.1)  # sometimes as after a fault
        elif numbers.random() < 0.02:
            scheduler.remove(sequence)
        elif sequence.is_running and sequence.num_generated > 3 and numbers.random() < 0.05:
            scheduler.rewind(sequence, numbers.randrange(1, 4))


@pytest.mark.parametrize(("window", "sinks", "block_size"), [(None, 0, 4), (None, 6, 4), (13, 0, 5), (20, 3, 4)])
def test_a_subscriber_knows_the_blocks_of_the_engine_after_a_random_run(
    window: int | None, sinks: int, block_size: int
) -> None:
    numbers = random.Random(7)
    scheduler = make_scheduler(num_blocks=40, block_size=block_size, window=window, sink_tokens=sinks, max_num_seqs=6)
    log = scheduler.pool.log = CacheLog()
    runner = SymbolicRunner(scheduler.layout)
    with publishing(log, CacheKind(medium="GPU", window=window)) as (publisher, subscriber):
        publisher.start()
        for _ in range(25):
            for _ in range(numbers.randrange(1, 6)):
                random_sequence(scheduler, numbers)
            while scheduler.has_work:
                step(scheduler, runner, numbers)
                publisher.flush()
            subscriber.follow(publisher.num_batches)
            assert set(subscriber.blocks) == {hash_of(key) for key in scheduler.pool._block_of}
        if window is None:  # else a later part of a sequence may be cached without the one before it
            _check_forecasts(scheduler, runner, subscriber, numbers, publisher)
        stored = [event for event in subscriber.seen if event["type"] == "BlockStored"]
        kinds = {(event["kv_cache_spec_kind"], event.get("kv_cache_spec_sliding_window")) for event in stored}
        assert kinds == {("full_attention", None) if window is None else ("sliding_window", window)}
        assert {(event["medium"], event["group_idx"]) for event in subscriber.seen[1:]} == {("GPU", 0)}
        assert (window is not None or scheduler.totals.num_preemptions > 0) and any(
            len(event["block_hashes"]) > 2 for event in stored
        )
        assert "BlockRemoved" in {event["type"] for event in subscriber.seen}


def _check_forecasts(
    scheduler: Scheduler,
    runner: SymbolicRunner,
    subscriber: EventSubscriber,
    numbers: random.Random,
    publisher: EventPublisher,
) -> None:
    """The cached tokens of new requests are those that the events foretell."""
    forecasts = []
    for _ in range(60):
        subscriber.follow(publisher.num_batches)
        sequence = random_sequence(scheduler, numbers)
        tokens = sequence.tokens.tolist()
        name = None if sequence.adapter is None else sequence.adapter.name
        forecast = subscriber.cached_tokens(tokens[:-1], name, first_keys(sequence))
        step(scheduler, runner, random.Random(1))
        assert sequence.num_cached == forecast
        forecasts.append(forecast)
        while scheduler.has_work:
            step(scheduler, runner, numbers)
        publisher.flush()
    assert max(forecasts) >= 8 and 0 in forecasts


def changes(number: int) -> StoredBlock:
    origin = BlockOrigin(adapter=None, adapter_hash="", adapter_scale=1.0, salt="")
    return StoredBlock(number.to_bytes(32, "big"), None, make_tokens(number), origin)


def make_tokens(number: int) -> "memoryview[int]":
    return Sequence(
        request=make_request([number] * 4),
        table=None,
        rank=(0.0, 0),
        arrived_s=0.0,  # type: ignore[arg-type]
    ).tokens


def test_what_finds_the_queue_full_is_a_gap_in_the_numbers_and_counted() -> None:
    log = CacheLog()
    with publishing(log, max_queued=3) as (publisher, subscriber):
        for number in range(5):  # nothing is sent yet, and no call waits
            log.add(changes(number))
            publisher.flush()
        assert (publisher.num_batches, publisher.num_dropped) == (6, 3)
        publisher.start()
        subscriber.follow(3)
        log.add(changes(9))
        publisher.flush()
        received: list[int] = []
        while not received or received[-1] != 6:
            received = [number for number, _ in subscriber.ask_again(0)]
        assert received == [0, 1, 2, 6]
        assert set(subscriber.blocks) == {0, 1}


def test_a_replay_begins_where_it_is_asked_to() -> None:
    log = CacheLog()
    with publishing(log, rank=3) as (publisher, subscriber):
        publisher.start()
        publisher.flush()  # nothing has changed
        for number in range(5):
            log.add(changes(number))
            publisher.flush()
        subscriber.follow(6)
        assert [number for number, _ in subscriber.ask_again(4)] == [4, 5]
        assert list(subscriber.ask_again(6)) == []
        assert subscriber.seen[0] == {"type": "AllBlocksCleared"} and subscriber.ranks == {3}


def test_an_address_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            EventsAddressError, match=f"--kv-events: cannot listen on {address}: Address already in use"
        ):
            EventPublisher(CacheLog(), KIND, EventAddresses(publish=address))
        spare = f"tcp://127.0.0.1:{free_port()}"
        with pytest.raises(EventsAddressError, match="--kv-events-replay"):
            EventPublisher(CacheLog(), KIND, EventAddresses(publish=spare, replay=address))
