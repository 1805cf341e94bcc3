"""Unions discriminated by `type`, so that an error names a field and not a variant."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import Discriminator, Tag

from stellarbyte_server.api.contract.errors import VARIANT

TEXT = "text"  # the variant of a plain string


def variant(name: str) -> Tag:
    """Annotates one variant of a union."""
    return Tag(VARIANT + name)


def by_type(otherwise: str | None = None, same: Mapping[str, str] = MappingProxyType({})) -> Discriminator:
    """Annotates the union; `otherwise` is the variant of an object without a type, and `same` maps types to the variant
    that accepts them.

    Objects of unknown types should be refused before, with an error that lists the types.
    """

    def form(value: Any) -> str:
        if isinstance(value, str):
            return VARIANT + TEXT
        kind = type_of(value) if isinstance(value, dict) else getattr(value, "type", None)
        name = otherwise if kind is None else same.get(kind, kind) if isinstance(kind, str) else None
        return f"{VARIANT}{name}"

    return Discriminator(form, custom_error_type="value", custom_error_message="it should be an object")


def type_of(value: object) -> object:
    """The `type` of an object, unchecked; None for values without one."""
    return value.get("type") if isinstance(value, dict) else None
