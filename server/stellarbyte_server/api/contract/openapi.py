"""The document at /openapi.json: bodies, answers and errors of each route."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from stellarbyte_server.access.rules import Access
from stellarbyte_server.api.contract import objects
from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.operation import Model, Operation

Schema = dict[str, Any]
Refs = dict[Model, Schema]

_EVERYWHERE = (403, 500, 503)

_ERRORS = {
    400: "The request is not valid; `param` names the field.",
    401: "Neither `Authorization: Bearer KEY` nor `x-api-key: KEY` has a valid key.",
    403: "The key does not permit the request or its model; or a server without keys got an unknown host name.",
    404: "The model, adapter, file, batch or route does not exist.",
    408: "The body did not arrive in time.",
    409: "Another call is loading this adapter.",
    413: "The body is larger than the server's --max-body-bytes, or an uploaded file than --max-file-bytes.",
    429: "Too many requests are waiting, or the key is at one of its limits.",
    500: "The server failed.",
    502: "The host of the adapter cannot be reached or fails.",
    503: "The engine has ended or does not answer, the server is shutting down, the request waited too long, or a"
    " file could not be stored.",
    504: "The host of the adapter does not answer in time.",
}
_RETRY_AFTER = {429, 503}


def make_document(
    operations: Mapping[tuple[str, str], Operation], model_name: str, *, allows_unknown_fields: bool
) -> Schema:
    """An OpenAPI 3.1 document of all operations, by method and path, for a server of this model."""
    refs, models = _models(operations.values(), _LenientSchemas if allows_unknown_fields else _Schemas)
    for schema in models.values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"]["examples"] = [model_name]
    paths: dict[str, Schema] = {}
    for (method, path), operation in operations.items():
        paths.setdefault(path, {})[method] = _operation(method, path, operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "StellarByte", "version": version("stellarbyte")},
        "paths": paths,
        "components": {
            "schemas": models,
            "responses": {
                _error_name(status, error): _error(status, refs[error])
                for error in dict.fromkeys(operation.error for operation in operations.values())
                for status in _ERRORS
            },
            "headers": {
                "X-Request-Id": _header("string", "The request's id in the server's log."),
                "X-Ignored-Fields": _header(
                    "string", "Fields that were ignored, by /v1/messages or with --unknown-fields warn."
                ),
                "Retry-After": _header("integer", "Seconds until a retry."),
            },
            "securitySchemes": {
                "adminKey": {"type": "http", "scheme": "bearer", "description": "The server's --admin-api-key."},
                "key": {"type": "http", "scheme": "bearer", "description": "One of --api-key, or of the file --keys."},
                "keyHeader": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "x-api-key",
                    "description": "Any of these keys, as clients of Anthropic's API send it.",
                },
            },
        },
    }


class _Schemas(GenerateJsonSchema):
    """Schemas without titles of fields and without null defaults of optional fields."""

    unknown_fields: ClassVar[Schema | bool] = {"type": "null"}  # of models whose unknown fields `bodies.body` checks

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
            ignores_unknown = getattr(schema["cls"], "ignores_unknown", False)
            described["additionalProperties"] = True if ignores_unknown else self.unknown_fields
        return described


class _LenientSchemas(_Schemas):
    unknown_fields = True


def _models(operations: Iterable[Operation], schemas_class: type[_Schemas]) -> tuple[Refs, dict[str, Schema]]:
    """A reference to each model of the operations, and all models by their names in the references."""
    named: set[Model] = {objects.ErrorBody}
    for operation in operations:
        named.update(operation.bodies)
        others = (operation.answer, operation.event, operation.form, operation.error)
        named.update(model for model in others if isinstance(model, type))
    inputs: list[tuple[Model, Literal["validation"]]] = [
        (model, "validation") for model in sorted(named, key=lambda model: model.__name__)
    ]
    refs, definitions = models_json_schema(
        inputs, ref_template="#/components/schemas/{model}", schema_generator=schemas_class
    )
    return {model: refs[model, "validation"] for model in named}, definitions["$defs"]


def _operation(method: str, path: str, operation: Operation, refs: Refs) -> Schema:
    access = operation.access
    statuses = sorted({*operation.errors, *_EVERYWHERE, *(() if access is Access.OPEN else (401,))})
    described: Schema = {
        "operationId": "_".join([method, *path.replace("{", "").replace("}", "").strip("/").split("/")]),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            "200": _answer(operation, refs),
            **{
                str(status): {"$ref": f"#/components/responses/{_error_name(status, operation.error)}"}
                for status in statuses
            },
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in operation.path_parameters
    ]
    if operation.query is not None:
        parameters += _query_parameters(operation.query)
    if parameters:
        described["parameters"] = parameters
    if operation.form is not None:
        content = {"multipart/form-data": {"schema": refs[operation.form]}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.bodies:
        bodies = [refs[body] for body in operation.bodies]
        schema = bodies[0] if len(bodies) == 1 else {"oneOf": bodies}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if access is not Access.OPEN:  # {}: no key, if the server has none; operator's routes from its machine
        of_user: list[Schema] = [{"key": []}, {"keyHeader": []}] if access is Access.USER else []
        described["security"] = [{"adminKey": []}, *of_user, {}]
    return described


def _query_parameters(model: Model) -> list[Schema]:
    """Remove null, which a URL cannot express, from optional parameters."""
    parameters = []
    for name, field in model.model_json_schema(schema_generator=_Schemas)["properties"].items():
        (schema,) = [part for part in field["anyOf"] if part != {"type": "null"}]
        parameters.append({"name": name, "in": "query", "description": field["description"], "schema": schema})
    return parameters


def _answer(operation: Operation, refs: Refs) -> Schema:
    content: Schema
    if isinstance(operation.answer, str):
        content = {operation.answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": refs[operation.answer]}}
    headers = ["X-Request-Id"]
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(operation.event, operation.ends_with_done, refs)}
    if any(issubclass(body, Body) for body in operation.bodies):
        headers.append("X-Ignored-Fields")
    return {"description": "The answer.", "headers": _header_refs(headers), "content": content}


def _event(model: Model, ends_with_done: bool, refs: Refs) -> Schema:
    """One server-sent event, by which OpenAPI 3.1 describes streams."""
    json = {"type": "string", "contentMediaType": "application/json"}
    description = "One event of the stream with `stream: true`. After a failure, the last event is an error."
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


def _error_name(status: int, error: Model) -> str:
    """The name of an error response in the document's components; for OpenAI's format it depends on the status only."""
    return str(status) if error is objects.ErrorBody else f"{error.__name__}{status}"


def _error(status: int, ref: Schema) -> Schema:
    headers = ["X-Request-Id", "Retry-After"] if status in _RETRY_AFTER else ["X-Request-Id"]
    content = {"application/json": {"schema": ref}}
    return {"description": _ERRORS[status], "headers": _header_refs(headers), "content": content}


def _header(type_: str, description: str) -> Schema:
    return {"description": description, "schema": {"type": type_}}


def _header_refs(names: list[str]) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
