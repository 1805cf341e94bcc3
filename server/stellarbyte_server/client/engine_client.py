"""An HTTP process's client of the engine: sends requests, receives streams of deltas.

Everything but heartbeats runs on one event loop. One task reads all messages and passes each stream its deltas; a slow
reader gets several deltas merged into one.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from stellarbyte_server.client.delta_stream import DeltaStream, StreamWatch, resolve
from stellarbyte_server.client.heartbeats import Heartbeats
from stellarbyte_server.client.http_observations import Observer
from stellarbyte_server.client.launch import Engine
from stellarbyte_server.client.progress import EngineProgress
from stellarbyte_server.client.restart import EngineEnded, EngineGone, EngineNews, EngineRestarted
from stellarbyte_server.protocol.messages import (
    HEARTBEAT_INTERVAL_S,
    Abort,
    Accepted,
    AdapterList,
    AdapterResidency,
    AdapterUnloaded,
    Call,
    CallFailed,
    ChargeKey,
    Command,
    Delta,
    EngineInfo,
    EngineStats,
    EngineTotals,
    Event,
    KeyCommand,
    KeyLimits,
    ListAdapters,
    ReadTotals,
    Rejected,
    Reply,
    ReserveKey,
    StepOutput,
    Submit,
    TotalsRead,
    UnloadAdapter,
    failure,
)
from stellarbyte_server.protocol.request import SHUTTING_DOWN, GenerationRequest, RequestRejected

logger = logging.getLogger("server.client")

STALL_CHECK_S = 0.5
STATS_LIMIT_S = 1.0
_MESSAGES_A_TURN = 100
_ENDED = "The engine process ended."
DRAINING = "The server is shutting down; new requests are refused."


class EngineDead(Exception):
    """The engine process has ended or is stalled; str() is one sentence for the user."""


class EngineClient:
    """The connection to an engine.

    `info` is set once `start` has returned. `totals` are the newest that any HTTP process read. `on_news` is called
    when the engine's process has ended, when another takes requests, and when there will be no other.
    """

    info: EngineInfo

    def __init__(
        self,
        engine: Engine,
        on_news: Callable[[EngineNews], None] | None = None,
        *,
        replica: int = 0,
        watch: StreamWatch | None = None,
    ) -> None:
        """`replica`: the engine's index among those with the same model."""
        self._progress = EngineProgress()
        self.totals: EngineTotals | None = None  # not received yet
        self.observer = Observer(self._send, can_send=lambda: self._down is None)
        self.dead = asyncio.Event()  # the engine process has ended without a successor
        self.is_admitting = True
        self.num_lost = 0  # engine processes that have ended
        self.residency = AdapterResidency()  # the adapters that the engine holds
        self.replica = replica
        self._engine = engine
        self._on_news = on_news
        self._watch_streams = watch
        self._num_sent = 0  # requests since the newest statistics
        self._down: str | None = None  # why no engine takes messages now
        self._streams: dict[str, DeltaStream] = {}
        self._calls: dict[str, asyncio.Future[Reply]] = {}
        self._numbers = itertools.count()  # of ReadTotals
        self._waiting_for_totals: dict[int, asyncio.Future[None]] = {}  # by the number of their ReadTotals
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        self._tasks: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> EngineInfo:
        """Wait until the engine is ready and connect to it; raises EngineStartError.

        Then `close` must be called: an open ZeroMQ context blocks the interpreter's exit.
        """
        self.info = await self._engine.ready()
        self._context = zmq.asyncio.Context()
        self._connect()
        self._watcher = asyncio.create_task(self._watch())
        return self.info

    async def close(self) -> None:
        """Close the connection; open streams end with an error. Does not stop the process."""
        self.observer.flush()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._disconnect()
        self._down = "The server is shutting down."
        self.end_streams(self._down)
        self._context.destroy(linger=0)

    def _connect(self) -> None:
        """Connect to the engine's current process."""
        peer_id = b"http" + secrets.token_bytes(8)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, peer_id)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(self._engine.endpoint)
        self._progress = EngineProgress()
        self.residency = AdapterResidency()
        self._send(ReadTotals(next(self._numbers)))  # known totals, even if the engine never answers again
        self._turned_s = time.monotonic()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context)
        self._heartbeats = Heartbeats(context, self._engine.endpoint, peer_id, turned_s=lambda: self._turned_s)
        self._tasks = [asyncio.create_task(work()) for work in (self._read, self._note_turns, self._end_stalled)]

    async def _disconnect(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._heartbeats.stop()
        self._socket.close()

    def stop_admission(self) -> None:
        """Refuse new requests from now on; submitted ones continue."""
        self.is_admitting = False

    async def submit(
        self,
        *requests: GenerationRequest,
        limits: KeyLimits | None = None,
        continues: bool = False,
        num_later_tokens: int = 0,
        arrived_s: float | None = None,
        is_reserved: bool = False,
    ) -> list[DeltaStream]:
        """Submit requests to the engine, which queues all or none, and wait until the first is accepted.

        Args:
            limits: of the requests' key.
            continues: the requests belong to a group that was admitted before.
            num_later_tokens: prompt tokens of the group that will be submitted later.
            arrived_s: the request's arrival by the monotonic clock; None: now.
            is_reserved: the requests are counted against the limits already.

        Raises RequestRejected or EngineDead. If the caller is cancelled, the requests are aborted. A request that is
        rejected after the first was accepted ends with an error as its last delta.
        """
        if (reason := self.health()) is not None:  # the queue of an engine that does not read has no limit
            raise EngineDead(reason)
        if not (self.is_admitting or continues):
            raise RequestRejected(DRAINING, SHUTTING_DOWN)
        sent_s = time.monotonic()
        arrived_s = sent_s if arrived_s is None else arrived_s
        streams = [DeltaStream(request.request_id, arrived_s, self.observer, self.abort) for request in requests]
        self._streams |= {stream.request_id: stream for stream in streams}
        try:
            self._send(Submit(requests, limits, continues, is_reserved, num_later_tokens, arrived_s, sent_s))
            self._num_sent += len(requests)
            await asyncio.wait([stream.accepted for stream in streams], return_when=asyncio.FIRST_COMPLETED)
            for stream in streams:
                if stream.accepted.done():
                    stream.accepted.result()
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def abort(self, request_id: str) -> None:
        """Abort a request, running or waiting; unknown ids are ignored."""
        if self._streams.pop(request_id, None) is not None:
            self._note_end(request_id)
            if self._down is None:
                self._send(Abort(request_id))

    def _note_end(self, request_id: str, *, was_refused: bool = False) -> None:
        if self._watch_streams is not None:
            self._watch_streams.note_end(request_id, was_refused=was_refused)

    async def unload_adapter(self, name: str) -> AdapterUnloaded:
        """Unload an adapter and wait until its requests have ended; RequestRejected or EngineDead."""
        reply = await self.call(UnloadAdapter(secrets.token_hex(8), name))
        assert isinstance(reply, AdapterUnloaded)
        return reply

    async def list_adapters(self) -> AdapterList:
        """All adapters and their current state; EngineDead."""
        reply = await self.call(ListAdapters(secrets.token_hex(8)))
        assert isinstance(reply, AdapterList)
        return reply

    async def charge(self, limits: KeyLimits) -> None:
        """Count a request that is not submitted against its key; RequestRejected or EngineDead."""
        await self.call(ChargeKey(secrets.token_hex(8), limits))

    async def call(self, call: Call | ChargeKey | ReserveKey) -> Reply:
        """The answer to a call; RequestRejected or EngineDead."""
        if self._down is not None:
            raise EngineDead(self._down)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call.call_id] = answer
        self._send(call)
        try:
            reply = await answer
        finally:
            self._calls.pop(call.call_id, None)
        if isinstance(reply, CallFailed):
            raise RequestRejected(reply.message, reply.code, reply.param, reply.retry_after_s)
        return reply

    @property
    def stats(self) -> EngineStats:
        """The engine's newest statistics, at most about a second old while it runs."""
        return self._progress.stats

    @property
    def num_requests(self) -> int:
        """Running and waiting requests of all HTTP processes, as far as this one knows."""
        return max(len(self._streams), self.stats.num_running + self.stats.num_waiting + self._num_sent)

    @property
    def is_connected(self) -> bool:
        """Whether an engine takes messages, as far as known."""
        return self._down is None

    def tell(self, command: KeyCommand) -> None:
        """Send a command that has no answer, unless no engine takes messages."""
        if self._down is None:
            self._send(command)

    def health(self) -> str | None:
        """None while the engine makes progress, else the problem in one sentence."""
        return self._down if self._down is not None else self._progress.stalled(has_streams=bool(self._streams))

    async def fresh_totals(self) -> EngineTotals | None:
        """The engine's current totals over all HTTP processes, including this one's newest observations.

        The newest known ones if the engine does not answer soon; None if it never did.
        """
        if self._down is None:
            number, heard = next(self._numbers), asyncio.get_running_loop().create_future()
            self._waiting_for_totals[number] = heard
            self.observer.flush()
            self._send(ReadTotals(number))
            await asyncio.wait([heard], timeout=STATS_LIMIT_S)
            self._waiting_for_totals.pop(number, None)
        return self.totals

    def _send(self, command: Command) -> None:
        self._socket.send(self._encoder.encode(command))  # immediate: the queue has no limit

    async def _read(self) -> None:
        for count in itertools.count(1):
            self._receive(self._decoder.decode(await self._socket.recv()))
            if count % _MESSAGES_A_TURN == 0:
                await asyncio.sleep(0)  # recv does not yield while there are messages; streams must run, too

    def _receive(self, event: Event) -> None:
        if isinstance(event, StepOutput):
            self._progress.note(event.stats)
            self._num_sent = 0
            for delta in event.deltas:
                self._receive_delta(delta, event.ended_s)
        elif isinstance(event, Accepted):
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream.adapter_hash = event.adapter_hash
                stream.started_s = event.started_s
                resolve(stream.accepted, None)
        elif isinstance(event, Rejected):
            stream = self._streams.pop(event.request_id, None)
            if stream is not None:
                self._note_end(event.request_id, was_refused=True)
                refusal = RequestRejected(event.message, event.code, event.param, event.retry_after_s)
                resolve(stream.accepted, refusal)
                stream.add(failure(event.request_id, event.message, event.code, event.param))
        elif isinstance(event, EngineTotals):
            self._progress.note(event.stats)
            self.totals = event
        elif isinstance(event, TotalsRead):
            for number, heard in self._waiting_for_totals.items():
                if number <= event.number:
                    resolve(heard, None)
        elif isinstance(event, AdapterResidency):
            self.residency = event
        else:
            answer = self._calls.get(event.call_id)
            if answer is not None and not answer.done():
                answer.set_result(event)

    def _receive_delta(self, delta: Delta, ended_s: float) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return  # aborted meanwhile
        if self._watch_streams is not None and delta.num_tokens:
            self._watch_streams.note_tokens(delta.request_id, delta.num_tokens)
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
            self._note_end(delta.request_id)
        stream.add(delta, ended_s)

    async def _note_turns(self) -> None:
        """Note the loop's turns, on which heartbeats depend."""
        while True:
            self._turned_s = time.monotonic()
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    async def _end_stalled(self) -> None:
        was_stalled = False
        while True:
            await asyncio.sleep(STALL_CHECK_S)
            is_stalled = self.health() is not None
            if is_stalled and was_stalled:  # twice: after a suspension of this process, messages must be read first
                self._engine.end_stalled()
                return
            was_stalled = is_stalled

    async def _watch(self) -> None:
        """Follow the engine across restarts of its process."""
        while True:
            how = await self._engine.ended()
            logger.error("the engine process%s ended (%s)", self._which, how)
            self._tell(EngineEnded(self.replica))
            with contextlib.suppress(asyncio.TimeoutError):  # its last messages have the better reason
                async with asyncio.timeout(0.1):
                    while self._streams:
                        await asyncio.sleep(0.01)
            self._down = _ENDED
            self.num_lost += 1
            self.end_streams(_ENDED)
            await self._disconnect()
            info = await self._engine.restarted()
            if info is None:
                self._tell(EngineGone(self.replica))
                self.dead.set()
                return
            self.info = info
            self._connect()
            self._down = None
            self.observer.flush()
            logger.info("another engine process%s takes requests", self._which)
            self._tell(EngineRestarted(self._engine.endpoint, info.num_blocks, self.replica))

    @property
    def _which(self) -> str:
        return f" of replica {self.replica}" if self._watch_streams is not None else ""

    def _tell(self, news: EngineNews) -> None:
        if self._on_news is not None:
            self._on_news(news)

    def end_streams(self, message: str) -> None:
        """Give every open stream an error as its last delta."""
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDead(message))
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            self._note_end(request_id)
            resolve(stream.accepted, EngineDead(message))
            stream.add(failure(request_id, message))
