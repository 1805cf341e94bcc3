"""Serves the application on a socket, from a ready engine to shutdown.

On a stop signal it drains: it continues to accept connections, so that probes and clients get a 503, but refuses new
requests. It ends when the running ones have ended, at the timeout, or at a second signal.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp

from stellarbyte_server.access.keys import Keyring
from stellarbyte_server.api.service import load_service
from stellarbyte_server.batch.files import StoreLimits
from stellarbyte_server.batch.runner import BatchRunner
from stellarbyte_server.batch.storage import Storage
from stellarbyte_server.client.replicas.replicas import Replicas
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.feedback.store import DEFAULT_FEEDBACK_BYTES, FEEDBACK_FILE, FeedbackStore
from stellarbyte_server.garbage import keep_for_good
from stellarbyte_server.http.app import create_app
from stellarbyte_server.http.batch_requests import BatchRequests
from stellarbyte_server.http.connections.connection_limit import ACCEPTED_AT_ONCE, connections_allowed
from stellarbyte_server.http.connections.protocol import ConnectionBounds, bounded_protocol
from stellarbyte_server.http.connections.tls import server_context
from stellarbyte_server.http.connections.tls_protocol import tls_protocol
from stellarbyte_server.http.gate import AtAdminAddress
from stellarbyte_server.http.listeners import Listeners
from stellarbyte_server.http.stopping import DEAD_ENGINE_GRACE_S, LAST_WORDS_S, SHUTTING_DOWN, call_on_stop_signals
from stellarbyte_server.http.tuning import open_tuning, start_tuning
from stellarbyte_server.observe.tracing import Tracing, make_tracing
from stellarbyte_server.protocol.adapter_versions import RecordedAdapters
from stellarbyte_server.registry.store import AdapterRegistry, open_registry
from stellarbyte_server.tuning.store import TuningStore

logger = logging.getLogger("server.feedback")

_POLL_S = 0.05
_FORGET_EVERY_S = 60.0
MAX_BATCH_REQUESTS = 64  # running at once, of all batches
_WAITING_CONNECTIONS = 2048  # backlog of the kernel


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would close the port at the first signal.

    asyncio uses one number for the backlog and for the connections accepted in one turn, which should differ.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_WAITING_CONNECTIONS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    settings: ServerSettings,
    keyring: Keyring,
    listeners: Listeners,
    client: Replicas,
    started_at: int,
    on_started: Callable[[], None],
) -> int:
    """Wait for the engines and serve until a signal, or some seconds after the last ended without a successor.

    `started_at` (Unix seconds) is the same in all HTTP processes of a server. `on_started` is called once connections
    are accepted. Returns the exit status; raises EngineStartError, ValueError or OSError if it cannot start.
    """
    with contextlib.ExitStack() as opened:
        registry = open_registry(settings.data_dir, client.folder, settings.adapter_history)
        opened.callback(registry.close)
        await client.start(registry.recorded if settings.engine.serves_adapters else RecordedAdapters)
        return await _serve(settings, keyring, listeners, client, registry, started_at, on_started)


async def _serve(
    settings: ServerSettings,
    keyring: Keyring,
    listeners: Listeners,
    client: Replicas,
    registry: AdapterRegistry,
    started_at: int,
    on_started: Callable[[], None],
) -> int:
    """Serve, once the engines are ready."""
    tracing: Tracing | None = None
    storage: Storage | None = None
    tuning: TuningStore | None = None
    feedback: FeedbackStore | None = None
    try:
        AppStatus.disable_automatic_graceful_drain()  # streams finish, or are ended here
        tracing = make_tracing(settings, os.environ)
        bounds = ConnectionBounds(
            receive_timeout_s=settings.receive_timeout,
            send_timeout_s=settings.send_timeout,
            max_connections=connections_allowed(),
            note_rejected=client.note_rejected,
        )
        plain: type[asyncio.Protocol] = bounded_protocol(bounds)
        protocol = plain
        if settings.ssl_certfile is not None:
            context = server_context(settings.ssl_certfile, settings.ssl_keyfile)
            protocol = tls_protocol(bounded_protocol(bounds), context)
        if settings.fine_tuning != "off":
            tuning = open_tuning(settings, client)
        if settings.data_dir is not None:
            limits = StoreLimits(file_bytes=settings.max_file_bytes, owner_bytes=settings.max_stored_bytes)
            storage = Storage.open(settings.data_dir, limits)
            if settings.feedback:
                most = DEFAULT_FEEDBACK_BYTES if settings.feedback_bytes is None else settings.feedback_bytes
                feedback = FeedbackStore.open(settings.data_dir, most)
            elif (Path(settings.data_dir) / FEEDBACK_FILE).exists():  # of a server that kept answers
                FeedbackStore.open(settings.data_dir, DEFAULT_FEEDBACK_BYTES).close()  # which forgets old ones
        service = load_service(settings, client, started_at, registry, storage, tuning, feedback)
        app = create_app(service, keyring, tracing)
        servers = {_server(app, protocol, settings): listeners.public}
        if listeners.admin is not None:
            servers[_server(AtAdminAddress(app), plain, settings)] = listeners.admin
        work = [
            _start_batches(storage, app, keyring, client, settings),
            start_tuning(service, keyring),
            _start_forgetting(feedback),
        ]
        try:
            await _run_until_stopped(servers, client, work, settings.shutdown_timeout, on_started)
        finally:
            await _stop(work)
        return 1 if client.dead.is_set() else 0
    finally:
        await client.close()
        for opened in (storage, tuning, feedback):
            if opened is not None:
                opened.close()
        if tracing is not None:
            tracing.shutdown()


def _server(app: ASGIApp, protocol: type[asyncio.Protocol], settings: ServerSettings) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        root_path=settings.root_path,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(LAST_WORDS_S),
    )
    return _Server(config)


def _start_batches(
    storage: Storage | None, app: ASGIApp, keyring: Keyring, client: Replicas, settings: ServerSettings
) -> asyncio.Task[None] | None:
    """Runs batches, in this process or once that of another one ends; None without --data-dir."""
    if storage is None:
        return None
    runner = BatchRunner(
        storage,
        BatchRequests(app, keyring, client).ask,
        is_open=lambda: client.is_admitting and client.health() is None,
        at_once=min(client.info.max_num_seqs, MAX_BATCH_REQUESTS),
        max_body_bytes=settings.max_body_bytes,
    )
    return asyncio.create_task(runner.run())


def _start_forgetting(feedback: FeedbackStore | None) -> asyncio.Task[None] | None:
    """Deletes answers that are kept no longer; None without --feedback."""

    async def forget(store: FeedbackStore) -> None:
        while True:
            await asyncio.sleep(_FORGET_EVERY_S)
            try:
                await asyncio.to_thread(store.forget_old)
            except sqlite3.Error:
                logger.exception("old answers could not be deleted")

    return None if feedback is None else asyncio.create_task(forget(feedback))


async def _stop(work: Sequence[asyncio.Task[None] | None]) -> None:
    """Abort the running requests of batches and save fine-tuning jobs; a restarted server continues both."""
    running = [task for task in work if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def _run_until_stopped(
    servers: Mapping[uvicorn.Server, socket.socket],
    client: Replicas,
    work: Sequence[asyncio.Task[None] | None],
    shutdown_timeout_s: float,
    on_started: Callable[[], None],
) -> None:
    """Serve on each server's socket until a stop signal; then let requests finish until the timeout, and end the others
    with an error."""
    told, told_again = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (told_again if told.is_set() else told).set()

    def end() -> None:
        for server in servers:
            server.should_exit = True

    async def tell_when_started() -> None:
        while not all(server.started for server in servers):
            await asyncio.sleep(0.01)
        keep_for_good()
        on_started()

    async def stop_after_engine() -> None:
        await client.dead.wait()
        await asyncio.sleep(DEAD_ENGINE_GRACE_S)
        end()

    async def drain_when_told() -> None:
        await told.wait()
        client.stop_admission()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(shutdown_timeout_s):
                while any(server.server_state.tasks for server in servers) and not told_again.is_set():
                    await asyncio.sleep(_POLL_S)
        await _stop(work)  # before streams end with errors, which would count as answers
        client.end_streams(SHUTTING_DOWN)
        end()

    call_on_stop_signals(asyncio.get_running_loop(), on_signal)
    background = [asyncio.create_task(work()) for work in (tell_when_started, stop_after_engine, drain_when_told)]
    await asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in servers.items()))
    for task in background:
        task.cancel()
