"""The document at /openapi.json: what each route takes and answers, errors included. Knows no engine.

Routes read their bodies themselves, so the framework cannot know any of this. A route is described by its row in
`OPERATIONS`; a test fails for a route without one.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from stellarbyte_server.access.rules import ACCESS, Access
from stellarbyte_server.api.contract import objects, response_objects, responses_body, schemas
from stellarbyte_server.api.contract.field_notes import add_notes
from stellarbyte_server.api.routes import adapters, embeddings, tokenize

Schema = dict[str, Any]
Model = type[BaseModel]
Refs = dict[Model, Schema]

_EVERYWHERE = (403, 500, 503)
_BODY_REFUSED = (400, 408, 413)
_GENERATION = (*_BODY_REFUSED, 404, 429)

_ERRORS = {
    400: "The request is not valid; `param` names the field.",
    401: "The header `Authorization: Bearer KEY` does not carry a key that the server needs here.",
    403: "The key does not allow this or this model; or a server without keys was called under a foreign host name.",
    404: "There is no such model, adapter or route.",
    408: "The body did not come in time.",
    413: "The body is larger than the server's --max-body-bytes.",
    429: "Too many requests are waiting, or the key is at one of its limits.",
    500: "The server failed.",
    503: "The engine is gone or does not answer, the server is shutting down, or the request waited too long.",
}
_RETRY_AFTER = {429, 503}
_ROUTE_PATHS = {"/v1/models/{name}": "/v1/models/{name:path}"}  # where the framework writes a path in another way


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What one method of one route takes and answers."""

    summary: str
    tag: str
    answer: Model | str  # a media type: text
    bodies: tuple[Model, ...] = ()  # one of them is the request's JSON
    event: Model | None = None  # of the stream that a body with `stream` gets instead
    ends_with_done: bool = True  # the stream's last event is [DONE]
    errors: tuple[int, ...] = ()
    path_parameters: tuple[tuple[str, str], ...] = ()  # name, description


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/v1/completions"): Operation(
        summary="Continue a prompt",
        tag="Generation",
        bodies=(schemas.CompletionBody,),
        answer=objects.Completion,
        event=objects.CompletionChunk,
        errors=_GENERATION,
    ),
    ("post", "/v1/chat/completions"): Operation(
        summary="Answer a chat",
        tag="Generation",
        bodies=(schemas.ChatBody,),
        answer=objects.ChatCompletion,
        event=objects.ChatCompletionChunk,
        errors=_GENERATION,
    ),
    ("post", "/v1/responses"): Operation(
        summary="Answer a chat, in the form of OpenAI's Responses API",
        tag="Generation",
        bodies=(responses_body.ResponsesBody,),
        answer=response_objects.Response,
        event=response_objects.ResponseEvent,
        ends_with_done=False,
        errors=_GENERATION,
    ),
    ("post", "/v1/embeddings"): Operation(
        summary="Turn texts into vectors",
        tag="Generation",
        bodies=(embeddings.EmbeddingsBody,),
        answer=objects.EmbeddingList,
        errors=_GENERATION,
    ),
    ("get", "/v1/models"): Operation(summary="List the model and its adapters", tag="Models", answer=objects.ModelList),
    ("get", "/v1/models/{name}"): Operation(
        summary="Describe the model or one adapter",
        tag="Models",
        answer=objects.ModelCard,
        errors=(404,),
        path_parameters=(("name", "A name, or NAME@CONTENT_HASH."),),
    ),
    ("post", "/v1/load_lora_adapter"): Operation(
        summary="Load an adapter",
        tag="Adapters",
        bodies=(adapters.LoadBody,),
        answer=objects.LoadedAdapter,
        errors=(*_BODY_REFUSED, 404),
    ),
    ("post", "/v1/unload_lora_adapter"): Operation(
        summary="Unload an adapter",
        tag="Adapters",
        bodies=(adapters.UnloadBody,),
        answer=objects.UnloadedAdapter,
        errors=(*_BODY_REFUSED, 404),
    ),
    ("get", "/v1/adapters"): Operation(
        summary="List adapters and their state", tag="Adapters", answer=objects.AdapterEntries
    ),
    ("post", "/tokenize"): Operation(
        summary="Turn a prompt or a chat into tokens",
        tag="Tokens",
        bodies=(tokenize.TokenizePromptBody, tokenize.TokenizeChatBody),
        answer=objects.Tokenized,
        errors=(*_BODY_REFUSED, 404),
    ),
    ("post", "/detokenize"): Operation(
        summary="Turn tokens into text",
        tag="Tokens",
        bodies=(tokenize.DetokenizeBody,),
        answer=objects.Detokenized,
        errors=(*_BODY_REFUSED, 404),
    ),
    ("get", "/health"): Operation(summary="Whether the engine makes progress", tag="Server", answer=objects.Health),
    ("get", "/ready"): Operation(summary="Whether requests can be answered", tag="Server", answer=objects.Ready),
    ("get", "/version"): Operation(summary="The server's version", tag="Server", answer=objects.Version),
    ("get", "/metrics"): Operation(summary="Metrics for Prometheus", tag="Server", answer="text/plain"),
}


