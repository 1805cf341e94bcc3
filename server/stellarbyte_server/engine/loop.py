"""The engine loop: receives commands from HTTP processes, steps the core, sends deltas back."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import zmq

from stellarbyte_server.engine.request_totals import CLIENT_LEFT, HTTP_PROCESS_LOST, REQUEST_FAILED, RequestTotals
from stellarbyte_server.engine.schedule.key_usage import KeyUsage
from stellarbyte_server.engine.state.account import Account
from stellarbyte_server.protocol.adapter_versions import SetVersions
from stellarbyte_server.protocol.messages import (
    FAILED,
    HEARTBEAT_INTERVAL_S,
    Abort,
    AdapterResidency,
    Call,
    CallFailed,
    Command,
    Delta,
    EngineStats,
    Event,
    Heartbeat,
    HttpObservations,
    KeyCommand,
    LoadAdapter,
    News,
    ReadTotals,
    Rejected,
    Reply,
    StepOutput,
    Submit,
    TotalsRead,
    UnloadAdapter,
    failure,
)
from stellarbyte_server.protocol.request import INTERNAL_ERROR, GenerationRequest, RequestRejected

logger = logging.getLogger("server.engine")

PEER_SILENCE_LIMIT_S = 5.0
PREPARATION_INTERVAL_MS = 5  # between two pieces of preparation while idle
CALL_FAILED = "The engine failed to execute this call; see the server's log."


class Core(Protocol):
    """The interface of an engine core. Called from one thread only."""

    def submit(self, request: GenerationRequest, account: Account | None = None) -> None:
        """Queue a request of an account (None: no key); RequestRejected if it cannot run."""

    def abort(self, request_id: str) -> None:
        """Abort a request; unknown ids are ignored."""

    @property
    def has_work(self) -> bool: ...

    @property
    def is_blocked(self) -> bool:
        """Whether no work is possible before a wake-up of `wake_fds`, or before `patience_s` have passed."""

    @property
    def patience_s(self) -> float | None:
        """Seconds until work becomes possible without a wake-up; None: never."""

    @property
    def wake_fds(self) -> tuple[int, ...]:
        """File descriptors; one becomes readable when there is work without a command."""

    def prepare(self) -> bool:
        """Do one piece of preparation for later steps; returns whether more is left."""

    def call(self, call: Call) -> None:
        """Execute an operator's call; `take_replies` returns its answer."""

    def abandon_load(self, name: str) -> None:
        """Give up what the calls of a process that has ended have prepared for an adapter."""

    def take_replies(self) -> list[Reply]:
        """Answers to calls since the last `take_replies`."""

    def step(self) -> list[News]:
        """Run one forward pass; returns acceptances, rejections and deltas.

        A request is accepted, or rejected, before its first delta.
        """

    def stats(self) -> EngineStats: ...

    def residency(self) -> AdapterResidency:
        """The adapters that it holds."""


@dataclass(kw_only=True, slots=True)
class _Peer:
    """One HTTP process."""

    heard_at_s: float
    told_at_s: float = 0.0
    request_ids: set[str] = field(default_factory=set)
    undelivered: list[Delta] = field(default_factory=list)  # errors to deliver once it reads again
    residency: AdapterResidency = field(default_factory=AdapterResidency)  # as last told


