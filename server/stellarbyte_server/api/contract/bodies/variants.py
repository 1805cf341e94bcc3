"""Values of several forms are told apart by their `type`, so that an error names a field, and not a form."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import Discriminator, Tag

from stellarbyte_server.api.contract.errors import VARIANT

TEXT = "text"  # the form of a plain string


def variant(name: str) -> Tag:
    """Annotates one form of a union."""
    return Tag(VARIANT + name)


def by_type(otherwise: str | None = None, same: Mapping[str, str] = MappingProxyType({})) -> Discriminator:
    """Annotates the union; `otherwise` is the form of an object without a type, `same` has types of a form of another
    name.

    An object of no form should be refused before it comes here, with an error that says which there are.
    """

    def form(value: Any) -> str:
        if isinstance(value, str):
            return VARIANT + TEXT
        kind = type_of(value) if isinstance(value, dict) else getattr(value, "type", None)
        name = otherwise if kind is None else same.get(kind, kind) if isinstance(kind, str) else None
        return f"{VARIANT}{name}"

    return Discriminator(form, custom_error_type="value", custom_error_message="it should be an object")


def type_of(value: object) -> object:
    """The `type` of an object, as it was sent; None for anything without one."""
    return value.get("type") if isinstance(value, dict) else None
