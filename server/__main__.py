"""`stellarbyte-server`: checks the settings, starts the engine process, serves HTTP until told to stop.

What is needed for HTTP is imported while the engine loads its model.
"""

import asyncio
import json
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from server.logs import configure_logging
from server.settings import ServerSettings, SettingsError, parse_settings

if TYPE_CHECKING:
    import uvicorn

    from server.engine.client import EngineClient
    from server.engine.launch import EngineProcess

logger = logging.getLogger("server")

ENGINE_MODULE = "server.engine.process"
DEAD_ENGINE_GRACE_S = 5.0  # how long /health says why, before the process ends
LAST_WORDS_S = 1.0  # time for streams to send their error when they are cut off
SHUTTING_DOWN = "The server shut down before the answer was complete."


def main(arguments: Sequence[str] | None = None, engine_module: str = ENGINE_MODULE) -> int:
    """Run the server; returns the exit status. `engine_module` is what the engine process runs."""
    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
    except SettingsError as error:
        return _refuse(str(error), status=2)
    configure_logging(settings.log_level, "http")
    try:
        listener = _bind(settings.host, settings.port)
    except OSError as error:
        return _refuse(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}")
    from server.engine.launch import EngineProcess, EngineStartError

    _on_stop_signals(_exit_quietly)
    logger.info("starting the engine on %s", settings.engine.model)
    with listener:
        try:
            engine = EngineProcess(settings.engine, settings.log_level, engine_module)
        except (EngineStartError, OSError) as error:
            return _refuse(f"cannot start the engine process: {error}")
        try:
            return asyncio.run(_serve(settings, listener, engine))
        except (EngineStartError, ValueError, OSError) as error:
            return _refuse(str(error))
        finally:
            _on_stop_signals(signal.SIG_IGN)  # all that is left takes moments
            engine.stop()


def _refuse(message: str, status: int = 1) -> int:
    sys.stderr.write(f"error: {message}\n")
    return status


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before a model is loaded; connections are accepted only once it is ready."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _on_stop_signals(handler: "Callable[..., None] | signal.Handlers") -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _exit_quietly(*_: object) -> None:
    """Ends a start that takes too long for the user. (KeyboardInterrupt would change the exit status in places.)"""
    raise SystemExit(0)


async def _serve(settings: ServerSettings, listener: socket.socket, engine: "EngineProcess") -> int:
    """Serve from when the engine is ready until a signal, or until some seconds after the engine died."""
    import uvicorn
    from sse_starlette.sse import AppStatus

    from server.api.service import load_service
    from server.app import create_app
    from server.engine.client import EngineClient

    client = EngineClient(engine)
    await client.start()
    try:
        AppStatus.disable_automatic_graceful_drain()  # streams may finish; uvicorn ends them at the time-out
        config = uvicorn.Config(
            create_app(load_service(settings, client)),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout + LAST_WORDS_S),
        )
        await _run_until_stopped(uvicorn.Server(config), listener, settings, client)
        return 1 if client.dead.is_set() else 0
    finally:
        await client.close()


async def _run_until_stopped(
    server: "uvicorn.Server", listener: socket.socket, settings: ServerSettings, client: "EngineClient"
) -> None:
    """Serve; when told to stop, let running requests finish in time and give the others an error as their end."""

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
    _on_stop_signals(signal.SIG_IGN)
    work = (stop_after_engine(), cut_off_slow_streams(), _announce(server, settings))
    beside = [asyncio.create_task(each) for each in work]
    await server.serve(sockets=[listener])
    client.end_streams(SHUTTING_DOWN)  # there are some only after a second Ctrl-C
    if server.server_state.tasks:
        await asyncio.wait(server.server_state.tasks, timeout=LAST_WORDS_S)
    for task in beside:
        task.cancel()


async def _announce(server: "uvicorn.Server", settings: ServerSettings) -> None:
    """Once connections are accepted, say where, with a command that can be pasted as it is."""
    while not server.started:
        await asyncio.sleep(0.01)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    body = json.dumps(
        {
            "model": settings.model_name,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,  # a small model asked to be creative may ramble to the end of its context
            "stream": True,
        }
    )
    quoted = body.replace("'", "'\\''")
    sys.stderr.write(
        f"\nStellarByte serves {settings.model_name} at {url}\nTry:\n\n"
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{quoted}'\n\n"
    )
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
