"""Fine-tuning in an HTTP process: its store, and the runner with what it needs of the server."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stellarbyte_server.access.keys import Keyring
from stellarbyte_server.api.adapter_versions import AdapterVersions
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.routes.tuning.plan import plan_of
from stellarbyte_server.api.routes.tuning.publications import make_live
from stellarbyte_server.api.service import Service
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.client.replicas.replicas import Replicas
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.protocol.request import ADAPTER_NOT_FOUND, SHUTTING_DOWN, RequestRejected
from stellarbyte_server.sources.reservation import NameReserved, reserved
from stellarbyte_server.tuning.jobs import Publication
from stellarbyte_server.tuning.runner import CannotLoad, EngineAway, Server, TuningRunner
from stellarbyte_server.tuning.store import TuningStore


def open_tuning(settings: ServerSettings, client: Replicas) -> TuningStore:
    """The store in --data-dir; ValueError or OSError if jobs cannot be run."""
    assert settings.data_dir is not None, "the settings are checked"
    if settings.fine_tuning == "cuda" and client.info.device != "cuda":
        raise ValueError(f"--fine-tuning cuda: the model runs on {client.info.device}; use --fine-tuning cpu")
    return TuningStore.open(settings.data_dir)


def start_tuning(service: Service, keyring: Keyring) -> asyncio.Task[None] | None:
    """Runs jobs, in this process or once that of another one ends; None without --fine-tuning.

    Raises:
        ValueError: the model has no chat template.
    """
    if service.tuning is None:
        return None
    assert service.storage is not None, "the settings are checked"
    client = service.client

    versions = AdapterVersions(service, service.registry)

    async def load(name: str, folder: str) -> None:
        if await asyncio.to_thread(service.registry.record, name) is not None:
            return  # with this content, which its name tells
        with _errors_of_the_engine(), reserved(service.registry.locks, name):
            await versions.load(name, folder, in_place=True, pinned=None, probe=False, caller="")

    async def unload(name: str) -> None:
        try:
            with reserved(service.registry.locks, name):
                unloading = await versions.unload(name, "")
            await unloading
        except (EngineDead, NameReserved, ApiError) as error:
            raise EngineAway from error
        except RequestRejected as error:
            if error.code != ADAPTER_NOT_FOUND:
                raise EngineAway from error

    def live(name: str) -> tuple[Path, int] | None:
        record = service.registry.record(name)
        if record is None:
            return None
        return Path(service.registry.stored(record.version(record.current)).folder), record.current

    def max_tokens(owner: str) -> int | None:
        key = keyring.of_owner(owner)
        return None if key is None else key.max_fine_tuning_tokens

    async def publish(job_id: str, folder: Path, asked: Publication) -> int:
        with _errors_of_the_engine():
            return await make_live(service, job_id, folder, asked)

    server = Server(
        load=load,
        unload=unload,
        publish=publish,
        live=live,
        is_open=lambda: client.is_admitting and client.health() is None,
        is_busy=lambda: any(each.num_requests for each in client.clients),
        max_tokens=max_tokens,
    )
    runner = TuningRunner(service.tuning, service.storage.folder, service.storage.files, plan_of(service), server)
    return asyncio.create_task(runner.run())


@contextmanager
def _errors_of_the_engine() -> Iterator[None]:
    """Raises CannotLoad where the engine or the disk refuses an adapter, and EngineAway where a later call may work."""
    try:
        yield
    except (EngineDead, NameReserved) as error:
        raise EngineAway from error
    except RequestRejected as error:
        if error.code == SHUTTING_DOWN:
            raise EngineAway from error
        raise CannotLoad(str(error)) from None
    except ApiError as error:
        raise CannotLoad(str(error)) from None
