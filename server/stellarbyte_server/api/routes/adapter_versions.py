"""GET /v1/adapters/{name}/versions, POST /v1/adapters/{name}/rollback and /v1/adapters/{name}/split."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.adapter_versions import AdapterVersions
from stellarbyte_server.api.caller import owner_of
from stellarbyte_server.api.contract import adapter_objects
from stellarbyte_server.api.contract.bodies.adapters import RollbackBody, SplitBody
from stellarbyte_server.api.contract.bodies.body import parse_plain_body
from stellarbyte_server.api.contract.errors import from_engine
from stellarbyte_server.api.contract.operation import BODY_REFUSED, Operation
from stellarbyte_server.api.generation import parse_apart
from stellarbyte_server.api.routes.adapters import locks_of, probe_object
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.protocol.request import RequestRejected, adapter_loading
from stellarbyte_server.registry.record import NameRecord
from stellarbyte_server.sources.reservation import NameReserved, reserved

router = APIRouter()

_NAME = (("name", "The adapter's name."),)


@router.get("/v1/adapters/{name:path}/versions")
@Operation(
    access=Access.ADMIN,
    summary="List the versions of an adapter",
    tag="Adapters",
    answer=adapter_objects.AdapterHistory,
    errors=(400, 404),
    path_parameters=_NAME,
)
async def list_versions(name: str, service: ServiceOfRequest) -> dict[str, Any]:
    return history_object(await _versions(service).record(name))


@router.post("/v1/adapters/{name:path}/rollback")
@Operation(
    access=Access.ADMIN,
    summary="Go back to an earlier version of an adapter",
    tag="Adapters",
    bodies=(RollbackBody,),
    answer=adapter_objects.AdapterHistory,
    errors=(*BODY_REFUSED, 404, 409),
    path_parameters=_NAME,
)
async def roll_back(name: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    body = await parse_apart(http, service, partial(parse_plain_body, RollbackBody))
    return await _changed(service, name, lambda versions: versions.roll_back(name, body.version, owner_of(http)))


@router.post("/v1/adapters/{name:path}/split")
@Operation(
    access=Access.ADMIN,
    summary="Divide the callers of an adapter among its versions",
    tag="Adapters",
    bodies=(SplitBody,),
    answer=adapter_objects.AdapterHistory,
    errors=(*BODY_REFUSED, 404, 409),
    path_parameters=_NAME,
)
async def split(name: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    body = await parse_apart(http, service, partial(parse_plain_body, SplitBody))
    return await _changed(service, name, lambda versions: versions.split(name, body.shares, owner_of(http)))


async def _changed(
    service: Service, name: str, change: Callable[[AdapterVersions], Awaitable[NameRecord]]
) -> dict[str, Any]:
    versions = _versions(service)
    try:
        with reserved(locks_of(service), name):
            return history_object(await change(versions))
    except NameReserved:
        raise from_engine(adapter_loading(name)) from None
    except (RequestRejected, EngineDead) as error:
        raise from_engine(error) from None


def _versions(service: Service) -> AdapterVersions:
    return AdapterVersions(service, service.registry)


def history_object(record: NameRecord) -> dict[str, Any]:
    shares = dict(record.shares)
    return {
        "id": record.name,
        "object": "adapter.versions",
        "current": record.current,
        "shares": dict(record.hashed_shares()),
        "data": [
            {
                "version": version.number,
                "content_hash": version.content_hash,
                "source": version.source,
                "created_at": version.created_at,
                "created_by": version.created_by or None,
                "probe": probe_object(version.probe),
                "job": version.job or None,
                "current": version.number == record.current,
                "share": shares.get(version.number, 0.0) if shares else None,
            }
            for version in record.versions
        ],
    }
