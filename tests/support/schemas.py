"""JSON schemas that any model fulfils within 60 tokens, and the refusals of others."""

import asyncio
from typing import Any

import pytest

from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.structured.grammars import checked, json_grammar
from stellarbyte_server.tokens.text_work import TextWork

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
]


def refusal(schema: Any, *, strict: bool = True) -> str:
    with pytest.raises(ApiError) as caught:
        asyncio.run(checked(json_grammar(schema, strict=strict), "response_format", TextWork(), ""))
    assert caught.value.status == 400 and caught.value.param == "response_format"
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 400
    return sentence
