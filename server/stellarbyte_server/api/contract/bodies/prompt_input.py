"""Prompts of /v1/completions and inputs of /v1/embeddings: text or token ids."""

from typing import Any, TypeGuard

from pydantic import PlainValidator, WithJsonSchema

from stellarbyte_server.api.contract.bodies.bounds import wrong

MAX_PROMPT_TOKENS = 2**20  # of a prompt given as token ids

PromptInput = str | list[int]

_KINDS = "it must be a string, a list of strings, a list of token ids or a list of those"


def _is_token_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and {*map(type, value)} == {int}


def _prompts(value: object, most: int) -> list[PromptInput]:
    """One or several prompts, each of them text or token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong(_KINDS)
    if value and type(value[0]) is int:
        _check_length(value)
        if _is_token_ids(value):
            return [value]
        raise wrong(_KINDS)
    if len(value) > most:
        raise wrong(f"it has {len(value)} prompts; at most {most} are allowed")
    if not value or [] in value:
        raise wrong("a prompt is empty")
    if all(isinstance(item, str) for item in value):
        return value
    for item in value:
        if not isinstance(item, list):
            raise wrong(_KINDS)
        _check_length(item)
        if not _is_token_ids(item):
            raise wrong(_KINDS)
    return value


def _check_length(token_ids: list[Any]) -> None:
    if len(token_ids) > MAX_PROMPT_TOKENS:
        raise wrong(f"a prompt has {len(token_ids)} token ids; at most {MAX_PROMPT_TOKENS} are allowed")


_TOKEN_IDS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
    "maxItems": MAX_PROMPT_TOKENS,
}


def prompts_at_most(most: int) -> tuple[PlainValidator, WithJsonSchema]:
    """Checks and describes a field with up to `most` prompts."""
    several = {"type": "array", "minItems": 1, "maxItems": most}
    shown = {
        "anyOf": [
            {"type": "string"},
            {**several, "items": {"type": "string"}},
            _TOKEN_IDS_SCHEMA,
            {**several, "items": _TOKEN_IDS_SCHEMA},
        ]
    }
    return PlainValidator(lambda value: _prompts(value, most)), WithJsonSchema(shown)
