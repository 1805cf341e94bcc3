"""An HTTP process that ends while it loads an adapter: the engine forgets the version and its pin."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.loop import EngineLoop
from stellarbyte_server.protocol.adapter_versions import SetVersions
from stellarbyte_server.protocol.messages import AdapterLoaded, Call, CallFailed, Event, LoadAdapter, Reply, Settled
from tests.support.engines.adapter_engine import AdapterEngine, stored
from tests.support.engines.engine_core import Script, make_core


class Engine:
    """A loop with the registry of an adapter engine, whose turns the test takes."""

    def __init__(self, folder: Path, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.registry = AdapterEngine(folder, num_slots=2)
        self.core: EngineCore = make_core(Script("a"), scheduler=self.registry.scheduler)
        self.core.adapters = self.registry.adapters
        self.endpoint = f"ipc://{folder}/engine"
        self._context = context
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.bind(self.endpoint)
        self._loop = EngineLoop(self.core, socket)

    def connect(self, peer_id: bytes) -> "zmq.Socket[bytes]":
        peer = self._context.socket(zmq.DEALER)
        peer.setsockopt(zmq.IDENTITY, peer_id)
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(self.endpoint)
        return peer

    def turn_until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline_s
            self._loop._take_commands()
            self._loop._answer_calls()
            self._loop._tell_stats(time.monotonic() + 60)  # as if the last news were long ago

    def call(self, peer: "zmq.Socket[bytes]", call: Call) -> Reply:
        """The answer to a peer's call."""
        replies: list[Reply] = []

        def is_answered() -> bool:
            while peer.poll(1):
                event = msgspec.msgpack.decode(peer.recv(), type=Event)
                replies.extend([event] if isinstance(event, Reply) else [])
            return bool(replies)

        peer.send(msgspec.msgpack.encode(call))
        self.turn_until(is_answered)
        return replies[0]

    def contents(self, name: str) -> set[str]:
        """Content hashes of the versions that the engine keeps of a name."""
        return {card.content_hash for card in self.registry.cards() if card.name == name}


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield Engine(folder, context)
    context.destroy(linger=0)


def pinned(name: str, path: str) -> LoadAdapter:
    return LoadAdapter(f"load {name} {path}", name, stored(path), in_place=True, pinned=True)


def test_what_an_ended_process_has_prepared_is_forgotten(engine: Engine) -> None:
    ended, other = engine.connect(b"ended"), engine.connect(b"other")
    assert isinstance(engine.call(ended, pinned("x", "a")), AdapterLoaded)
    refused = engine.call(other, pinned("y", "b"))  # one of two slots is left for those that are not pinned
    assert isinstance(refused, CallFailed) and refused.param == "pinned"
    ended.close()
    engine.turn_until(lambda: not engine.contents("x"))
    loaded = engine.call(other, pinned("y", "b"))
    assert isinstance(loaded, AdapterLoaded)
    assert isinstance(engine.call(other, SetVersions("set", "y", loaded.card.content_hash, pinned=True)), Settled)
    other.close()
    last = engine.connect(b"last")
    refused = engine.call(last, pinned("z", "c"))
    assert isinstance(refused, CallFailed) and refused.param == "pinned", "a pin that was set stays"
    assert engine.contents("y") == {loaded.card.content_hash}


def test_the_name_is_the_next_process_s_own(engine: Engine) -> None:
    """It may have the name before the engine knows of the end of the one before."""
    ended, other = engine.connect(b"ended"), engine.connect(b"other")
    assert isinstance(engine.call(ended, pinned("x", "a")), AdapterLoaded)
    loaded = engine.call(other, pinned("x", "b"))
    assert isinstance(loaded, AdapterLoaded)
    ended.close()
    engine.turn_until(lambda: b"ended" not in engine._loop._peers)
    assert loaded.card.content_hash in engine.contents("x")
    assert isinstance(engine.call(other, SetVersions("set", "x", loaded.card.content_hash, pinned=True)), Settled)
    assert engine.contents("x") == {loaded.card.content_hash}


def test_a_load_of_an_ended_process_does_not_keep_the_name(engine: Engine) -> None:
    """The next process gets the name's lock at once, the engine learns of the end later."""
    ended, other = engine.connect(b"ended"), engine.connect(b"other")
    ended.send(msgspec.msgpack.encode(pinned("x", "a")))
    engine.turn_until(lambda: "x" in engine._loop._loaders)
    assert isinstance(engine.call(other, pinned("x", "b")), AdapterLoaded)
    ended.close()
    engine.turn_until(lambda: b"ended" not in engine._loop._peers)
    assert len(engine.contents("x")) == 1
