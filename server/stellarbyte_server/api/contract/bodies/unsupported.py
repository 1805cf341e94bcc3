"""Known fields that are not supported, with their neutral values.

A body keeps fields that its class does not declare; this module decides which of them are refused.
"""

from collections.abc import Iterator, Mapping

from pydantic import BaseModel

Neutral = Mapping[str, tuple[object, ...]]  # field, accepted values in addition to null

_OF_GUIDED: Neutral = {"guided_decoding_backend": (), "guided_whitespace_pattern": ()}
OF_COMPLETIONS: Neutral = {"suffix": ("",), **_OF_GUIDED}
OF_CHATS: Neutral = {
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "prompt_cache_retention": (),
    "chat_template": (),
    "documents": ([],),
    **_OF_GUIDED,
}
OF_RESPONSES: Neutral = {
    "conversation": (),
    "background": (False,),
    "background_options": (),
    "prompt": (),
    "moderation": (),
    "context_management": ([],),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
}
OF_REASONING: Neutral = {"context": ("auto",), "mode": ("standard",)}
OF_RESPONSE_STREAMS: Neutral = {"include_obfuscation": (False,)}
OF_FUNCTION_TOOLS: Neutral = {
    "async": (False,),
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "output_schema": (),
}
OF_TEXT_SETTINGS: Neutral = {"verbosity": ("medium",)}
OF_STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}
OF_STRUCTURED_OUTPUTS: Neutral = {
    "structural_tag": (),
    "whitespace_pattern": (),
    "disable_fallback": (True, False),
    "disable_any_whitespace": (True, False),  # grammars never allow arbitrary white space
    "disable_additional_properties": (False,),
}


def refused_fields(part: BaseModel, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The path of every undeclared field with a value that is not neutral, at any depth, and whether it is known.

    The known fields of a class are its `not_supported`.
    """
    known: Neutral = getattr(part, "not_supported", {})
    for name, value in (part.model_extra or {}).items():
        if value is not None and not any(_equal(value, neutral) for neutral in known.get(name, ())):
            yield prefix + name, name in known
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        path = prefix + (field.alias or name)
        if isinstance(value, BaseModel):
            yield from refused_fields(value, f"{path}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):  # all items are models, or none is
            for i, item in enumerate(value):
                yield from refused_fields(item, f"{path}[{i}].")


def _equal(value: object, neutral: object) -> bool:
    """Equality that distinguishes true from 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
