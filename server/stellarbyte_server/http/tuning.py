"""Fine-tuning in an HTTP process: its store, and the runner with what it needs of the server."""

import asyncio
import os

from stellarbyte_server.access.keys import Keyring
from stellarbyte_server.api.adapter_versions import AdapterVersions
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.service import Service
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.client.replicas.replicas import Replicas
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.protocol.request import ADAPTER_NOT_FOUND, SHUTTING_DOWN, RequestRejected
from stellarbyte_server.sources.reservation import NameReserved, reserved
from stellarbyte_server.tuning.examples import Template
from stellarbyte_server.tuning.runner import CannotLoad, EngineAway, Plan, Server, TuningRunner
from stellarbyte_server.tuning.store import TuningStore

MAX_RANK = 16  # of the adapters, unless the server takes only smaller ones


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
    client, settings = service.client, service.settings
    source = service.tokenizer.chat_template_source
    if source is None:
        raise ValueError("--fine-tuning: the model has no chat template; give one with --chat-template")

    versions = AdapterVersions(service, service.registry)

    async def load(name: str, folder: str) -> None:
        if await asyncio.to_thread(service.registry.record, name) is not None:
            return  # with this content, which its name tells
        try:
            with reserved(service.registry.locks, name):
                await versions.load(name, folder, in_place=True, pinned=None, probe=False, caller="")
        except (EngineDead, NameReserved) as error:
            raise EngineAway from error
        except RequestRejected as error:
            if error.code == SHUTTING_DOWN:
                raise EngineAway from error
            raise CannotLoad(str(error)) from None
        except ApiError as error:
            raise CannotLoad(str(error)) from None

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

    def max_tokens(owner: str) -> int | None:
        key = keyring.of_owner(owner)
        return None if key is None else key.max_fine_tuning_tokens

    shown = Template(
        shows_tools="tools" in service.tokenizer.template_variables(has_tools=True), shows_calls="tool_calls" in source
    )
    plan = Plan(
        model=client.info.model_path,
        base=settings.model_name,
        template=settings.chat_template,
        rank=min(MAX_RANK, settings.engine.max_lora_rank),
        context=client.info.max_model_len,
        device=settings.fine_tuning,
        threads=max(1, _cores() // 2),
        memory=settings.fine_tuning_memory,
        shown=shown,
    )
    server = Server(
        load=load,
        unload=unload,
        is_open=lambda: client.is_admitting and client.health() is None,
        max_tokens=max_tokens,
    )
    runner = TuningRunner(service.tuning, service.storage.folder, service.storage.files, plan, server)
    return asyncio.create_task(runner.run())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
