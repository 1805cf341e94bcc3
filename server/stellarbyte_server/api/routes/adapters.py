"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, GET /v1/adapters."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.adapter_versions import AdapterVersions
from stellarbyte_server.api.caller import may_use, owner_of
from stellarbyte_server.api.contract import adapter_objects
from stellarbyte_server.api.contract.bodies.adapters import LoadBody, UnloadBody
from stellarbyte_server.api.contract.bodies.body import parse_plain_body
from stellarbyte_server.api.contract.errors import ApiError, bad_request, from_engine
from stellarbyte_server.api.contract.operation import BODY_REFUSED, Operation
from stellarbyte_server.api.generation import parse_apart
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.config.adapter_source import SOURCE_RULE, AdapterSource, SourceError, is_source
from stellarbyte_server.config.setting_values import ADAPTER_NAME_RULE, is_adapter_name
from stellarbyte_server.config.settings import TUNED_PREFIX
from stellarbyte_server.observe.metrics import tier_name
from stellarbyte_server.protocol.adapter_versions import AdapterProbe
from stellarbyte_server.protocol.messages import AdapterCard, AdapterList
from stellarbyte_server.protocol.request import RequestRejected, adapter_loading
from stellarbyte_server.sources.fetch import fetch
from stellarbyte_server.sources.outcome import FetchError
from stellarbyte_server.sources.reservation import NameReserved, reserved

router = APIRouter()

LIST_LIMIT_S = 10.0


@router.post("/v1/load_lora_adapter")
@Operation(
    access=Access.ADMIN,
    summary="Load an adapter",
    tag="Adapters",
    bodies=(LoadBody,),
    answer=adapter_objects.LoadedAdapter,
    errors=(*BODY_REFUSED, 404, 409, 502, 504),
)
async def load_adapter(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    body = await parse_apart(http, service, partial(parse_plain_body, LoadBody))
    if body.lora_name == service.settings.model_name:
        raise bad_request(f"The field 'lora_name' must differ from the model's name, {body.lora_name!r}.", "lora_name")
    if service.tuning is not None and body.lora_name.startswith(TUNED_PREFIX):
        raise bad_request(
            f"The field 'lora_name' must not begin with {TUNED_PREFIX!r}, as the names of fine-tuned models do.",
            "lora_name",
        )
    model_names = service.settings.model_name, service.settings.engine.model
    if body.base_model_name is not None and body.base_model_name not in model_names:
        raise bad_request(
            f"The field 'base_model_name' must be the served model, {model_names[0]!r}, not"
            f" {body.base_model_name!r:.200}.",
            "base_model_name",
        )
    try:
        with reserved(locks_of(service), body.lora_name):
            path = await _fetched(body, service) if is_source(body.lora_path) else body.lora_path
            loaded, record = await AdapterVersions(service, service.registry).load(
                body.lora_name,
                path,
                in_place=bool(body.load_inplace),
                pinned=body.pinned,
                probe=body.probe is not False,
                caller=owner_of(http),
            )
    except NameReserved:
        raise from_engine(adapter_loading(body.lora_name)) from None
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error) from None
    return {
        "lora_name": loaded.card.name,
        "content_hash": loaded.card.content_hash,
        "rank": loaded.card.rank,
        "bytes": loaded.card.num_bytes,
        "matched": loaded.matched,
        "unmatched": loaded.unmatched,
        "pinned": record.pinned,
        "version": record.current,
        "probe": probe_object(loaded.probe),
    }


def probe_object(probe: AdapterProbe | None) -> dict[str, Any] | None:
    if probe is None:
        return None
    return {
        "max_logit_change": probe.max_logit_change,
        "changed_logits": probe.num_changed,
        "prompt_tokens": probe.num_prompt_tokens,
    }


def locks_of(service: Service) -> Path:
    """The folder of the locks of names, which all HTTP processes of the server share."""
    return service.registry.locks


async def _fetched(body: LoadBody, service: Service) -> str:
    """The source in a body, with the version that is now in the cache folder; ApiError."""
    try:
        source = AdapterSource.parse(body.lora_path)
    except SourceError:
        raise bad_request(f"The field 'lora_path' must be {SOURCE_RULE}.", "lora_path") from None
    if not any(AdapterSource.parse_prefix(text).allows(source) for text in service.settings.engine.adapter_source):
        raise ApiError(403, f"The server's --adapter-source does not allow {source}.", param="lora_path")
    if not is_adapter_name(body.lora_name):
        raise bad_request(f"The field 'lora_name' must be {ADAPTER_NAME_RULE}.", "lora_name")
    try:
        return str(await fetch(source))
    except FetchError as error:
        raise ApiError(error.status, str(error), param="lora_path") from None


@router.post("/v1/unload_lora_adapter")
@Operation(
    access=Access.ADMIN,
    summary="Unload an adapter",
    tag="Adapters",
    bodies=(UnloadBody,),
    answer=adapter_objects.UnloadedAdapter,
    errors=(*BODY_REFUSED, 404, 409),
)
async def unload_adapter(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    body = await parse_apart(http, service, partial(parse_plain_body, UnloadBody))
    try:
        with reserved(locks_of(service), body.lora_name):
            unloading = await AdapterVersions(service, service.registry).unload(body.lora_name, owner_of(http))
        unloaded = await unloading
    except NameReserved:
        raise from_engine(adapter_loading(body.lora_name)) from None
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error) from None
    return {"lora_name": body.lora_name, "freed_bytes": unloaded.num_bytes}


@router.get("/v1/adapters")
@Operation(
    access=Access.USER, summary="List adapters and their state", tag="Adapters", answer=adapter_objects.AdapterEntries
)
async def list_adapters(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    cards = (await adapters_of(service)).cards
    return {"object": "list", "data": [_entry(card, service) for card in cards if may_use(http, service, card.name)]}


async def adapters_of(service: Service) -> AdapterList:
    """All adapters in their current state; ApiError if the engine has ended or does not answer."""
    try:
        async with asyncio.timeout(LIST_LIMIT_S):
            return await service.client.list_adapters()
    except EngineDead as error:
        raise from_engine(error) from None
    except TimeoutError:
        raise from_engine(EngineDead("The engine does not answer.")) from None


def _entry(card: AdapterCard, service: Service) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "adapter",
        "state": card.state,
        "error": card.error or None,
        "tier": tier_name(card.tier, service.info.device),
        "pinned": card.pinned,
        "content_hash": card.content_hash or None,
        "root": card.root,
        "rank": card.rank or None,
        "invocation_tokens": list(card.invocation) or None,
        "bytes": card.num_bytes,
        "refcount": card.num_running + card.num_waiting,
        "running": card.num_running,
        "waiting": card.num_waiting,
        "requests": card.num_requests,
        "tokens": card.num_tokens,
        "share": card.share,
    }
