"""The bodies of POST /v1/score and /v1/rerank."""

from typing import Annotated

from pydantic import Field, PlainValidator, WithJsonSchema

from stellarbyte_server.api.contract.bodies.bounds import wrong
from stellarbyte_server.api.contract.bodies.embeddings import MAX_INPUTS, PoolingFields
from stellarbyte_server.api.contract.bodies.fields import optional, required


def _texts(value: object) -> list[str]:
    """One text or several."""
    return _documents([value] if isinstance(value, str) else value)


def _documents(value: object) -> list[str]:
    """Texts, each a string or {"text"}; their number is checked first."""
    if not isinstance(value, list):
        raise wrong("it must be a list of strings")
    if len(value) > MAX_INPUTS:
        raise wrong(f"it has {len(value)} items; at most {MAX_INPUTS} are allowed")
    if not value:
        raise wrong("it has no items")
    texts = []
    for item in value:
        text = item["text"] if isinstance(item, dict) and item.keys() == {"text"} else item
        if not isinstance(text, str) or not text:
            raise wrong("its items must be non-empty texts")
        texts.append(text)
    return texts


_TEXT = {"type": "string", "minLength": 1}
_OBJECT = {"type": "object", "properties": {"text": _TEXT}, "required": ["text"], "additionalProperties": False}
_ITEM = {"anyOf": [_TEXT, _OBJECT | {"maxProperties": 1}]}
_LIST = {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": MAX_INPUTS}
Texts = Annotated[list[str], PlainValidator(_texts), WithJsonSchema({"anyOf": [_TEXT, _LIST]})]
Documents = Annotated[list[str], PlainValidator(_documents), WithJsonSchema(_LIST)]


class ScoreBody(PoolingFields):
    text_1: Texts = required("One text, which is compared with each text in text_2, or as many texts as in text_2.")
    text_2: Texts = required("One text or a list of up to 2048, each a string or {text}.")


class RerankBody(PoolingFields):
    query: Annotated[str, Field(min_length=1)] = required("The text to compare with each document.")
    documents: Documents = required("Up to 2048 texts, each a string or {text}.")
    top_n: Annotated[int, Field(ge=1, lt=2**31)] | None = optional(
        "The number of best documents to return. Default: all."
    )
    return_documents: bool | None = optional("Return the documents with their scores. Default: true.")
