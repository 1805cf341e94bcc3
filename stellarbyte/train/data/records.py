"""The text of an object or a row: one field, or several by a template."""

from collections.abc import Callable
from typing import Any

from stellarbyte.train.config.sources import Source, template_fields

_NAMES = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}


def text_reader(source: Source) -> Callable[[Any], str]:
    """The function from an object to its text. The function raises ValueError with the end of a sentence."""
    if source.template is None:
        return lambda record: _text(record, source.field)
    parts = template_fields(source.template)

    def fill(record: Any) -> str:
        return "".join(before + ("" if field is None else _text(record, field)) for before, field in parts)

    return fill


def field_names(source: Source) -> list[str]:
    """The fields that `text_reader` reads."""
    if source.template is None:
        return [source.field]
    return [field for _, field in template_fields(source.template) if field is not None]


def _text(record: Any, field: str) -> str:
    """A text, or a list of texts as lines."""
    value = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"has no field {field}")
        value = value[name]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise ValueError(f"has {_NAMES.get(type(value), 'null')} as {field}; a text or a list of texts is needed")
