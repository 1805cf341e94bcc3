"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter

from server.api.generation import model_not_found
from server.api.service import Service, ServiceOfRequest

router = APIRouter()


@router.get("/v1/models")
async def list_models(service: ServiceOfRequest) -> dict[str, Any]:
    return {"object": "list", "data": [_card(service)]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, service: ServiceOfRequest) -> dict[str, Any]:
    if name != service.settings.model_name:
        raise model_not_found(name)
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "stellarbyte",
        "root": service.settings.engine.model,
        "parent": None,
        "max_model_len": service.info.max_model_len,
        "content_hash": service.info.weights_hash,
    }
