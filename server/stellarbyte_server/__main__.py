"""`stellarbyte-server`: checks the settings, starts the engine processes, serves HTTP until a stop signal.

Modules for HTTP are imported while the engine loads its model. With --http-workers above 1 this process does not serve
HTTP but starts and watches the HTTP processes (supervisor.py).
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stellarbyte_server.access.keys import Key, Keyring, on_hangup, read_keys, read_keys_again
from stellarbyte_server.config.command_line import parse_settings
from stellarbyte_server.config.setting_values import SettingsError, is_loopback
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.http.connections.tls import check_certificate
from stellarbyte_server.http.listeners import ListenError, Listeners, listening
from stellarbyte_server.http.stopping import exit_quietly, on_stop_signals
from stellarbyte_server.import_path import leave_current_folder
from stellarbyte_server.logs import LogFormat, configure_logging

if TYPE_CHECKING:  # imported late
    from stellarbyte_server.client.replicas.replicas import Replicas
    from stellarbyte_server.client.restart import RestartingEngine
    from stellarbyte_server.protocol.adapter_versions import RecordedAdapters

logger = logging.getLogger("server")

ENGINE_MODULE = "stellarbyte_server.engine.process"


class StartError(Exception):
    """The server cannot start or continue; str() is one sentence for the user."""


def main(arguments: Sequence[str] | None = None, engine_module: str = ENGINE_MODULE) -> int:
    """Run the server; returns the exit status. `engine_module` is the module that the engine process runs."""
    leave_current_folder()
    log_format: LogFormat = "text"
    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
        log_format = settings.log_format
        configure_logging(settings.log_level, "http", log_format)
        return _run(settings, _checked_keys(settings), engine_module)
    except SettingsError as error:
        message, status = str(error), 2
    except (StartError, ListenError) as error:
        message, status = str(error), 1
    if log_format == "json":
        logger.error("%s", message)
    else:
        sys.stderr.write(f"error: {message}\n")
    return status


def _checked_keys(settings: ServerSettings) -> tuple[Key, ...]:
    """Check the files that settings name; returns the keys of --keys. Raises SettingsError."""
    check_certificate(settings)
    if settings.otlp_endpoint is not None or any(name.startswith("OTEL_") for name in os.environ):
        from stellarbyte_server.observe.tracing import check_tracing

        check_tracing(settings, os.environ)
    if settings.fine_tuning != "off":
        from stellarbyte_server.tuning.store import check_training

        check_training()
    return read_keys(settings)


def _run(settings: ServerSettings, keys: tuple[Key, ...], engine_module: str) -> int:
    """Run the engine processes and HTTP from start to stop. Raises StartError or ListenError."""
    from stellarbyte_server.client.launch import EngineStartError
    from stellarbyte_server.client.placement import place, share_of_each
    from stellarbyte_server.client.restart import start_engines, stop_engines

    with listening(settings) as listeners:
        on_stop_signals(exit_quietly)
        if settings.keys is not None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the file is read again after the model is loaded
        variables = place(settings.engine)
        settings = dataclasses.replace(settings, engine=share_of_each(settings.engine, len(variables)))
        with _own_folder() as folder, _record(settings, folder) as recorded:
            logger.info("starting the engine on %s", settings.engine.model)
            engines: list[RestartingEngine] = []
            try:
                try:
                    start_engines(settings, engine_module, variables, folder, engines, recorded)
                except (EngineStartError, OSError) as error:
                    raise StartError(f"cannot start the engine process: {error}") from None
                return asyncio.run(_serve_all(settings, keys, listeners, engines, folder))
            except (EngineStartError, ValueError, OSError) as error:
                raise StartError(str(error)) from None
            finally:
                on_stop_signals(signal.SIG_IGN)  # the remaining steps take moments
                stop_engines(engines)


async def _serve_all(
    settings: ServerSettings,
    keys: tuple[Key, ...],
    listeners: list[Listeners],
    engines: "list[RestartingEngine]",
    folder: Path,
) -> int:
    """Run one HTTP process for each listener: this process, or others that it watches."""
    started_at = int(time.time())
    if len(listeners) == 1:
        from stellarbyte_server.client.replicas.replicas import Replicas

        return await _serve(settings, keys, listeners[0], Replicas(engines, folder), started_at)
    from stellarbyte_server.http.supervisor import Supervisor

    supervisor = Supervisor(settings, keys, listeners, engines, folder, started_at)
    return await supervisor.run(lambda: _announce(settings))


async def _serve(
    settings: ServerSettings,
    keys: tuple[Key, ...],
    listeners: Listeners,
    client: "Replicas",
    started_at: int,
) -> int:
    """Serve HTTP in this process; SIGHUP reloads the file of keys."""
    from stellarbyte_server.http.serving import serve

    keyring = Keyring(settings, keys)

    def read_again() -> None:
        nonlocal keys
        keys = read_keys_again(settings, keys)
        keyring.replace(keys)

    def on_started() -> None:
        on_hangup(settings, read_again)
        _announce(settings)

    return await serve(settings, keyring, listeners, client, started_at, on_started)


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _announce(settings: ServerSettings) -> None:
    """Print the server's address and an example command."""
    if not (settings.api_key or settings.keys or is_loopback(settings.host)):
        logger.warning(
            "without --api-key everyone who can reach %s port %d can use the server", settings.host, settings.port
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    scheme = "http" if settings.ssl_certfile is None else "https"
    url = _url(scheme, host, settings.port)
    admin_url = None if settings.admin_listen is None else _url("http", *settings.admin_listen)
    if settings.log_format == "json":
        logger.info("StellarByte serves %s at %s", settings.model_name, url)
        return
    body = json.dumps(
        {
            "model": settings.model_name,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,  # sampled answers of a small model may run to the end of its context
            "stream": True,
        }
    )
    quoted = body.replace("'", "'\\''")
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key or settings.keys is not None else ""
    sys.stderr.write(
        f"\nStellarByte serves {settings.model_name} at {url}\nTry:\n\n"
        f"curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{quoted}'\n\n"
    )
    if admin_url is not None:
        sys.stderr.write(f"Programs of this machine load and unload adapters at {admin_url} without a key.\n\n")
    if settings.engine.serves_adapters and not (settings.admin_api_key or settings.allow_local_admin or admin_url):
        sys.stderr.write(
            "Adapters of --adapter-dir are loaded on first use. To load, replace and unload adapters while the server"
            " runs,\nstart it with STELLARBYTE_ADMIN_API_KEY, or with --allow-local-admin if only this machine can"
            " reach it.\n\n"
        )
    sys.stderr.flush()


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A private folder of the server, which is removed at the end; StartError."""
    from stellarbyte_server.client.launch import EngineStartError, private_folder

    try:
        folder = private_folder()
    except (EngineStartError, OSError) as error:
        raise StartError(f"cannot start the engine process: {error}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _record(settings: ServerSettings, folder: Path) -> "Iterator[Callable[[], RecordedAdapters]]":
    """The record of adapters, in --data-dir, which is this server's meanwhile, or in its own folder; StartError.

    Yields a reader of it.
    """
    from stellarbyte_server.batch.storage import claim_folder
    from stellarbyte_server.protocol.adapter_versions import RecordedAdapters
    from stellarbyte_server.registry.store import open_registry

    with contextlib.ExitStack() as opened:
        if settings.data_dir is not None:
            try:
                opened.callback(os.close, claim_folder(settings.data_dir))
            except ValueError as error:
                raise StartError(f"--data-dir: {error}") from None
        try:
            registry = open_registry(settings.data_dir, folder, settings.adapter_history)
            opened.callback(registry.close)
            registry.clean()
        except OSError as error:
            where = "--data-dir: cannot use" if settings.data_dir is not None else "cannot use the temporary folder"
            raise StartError(f"{where} {settings.data_dir or folder}: {error.strerror or error}") from None
        if settings.engine.serves_adapters:
            yield registry.recorded
            return
        if num_stored := len(registry.recorded().adapters):
            logger.warning(
                "%d adapters of --data-dir are not served: give --adapter-dir, --lora-modules or --adapter-source",
                num_stored,
            )
        yield RecordedAdapters


if __name__ == "__main__":
    sys.exit(main())