def describe(app: FastAPI, model_name: str, *, allows_unknown_fields: bool) -> None:
    """Let the application's document be ours; it is made when it is first asked for."""

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = make_document(model_name, allows_unknown_fields=allows_unknown_fields)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def make_document(model_name: str, *, allows_unknown_fields: bool) -> Schema:
    """An OpenAPI 3.1 document of all rows, for a server of that model."""
    refs, models = _models(_LenientSchemas if allows_unknown_fields else _Schemas)
    add_notes(models, {body.__name__ for operation in OPERATIONS.values() for body in operation.bodies})
    for schema in models.values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"]["examples"] = [model_name]
    paths: dict[str, Schema] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(method, path, operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "StellarByte", "version": version("stellarbyte")},
        "paths": paths,
        "components": {
            "schemas": models,
            "responses": {str(status): _error(status, refs) for status in _ERRORS},
            "headers": {
                "X-Request-Id": _header("string", "Names the request in the server's log."),
                "X-Ignored-Fields": _header("string", "Fields that were ignored, with --unknown-fields warn."),
                "Retry-After": _header("integer", "Seconds after which to try again."),
            },
            "securitySchemes": {
                "adminKey": {"type": "http", "scheme": "bearer", "description": "The server's --admin-api-key."},
                "key": {"type": "http", "scheme": "bearer", "description": "One of --api-key, or of the file --keys."},
            },
        },
    }


class _Schemas(GenerateJsonSchema):
    """Without what says nothing: titles of fields, and null as the default of fields that may be left out."""

    unknown_fields: ClassVar[Schema | bool] = {"type": "null"}  # of a model that lets them through to our own checks

    def field_title_should_be_set(self, schema: Any) -> bool:
        del schema
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        described = super().default_schema(schema)
        if "default" in described and described["default"] is None:
            del described["default"]
        return described

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        described = super().model_schema(schema)
        if described.get("additionalProperties") is True and not schema.get("root_model"):
            described["additionalProperties"] = self.unknown_fields
        return described


class _LenientSchemas(_Schemas):
    unknown_fields = True


def _models(schemas_class: type[_Schemas]) -> tuple[Refs, dict[str, Schema]]:
    """A reference to each model that a row names, and all models by the names in these references."""
    named: set[Model] = {objects.ErrorBody}
    for operation in OPERATIONS.values():
        named.update(operation.bodies)
        named.update(model for model in (operation.answer, operation.event) if isinstance(model, type))
    inputs: list[tuple[Model, Literal["validation"]]] = [
        (model, "validation") for model in sorted(named, key=lambda model: model.__name__)
    ]
    refs, definitions = models_json_schema(
        inputs, ref_template="#/components/schemas/{model}", schema_generator=schemas_class
    )
    return {model: refs[model, "validation"] for model in named}, definitions["$defs"]


def _operation(method: str, path: str, operation: Operation, refs: Refs) -> Schema:
    access = ACCESS[method.upper(), _ROUTE_PATHS.get(path, path)]
    statuses = sorted({*operation.errors, *_EVERYWHERE, *(() if access is Access.OPEN else (401,))})
    described: Schema = {
        "operationId": "_".join([method, *path.replace("{", "").replace("}", "").strip("/").split("/")]),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            "200": _answer(operation, refs),
            **{str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses},
        },
    }
    if operation.path_parameters:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
            for name, text in operation.path_parameters
        ]
    if operation.bodies:
        bodies = [refs[body] for body in operation.bodies]
        schema = bodies[0] if len(bodies) == 1 else {"oneOf": bodies}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if access is not Access.OPEN:  # {}: without a key where the server has none, operator's routes from its machine
        described["security"] = [{"adminKey": []}, *([{"key": []}] if access is Access.USER else []), {}]
    return described


def _answer(operation: Operation, refs: Refs) -> Schema:
    content: Schema
    if isinstance(operation.answer, str):
        content = {operation.answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": refs[operation.answer]}}
    headers = ["X-Request-Id"]
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(operation.event, operation.ends_with_done, refs)}
    if any(issubclass(body, schemas.Body) for body in operation.bodies):
        headers.append("X-Ignored-Fields")
    return {"description": "The answer.", "headers": _header_refs(headers), "content": content}


def _event(model: Model, ends_with_done: bool, refs: Refs) -> Schema:
    """One server-sent event, which is what OpenAPI 3.1 is taken to describe for streams."""
    json = {"type": "string", "contentMediaType": "application/json"}
    description = "One event of the stream that `stream: true` gets. Where the answer failed, the last one is an error."
    data: Schema
    if ends_with_done:
        description += " Otherwise it is [DONE]."
        data = {
            "anyOf": [
                json | {"contentSchema": {"anyOf": [refs[model], refs[objects.ErrorBody]]}},
                {"const": "[DONE]"},
            ]
        }
    else:
        data = json | {"contentSchema": refs[model]}
    return {
        "type": "object",
        "description": description,
        "required": ["data"],
        "properties": {"data": data, "event": {"type": "string"}},
    }


def _error(status: int, refs: Refs) -> Schema:
    headers = ["X-Request-Id", "Retry-After"] if status in _RETRY_AFTER else ["X-Request-Id"]
    content = {"application/json": {"schema": refs[objects.ErrorBody]}}
    return {"description": _ERRORS[status], "headers": _header_refs(headers), "content": content}


def _header(type_: str, description: str) -> Schema:
    return {"description": description, "schema": {"type": type_}}


def _header_refs(names: list[str]) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
