"""GET /v1/models and /v1/models/{id}: the model, and a card for each available adapter."""

from typing import Any

from fastapi import APIRouter, Request

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.caller import may_use, require_model
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.errors import from_engine
from stellarbyte_server.api.contract.operation import Operation
from stellarbyte_server.api.routes.adapters import adapters_of
from stellarbyte_server.api.service import Service, ServiceOfRequest
from stellarbyte_server.protocol.adapter_reference import AdapterReference
from stellarbyte_server.protocol.messages import AdapterCard
from stellarbyte_server.protocol.request import model_not_found

router = APIRouter()


@router.get("/v1/models")
@Operation(access=Access.USER, summary="List the model and its adapters", tag="Models", answer=objects.ModelList)
async def list_models(http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    cards = await _cards(service)
    return {"object": "list", "data": [card for card in cards if may_use(http, service, card["id"])]}


@router.get("/v1/models/{name:path}")
@Operation(
    access=Access.USER,
    summary="Describe the model or one adapter",
    tag="Models",
    answer=objects.ModelCard,
    errors=(404,),
    path_parameters=(("name", "A name, or NAME@CONTENT_HASH."),),
)
async def get_model(name: str, http: Request, service: ServiceOfRequest) -> dict[str, Any]:
    require_model(http, service, name)
    reference = AdapterReference.parse(name)
    for card in await _cards(service):
        if card["id"] == name or reference == AdapterReference(card["id"], card["content_hash"]):
            return card
    raise from_engine(model_not_found(name))


async def _cards(service: Service) -> list[dict[str, Any]]:
    adapters = await adapters_of(service)
    name = service.settings.model_name
    shown = [card for card in adapters.cards if card.is_current and card.state != "failed" and card.name != name]
    return [_model_card(service), *(_adapter_card(service, card) for card in shown)]


def _model_card(service: Service) -> dict[str, Any]:
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


def _adapter_card(service: Service, card: AdapterCard) -> dict[str, Any]:
    return _model_card(service) | {
        "id": card.name,
        "root": card.root,
        "parent": service.settings.model_name,
        "content_hash": card.content_hash or None,
    }
