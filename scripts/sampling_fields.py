"""`python -m scripts.sampling_fields` writes the clients' lists of sampling fields from the bodies of the API."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stellarbyte_server.api.contract.openapi import make_document
from stellarbyte_server.api.endpoints import OPERATIONS

ROOT = Path(__file__).parents[1]
MAX_SAFE_INTEGER = 2**53 - 1  # of JavaScript

# The fields that each client offers, in the order in which it shows them.
OF_WEB = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "seed",
    "repetition_penalty",
    "stop",
    "context_overflow",
)
OF_TERMINAL = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "context_overflow",
)

_SOURCE = "Written by `python -m scripts.sampling_fields` from the server's API."


def web_text() -> str:
    """stellarbyte_web/sampling-fields.js."""
    rows = "".join(f"  {{ {', '.join(_members(_web_field(name)))} }},\n" for name in OF_WEB)
    return (
        f"// The sampling controls and their bounds. {_SOURCE}\n\n"
        f"export const SAMPLING_FIELDS = /** @type {{const}} */ ([\n{rows}]);\n"
    )


def terminal_text() -> str:
    """stellarbyte_client/terminal/sampling_fields.py."""
    rows = "".join(f"    {json.dumps(name)}: {_python(_terminal_kind(name))},\n" for name in OF_TERMINAL)
    return (
        '"""The sampling fields of a request and the kinds of their values."""\n\n'
        f"# {_SOURCE}\n"
        f"SAMPLING_FIELDS: dict[str, str | tuple[str, ...]] = {{\n{rows}}}\n"
    )


TARGETS = {
    ROOT / "clients/web/stellarbyte_web/sampling-fields.js": web_text,
    ROOT / "clients/python/stellarbyte_client/terminal/sampling_fields.py": terminal_text,
}


def _schema(name: str) -> dict[str, Any]:
    """The schema of a chat's field without null; of a list or string, the list."""
    document = make_document(OPERATIONS, "", allows_unknown_fields=False)
    field = document["components"]["schemas"]["ChatBody"]["properties"][name]
    kinds: list[dict[str, Any]] = [kind for kind in field["anyOf"] if kind.get("type") != "null"]
    return kinds[-1]


def _web_field(name: str) -> dict[str, Any]:
    schema = _schema(name)
    if "enum" in schema:
        return {"name": name, "kind": "choice", "choices": schema["enum"]}
    if schema["type"] == "array":
        bounds = {"maxLines": schema["maxItems"], "maxCharacters": schema["items"]["maxLength"]}
        return {"name": name, "kind": "lines", **bounds}
    highest = schema["maximum"] if "maximum" in schema else schema["exclusiveMaximum"] - 1
    bounds = {"min": max(schema["minimum"], -MAX_SAFE_INTEGER), "max": min(highest, MAX_SAFE_INTEGER)}
    return {"name": name, "kind": schema["type"], **bounds}


def _members(field: dict[str, Any]) -> Iterator[str]:
    for key, value in field.items():
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        yield f"{key}: {json.dumps(number)}"


def _terminal_kind(name: str) -> str | tuple[str, ...]:
    schema = _schema(name)
    return tuple(schema["enum"]) if "enum" in schema else str(schema["type"])


def _python(kind: str | tuple[str, ...]) -> str:
    return json.dumps(kind) if isinstance(kind, str) else f"({', '.join(map(json.dumps, kind))})"


if __name__ == "__main__":
    for path, text in TARGETS.items():
        path.write_text(text(), encoding="utf-8")