class EngineLoop:
    """Moves messages between a ROUTER socket and a core."""

    def __init__(self, core: Core, socket: zmq.Socket[bytes]) -> None:
        self._core = core
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._peers: dict[bytes, _Peer] = {}
        self._owner: dict[str, bytes] = {}  # request id → peer
        self._usage = KeyUsage()
        self._totals = RequestTotals()
        self._totals_wanted: dict[bytes, int] = {}  # peer → the number of its newest ReadTotals
        self._callers: dict[str, bytes] = {}  # call id → peer
        self._loaders: dict[str, bytes] = {}  # adapter → peer that prepares a version, until it is set
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        for wake_fd in core.wake_fds:
            self._poller.register(wake_fd, zmq.POLLIN)

    def run(self) -> None:
        """Serve until the engine fails; raises the exception after ending every running request with an error."""
        stats_before = self._core.stats()
        while True:
            if self._poller.poll(self._patience_ms()):
                self._take_commands()
                self._answer_calls()
            now_s = time.monotonic()
            self._leave_silent_peers(now_s)  # after reading commands: heartbeats wait while a long step runs
            self._tell_stats(now_s)
            if self._core.has_work:
                started_s = time.monotonic()
                try:
                    news = self._core.step()
                except Exception:
                    self._fail_everything()
                    raise
                ended_s, stats = time.monotonic(), self._core.stats()
                if stats.num_steps_total > stats_before.num_steps_total:
                    num_tokens = stats.step_tokens_total - stats_before.step_tokens_total
                    num_tokens += stats.prefix_cache_hits_total - stats_before.prefix_cache_hits_total
                    self._totals.note_step(ended_s - started_s, num_tokens)
                stats_before = stats
                self._deliver(news, stats, started_s, ended_s)
                self._answer_calls()

    def _patience_ms(self) -> int:
        """How long the loop may wait for commands."""
        if self._core.has_work and not self._core.is_blocked:
            return 0
        patience_ms = PREPARATION_INTERVAL_MS if self._core.prepare() else int(HEARTBEAT_INTERVAL_S * 1000)
        limit_s = self._core.patience_s
        return patience_ms if limit_s is None else min(patience_ms, math.ceil(limit_s * 1000))

    def _answer_calls(self) -> None:
        for reply in self._core.take_replies():
            if (peer_id := self._callers.pop(reply.call_id, None)) is not None:
                self._send(peer_id, reply)

    def _take_commands(self) -> None:
        """Handle every command that has arrived."""
        while True:
            try:
                peer_id, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                command = self._decoder.decode(payload)
            except msgspec.DecodeError as error:
                logger.error("dropped an invalid command: %s", error)
                continue
            if isinstance(command, Heartbeat):
                peer_id = command.peer_id
            peer = self._peers.setdefault(peer_id, _Peer(heard_at_s=0.0))
            peer.heard_at_s = time.monotonic()
            self._handle(peer_id, peer, command)
            if peer.undelivered:
                deltas, peer.undelivered = tuple(peer.undelivered), []
                self._send(peer_id, StepOutput(deltas, self._core.stats(), time.monotonic()))
        if self._totals_wanted:
            wanted, self._totals_wanted = self._totals_wanted, {}
            self._tell_totals()
            for peer_id, number in wanted.items():
                self._send(peer_id, TotalsRead(number))

    def _handle(self, peer_id: bytes, peer: _Peer, command: Command) -> None:
        if isinstance(command, Submit):
            try:
                self._submit(peer_id, peer, command)
            except RequestRejected as refusal:
                rejected = Rejected("", str(refusal), refusal.code, refusal.param, refusal.retry_after_s)
                for request in command.requests:
                    self._send(peer_id, msgspec.structs.replace(rejected, request_id=request.request_id))
            except Exception:  # a fault of these requests only: no step has included them
                logger.exception("requests %s could not be queued", [r.request_id for r in command.requests])
                for request in command.requests:
                    self._send(peer_id, Rejected(request.request_id, FAILED, INTERNAL_ERROR))
        elif isinstance(command, Abort) and self._owner.get(command.request_id) == peer_id:
            self._forget(command.request_id)
            self._totals.note_aborted(command.request_id, CLIENT_LEFT)
            self._core.abort(command.request_id)
            peer.told_at_s = 0.0  # send the state with the freed blocks at once
        elif isinstance(command, Heartbeat):
            peer.told_at_s = 0.0  # answered with the current state
        elif isinstance(command, HttpObservations):
            self._totals.add_observations(command)
        elif isinstance(command, ReadTotals):
            self._totals_wanted[peer_id] = command.number  # answered once all commands are handled
        elif isinstance(command, KeyCommand):
            reply = self._usage.handle(command, peer_id, time.monotonic())
            if reply is not None:
                self._send(peer_id, reply)
        elif isinstance(command, Call):
            self._call(peer_id, command)

    def _call(self, peer_id: bytes, call: Call) -> None:
        self._callers[call.call_id] = peer_id
        if isinstance(call, LoadAdapter):
            if self._loaders.get(call.name, peer_id) != peer_id:  # ended: while it lives, others wait for the name
                self._core.abandon_load(call.name)
            self._loaders[call.name] = peer_id
        elif isinstance(call, SetVersions | UnloadAdapter):
            self._loaders.pop(call.name, None)
        try:
            self._core.call(call)
        except Exception:
            logger.exception("%s failed", type(call).__name__)
            del self._callers[call.call_id]
            self._send(peer_id, CallFailed(call.call_id, CALL_FAILED, INTERNAL_ERROR))

    def _submit(self, peer_id: bytes, peer: _Peer, submit: Submit) -> None:
        """Queue all or none; RequestRejected."""
        queued: list[str] = []
        account = None if submit.limits is None else self._usage.account(submit.limits)
        if submit.limits is not None and not (submit.continues or submit.is_reserved):
            self._usage.check(submit.limits, submit.requests, time.monotonic(), submit.num_later_tokens)
        try:
            for request in submit.requests:
                if request.request_id in self._owner:
                    raise RequestRejected(f"A request with the id {request.request_id} is already running.")
                self._core.submit(request, account)
                self._owner[request.request_id] = peer_id
                peer.request_ids.add(request.request_id)
                queued.append(request.request_id)
        except Exception:
            for request_id in queued:
                self._forget(request_id)
                self._core.abort(request_id)
            raise
        now_s = time.monotonic()
        if submit.limits is not None:
            later, continues = submit.num_later_tokens, submit.continues
            self._usage.add(submit.limits, submit.requests, now_s, later, continues, submit.is_reserved)
        sent_s = now_s if submit.sent_s is None else submit.sent_s
        arrived_s = sent_s if submit.arrived_s is None else submit.arrived_s
        self._totals.note_queued(submit.requests, arrived_s, sent_s)

    def _deliver(self, news: Iterable[News], stats: EngineStats, started_s: float, now_s: float) -> None:
        """Send acceptances and rejections one by one, then one message of deltas for each peer."""
        by_peer: defaultdict[bytes, list[Delta]] = defaultdict(list)
        for item in news:
            peer_id = self._owner.get(item.request_id)
            if peer_id is None:
                continue  # aborted meanwhile
            if isinstance(item, Delta):
                self._usage.note_tokens(item.request_id, item.num_tokens, now_s)
                self._totals.note_delta(item, now_s)
                by_peer[peer_id].append(item)
                if item.finish_reason is not None:
                    self._forget(item.request_id)
                continue
            if isinstance(item, Rejected):
                self._usage.refuse(item.request_id)
                self._forget(item.request_id)
                self._totals.note_refused(item.request_id)
                self._send(peer_id, item)
            else:
                self._usage.begin(item.request_id)
                self._totals.note_started(item.request_id, started_s)
                self._send(peer_id, msgspec.structs.replace(item, started_s=started_s))
        for peer_id, deltas in by_peer.items():
            self._send(peer_id, StepOutput(tuple(deltas), stats, now_s))

    def _tell_stats(self, now_s: float) -> None:
        """Send a heartbeat to peers that got no message lately."""
        for peer_id, peer in list(self._peers.items()):
            if now_s - peer.told_at_s >= HEARTBEAT_INTERVAL_S:
                residency = self._core.residency()
                if residency != peer.residency:
                    peer.residency = residency
                    self._send(peer_id, residency)
                self._send(peer_id, StepOutput((), self._core.stats(), now_s))

    def _tell_totals(self) -> None:
        totals = self._totals.snapshot(self._core.stats())
        for peer_id in list(self._peers):
            self._send(peer_id, totals)

    def _leave_silent_peers(self, now_s: float) -> None:
        for peer in self._peers.values():
            if peer.request_ids and now_s - peer.heard_at_s > PEER_SILENCE_LIMIT_S:
                logger.warning("no heartbeat from an HTTP process; aborting its %d requests", len(peer.request_ids))
                self._abort_all(peer)

    def _send(self, peer_id: bytes, event: Event) -> None:
        """Send without blocking. A peer that is gone or does not read loses its requests."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return  # the peer is gone
        peer.told_at_s = time.monotonic()
        try:
            payload = self._encoder.encode(event)
        except Exception:
            self._send_rest(peer_id, event)
            return
        try:
            self._socket.send_multipart((peer_id, payload), zmq.NOBLOCK)
        except zmq.Again:
            self._abort_all(peer)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._abort_all(peer)
            self._usage.release_all(peer_id)
            del self._peers[peer_id]
            for name in [name for name, loader in self._loaders.items() if loader == peer_id]:
                del self._loaders[name]
                self._core.abandon_load(name)

    def _send_rest(self, peer_id: bytes, event: Event) -> None:
        """Send a message that cannot be encoded delta by delta; requests whose delta cannot be encoded fail."""
        if isinstance(event, StepOutput) and len(event.deltas) > 1:
            for delta in event.deltas:
                self._send(peer_id, StepOutput((delta,), event.stats, event.ended_s))
            return
        if not isinstance(event, StepOutput) or not event.deltas:
            raise TypeError(f"{type(event).__name__} cannot be encoded")
        request_id = event.deltas[0].request_id
        logger.exception("the delta of request %s cannot be encoded; ending the request", request_id)
        if request_id in self._owner:
            self._forget(request_id)
            self._totals.note_aborted(request_id, REQUEST_FAILED)
            self._core.abort(request_id)
        self._send(peer_id, StepOutput((failure(request_id, FAILED),), event.stats, event.ended_s))

    def _abort_all(self, peer: _Peer) -> None:
        for request_id in list(peer.request_ids):
            self._forget(request_id)
            self._totals.note_aborted(request_id, HTTP_PROCESS_LOST)
            self._core.abort(request_id)
            peer.undelivered.append(failure(request_id, "The request was dropped: its answer was not being read."))

    def _forget(self, request_id: str) -> None:
        self._peers[self._owner.pop(request_id)].request_ids.discard(request_id)
        self._usage.end(request_id)

    def _fail_everything(self) -> None:
        failures = [failure(request_id, FAILED) for request_id in self._owner]
        now_s = time.monotonic()
        self._deliver(failures, self._core.stats(), now_s, now_s)
        self._tell_totals()  # for HTTP processes that render metrics before they end
