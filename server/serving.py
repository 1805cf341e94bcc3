"""One HTTP process from a ready engine to its end: the application on a socket, and how it stops."""

import asyncio
import math
import signal
import socket
from collections.abc import Callable

import uvicorn
from sse_starlette.sse import AppStatus

from server.api.service import load_service
from server.app import create_app
from server.engine.client import EngineClient
from server.engine.launch import Engine
from server.http_protocol import bounded_protocol
from server.keys import Keyring
from server.settings import ServerSettings
from server.stopping import DEAD_ENGINE_GRACE_S, LAST_WORDS_S, SHUTTING_DOWN, on_stop_signals


async def serve(
    settings: ServerSettings,
    keyring: Keyring,
    listener: socket.socket,
    engine: Engine,
    started_at: int,
    on_started: Callable[[], None],
) -> int:
    """Serve from when the engine is ready until a signal, or until some seconds after the engine died.

    `started_at` (Unix seconds) is the same in all HTTP processes of a server. `on_started` is called once connections
    are accepted. Returns the exit status; raises EngineStartError, ValueError or OSError when it cannot start.
    """
    client = EngineClient(engine)
    await client.start()
    try:
        AppStatus.disable_automatic_graceful_drain()  # streams may finish; uvicorn ends them at the time-out
        config = uvicorn.Config(
            create_app(load_service(settings, client, started_at), keyring),
            http=bounded_protocol(settings.receive_timeout, settings.send_timeout),
            ws="none",
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            root_path=settings.root_path,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout + LAST_WORDS_S),
        )
        await _run_until_stopped(uvicorn.Server(config), listener, settings, client, on_started)
        return 1 if client.dead.is_set() else 0
    finally:
        await client.close()


async def _run_until_stopped(
    server: uvicorn.Server,
    listener: socket.socket,
    settings: ServerSettings,
    client: EngineClient,
    on_started: Callable[[], None],
) -> None:
    """Serve; when told to stop, let running requests finish in time and give the others an error as their end."""

    async def tell_when_started() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        on_started()

    async def stop_after_engine() -> None:
        await client.dead.wait()
        await asyncio.sleep(DEAD_ENGINE_GRACE_S)
        server.should_exit = True

    async def cut_off_slow_streams() -> None:
        while not server.should_exit:
            await asyncio.sleep(0.1)
        await asyncio.sleep(settings.shutdown_timeout)
        client.end_streams(SHUTTING_DOWN)

    # uvicorn handles the signals while it serves, then raises them again; that would only interrupt the shutdown.
    on_stop_signals(signal.SIG_IGN)
    beside = [asyncio.create_task(work()) for work in (tell_when_started, stop_after_engine, cut_off_slow_streams)]
    await server.serve(sockets=[listener])
    client.end_streams(SHUTTING_DOWN)  # there are some only after a second Ctrl-C
    if server.server_state.tasks:
        await asyncio.wait(server.server_state.tasks, timeout=LAST_WORDS_S)
    for task in beside:
        task.cancel()
