"""Objects of answers, compared with the document at /openapi.json."""

from typing import Any

from jsonschema import Draft202012Validator


def conforms(document: dict[str, Any], name: str, value: object) -> bool:
    """Whether the document's schema of that name allows a value."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return Draft202012Validator(schema).is_valid(value)
