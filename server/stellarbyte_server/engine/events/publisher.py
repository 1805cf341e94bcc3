"""Publishes the changes of the cache over ZeroMQ, from a thread: a step only appends to a queue.

A message has the frames topic, sequence number (8 bytes, big-endian) and batch. A batch that finds the queue full is
dropped; its number is missing then. The replay socket (ROUTER) answers a number with all kept batches from there on, as
[number, batch], and a last message with the number -1 and an empty batch.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zmq

from stellarbyte_server.engine.events.form import AllBlocksCleared, CacheKind, Event, EventBatch
from stellarbyte_server.engine.state.cache_log import CacheLog, StoredBlock
from stellarbyte_server.give_way import give_way
from stellarbyte_server.wake_up import WakeUp

logger = logging.getLogger("server.engine")

MAX_QUEUED_BATCHES = 10_000
MAX_KEPT_BATCHES, MAX_KEPT_BYTES = 10_000, 64 * 2**20  # for replays
_HIGH_WATER_MARK = 100_000  # messages for a subscriber that does not read
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class EventsAddressError(ValueError):
    """An address cannot be used; str() is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class EventAddresses:
    """Where an engine publishes; `rank` is added to the ports, since each engine has sockets of its own."""

    publish: str
    replay: str | None = None
    topic: str = ""
    rank: int = 0

    def of_rank(self, address: str) -> str:
        host, _, port = address.rpartition(":")
        return f"{host}:{int(port) + self.rank}"


class EventPublisher:
    """`flush`, `num_batches` and `num_dropped` are for the engine's thread; the sockets are the publisher's own.

    Raises:
        EventsAddressError: an address cannot be listened on.
    """

    def __init__(
        self,
        log: CacheLog,
        kind: CacheKind,
        addresses: EventAddresses,
        max_queued: int = MAX_QUEUED_BATCHES,
    ) -> None:
        self.num_batches = 0  # numbers given
        self.num_dropped = 0  # of these, batches that found the queue full
        self._log = log
        self._kind = kind
        self._rank = addresses.rank
        self._topic = addresses.topic.encode()
        self._max_queued = max_queued
        self._queue: deque[tuple[int, float, Sequence[StoredBlock | bytes] | None]] = deque()
        self._kept: deque[tuple[bytes, bytes]] = deque()
        self._kept_bytes = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._publish = _listen(self._context, zmq.PUB, addresses.of_rank(addresses.publish), "--kv-events")
        self._replay: zmq.Socket[bytes] | None = None
        if addresses.replay is not None:
            replay = addresses.of_rank(addresses.replay)
            self._replay = _listen(self._context, zmq.ROUTER, replay, "--kv-events-replay")
        self._wake_up = WakeUp()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._enqueue(None)  # the cache is empty

    def start(self) -> None:
        """Start to publish what `flush` takes."""
        self._thread.start()

    def flush(self) -> None:
        """Publish the changes since the last call, if any. Never waits."""
        changes = self._log.take()
        if changes:
            self._enqueue(changes)

    def close(self) -> None:
        """Publish the rest and close the sockets."""
        self._is_closing = True
        self._wake_up.ring()
        if self._thread.ident is not None:
            self._thread.join()
        self._context.destroy(linger=1000)
        self._wake_up.close()

    def _enqueue(self, changes: Sequence[StoredBlock | bytes] | None) -> None:
        number = self.num_batches
        self.num_batches += 1
        if len(self._queue) >= self._max_queued:
            self.num_dropped += 1
            return
        self._queue.append((number, time.time(), changes))
        self._wake_up.ring()

    def _run(self) -> None:
        give_way()
        poller = zmq.Poller()
        poller.register(self._wake_up.fd, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        while not self._is_closing or self._queue:
            poller.poll()
            self._wake_up.clear()
            try:
                self._publish_queued()
                self._answer_replays()
            except Exception:  # steps go on without events
                logger.exception("publishing events of the KV cache failed")

    def _publish_queued(self) -> None:
        while self._queue:
            number, time_s, changes = self._queue.popleft()
            events: list[Event] = [AllBlocksCleared()] if changes is None else self._kind.events(changes)
            payload = self._encoder.encode(EventBatch(time_s, events, self._rank))
            frame = number.to_bytes(8, "big")
            self._publish.send_multipart((self._topic, frame, payload))  # drops for subscribers that do not read
            self._keep(frame, payload)

    def _keep(self, frame: bytes, payload: bytes) -> None:
        self._kept.append((frame, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > MAX_KEPT_BATCHES or self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _answer_replays(self) -> None:
        """Answer the requests that have arrived; invalid ones get no answer."""
        while self._replay is not None and self._replay.poll(0):
            frames = self._replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            client, start = frames[0], frames[2]
            for frame, payload in self._kept:
                if frame >= start:  # as numbers: both are big-endian
                    self._replay.send_multipart((client, b"", frame, payload))
            self._replay.send_multipart((client, b"", _END_OF_REPLAY, b""))


def _listen(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, address: str, flag: str) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        context.destroy(linger=0)
        raise EventsAddressError(f"{flag}: cannot listen on {address}: {error.strerror}") from None
    return socket
