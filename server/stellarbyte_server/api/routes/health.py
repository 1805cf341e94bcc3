"""GET /health, /ready, /version and /metrics: for operators."""

import asyncio
import contextlib
from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.errors import from_engine, unavailable
from stellarbyte_server.api.contract.operation import Operation
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.client.engine_client import DRAINING, STATS_LIMIT_S, EngineDead
from stellarbyte_server.observe.metrics import render_metrics
from stellarbyte_server.observe.routing_metrics import cache_config
from stellarbyte_server.protocol.request import SHUTTING_DOWN, RequestRejected

router = APIRouter()


@router.get("/health")
@Operation(access=Access.OPEN, summary="Whether the engine makes progress", tag="Server", answer=objects.Health)
async def health(service: ServiceOfRequest) -> dict[str, str]:
    """200 while the engine, or one of the replicas, makes progress."""
    _require_healthy(service)
    message = service.client.degradation()
    return {"status": "ok"} if message is None else {"status": "degraded", "message": message}


@router.get("/ready")
@Operation(access=Access.OPEN, summary="Whether requests can be answered", tag="Server", answer=objects.Ready)
async def ready(service: ServiceOfRequest) -> dict[str, str]:
    """200 while requests can be answered. Routes exist only once the model is loaded."""
    _require_healthy(service)
    if not service.client.is_admitting:
        raise from_engine(RequestRejected(DRAINING, SHUTTING_DOWN))
    return {"status": "ready"}


@router.get("/version")
@Operation(access=Access.OPEN, summary="The server's version", tag="Server", answer=objects.Version)
async def get_version() -> dict[str, str]:
    return {"version": version("stellarbyte")}


@router.get("/metrics")
@Operation(access=Access.OPEN, summary="Metrics for Prometheus", tag="Server", answer="text/plain")
async def metrics(service: ServiceOfRequest) -> Response:
    totals = await service.client.fresh_totals()
    if totals is None:
        raise unavailable("The engine has not answered yet.")
    adapters = None
    with contextlib.suppress(EngineDead, TimeoutError):
        async with asyncio.timeout(STATS_LIMIT_S):
            adapters = await service.client.list_adapters()
    is_healthy = service.client.health() is None
    content = render_metrics(
        totals,
        service.settings.model_name,
        adapters,
        service.info.device,
        is_healthy,
        cache_config(service.client.info, service.settings.engine),
        service.client.engine_stats(),
    )
    return Response(content, media_type=CONTENT_TYPE_LATEST)


def _require_healthy(service: Service) -> None:
    reason = service.client.health()
    if reason is not None:
        raise unavailable(reason)
