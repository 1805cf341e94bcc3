"""Fields that are known but not supported, with the values that ask for nothing. Knows no routes.

A body keeps what its class does not declare; here it is decided what of that is refused.
"""

from collections.abc import Callable, Iterator, Mapping

from pydantic import BaseModel

_IsNeutral = Callable[[object], bool]


def _equals(*neutral: object) -> _IsNeutral:
    return lambda value: any(
        value == option and isinstance(value, bool) == isinstance(option, bool) for option in neutral
    )


# By the name of the class of the body, or of the part of one.
_NOT_SUPPORTED: Mapping[str, Mapping[str, _IsNeutral]] = {
    "CompletionBody": {
        "suffix": _equals(""),
    },
    "ChatBody": {
        "functions": _equals([]),
        "function_call": _equals("none", "auto"),
        "modalities": _equals(["text"]),
        "audio": _equals(),
        "prediction": _equals(),
        "reasoning_effort": _equals("none"),
        "verbosity": _equals("medium"),
        "web_search_options": _equals(),
        "prompt_cache_retention": _equals(),
        "chat_template": _equals(),
        "chat_template_kwargs": _equals({}),
        "documents": _equals([]),
    },
    "ResponsesBody": {
        "conversation": _equals(),
        "tools": _equals([]),
        "tool_choice": _equals("none", "auto"),
        "parallel_tool_calls": _equals(True, False),
        "max_tool_calls": _equals(),
        "reasoning": _equals(),
        "background": _equals(False),
        "prompt": _equals(),
        "stream_options": _equals({}),
    },
    "TextSettings": {
        "verbosity": _equals("medium"),
    },
    # What an answer of ours, or of others, carries when it is sent back as a message of the assistant.
    "Message": {
        "refusal": _equals(""),
        "annotations": _equals([]),
        "audio": _equals(),
        "function_call": _equals(),
        "reasoning_content": _equals(""),
        "reasoning": _equals(""),
    },
    "StreamOptions": {
        "include_obfuscation": _equals(False),
        "continuous_usage_stats": _equals(False),
    },
}


def refused_fields(part: BaseModel, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Path of every field that asks for something we do not do, at any depth, and whether it is a known one."""
    known = _NOT_SUPPORTED.get(type(part).__name__, {})
    for name, value in (part.model_extra or {}).items():
        is_neutral = known.get(name)
        if value is None or (is_neutral is not None and is_neutral(value)):
            continue
        yield prefix + name, is_neutral is not None
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        path = prefix + (field.alias or name)
        if isinstance(value, BaseModel):
            yield from refused_fields(value, f"{path}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from refused_fields(item, f"{path}[{i}].")
