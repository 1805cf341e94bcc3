"""The server's OpenAPI document as Markdown: every route, field, bound and error. Knows no routes of its own.

An unknown keyword of a schema is a ValueError, so that no part of the document is omitted.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_REF = "#/components/schemas/"
_SILENT = {"title", "description", "examples"}  # shown elsewhere, or examples of a server's own model
_LENGTHS = {
    "string": ("minLength", "maxLength", " characters"),
    "array": ("minItems", "maxItems", ""),
    "object": ("minProperties", "maxProperties", " entries"),
}
_BOUNDS = {
    "exclusiveMinimum": "above {}",
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


def api_markdown(document: Schema) -> str:
    """The routes by tag, the errors, then the objects of both."""
    schemas = document["components"]["schemas"]
    lines: list[str] = []
    tag = ""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if operation["tags"][0] != tag:
                tag = operation["tags"][0]
                lines += [f"## {tag}", ""]
            lines += [*_operation(method.upper(), path, operation, document), ""]
    lines += ["## Errors", "", _error_forms(document), "", *_errors(document), ""]
    lines += ["## Objects", "", "The objects of bodies and answers.", ""]
    bodies = {name for item in document["paths"].values() for each in item.values() for name in _body_names(each)}
    for name in sorted(schemas.keys() - bodies):
        lines += [f"### {name}", "", *_object(schemas[name], is_answer=name in _of_answers(document)), ""]
    return "\n".join(lines)


def _operation(method: str, path: str, operation: Schema, document: Schema) -> Iterator[str]:
    yield f"### {method} {path}"
    yield ""
    yield f"{operation['summary']}. {_who(operation.get('security'))}"
    yield ""
    for parameter in operation.get("parameters", ()):
        place = "path" if parameter["in"] == "path" else "query"
        yield f"In the {place}: `{parameter['name']}`. {parameter['description']}"
        yield ""
    names = list(_body_names(operation))
    for name in names:
        yield "**Body:**" if name == names[0] else "**Or:**"
        yield ""
        yield from _object(document["components"]["schemas"][name], is_answer=False)
        yield ""
    yield from _answers(operation["responses"]["200"]["content"])
    statuses = (status for status in operation["responses"] if status != "200")
    yield f"**Errors:** {', '.join(f'[{status}](#errors)' for status in statuses)}"


def _error_forms(document: Schema) -> str:
    """What errors look like, and on which paths they look different."""
    paths: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for operation in item.values():
            response = operation["responses"]["500"]["$ref"].rpartition("/")[2]
            schema = document["components"]["responses"][response]["content"]["application/json"]["schema"]["$ref"]
            paths.setdefault(schema, []).append(f"`{path}`")
    others = [f"; of {', '.join(paths[schema])} a {_link(schema)}" for schema in paths if schema != f"{_REF}ErrorBody"]
    return f"Always an {_link(_REF + 'ErrorBody')}{''.join(others)}."


def _errors(document: Schema) -> Iterator[str]:
    yield "| status | when |"
    yield "|---|---|"
    for status, response in document["components"]["responses"].items():
        if not status.isdecimal():  # the same in another form
            continue
        again = (
            " `Retry-After` says after how many seconds to try again." if "Retry-After" in response["headers"] else ""
        )
        yield f"| {status} | {response['description']}{again} |"


def _who(security: list[Schema] | None) -> str:
    if security is None:
        return "Needs no key."
    if any("key" in each for each in security):
        return "Needs any key, if the server has keys."
    return "Needs the admin key; without any key only from the server's own machine."


def _body_names(operation: Schema) -> Iterator[str]:
    if "requestBody" in operation:
        (content,) = operation["requestBody"]["content"].values()
        schema = content["schema"]
        yield from (_name(part["$ref"]) for part in schema.get("oneOf", [schema]))


def _answers(content: Schema) -> Iterator[str]:
    for media_type, answer in content.items():
        schema = answer["schema"]
        if media_type == "application/json":
            yield f"**Answer:** {_link(schema['$ref'])}"
        elif media_type == "text/event-stream":
            data = ", ".join(map(_link, dict.fromkeys(_refs(schema))))
            yield f"**Stream:** {schema['description']} Its data: {data}."
        else:
            yield f"**Answer:** `{media_type}`"
        yield ""


def _object(schema: Schema, *, is_answer: bool) -> Iterator[str]:
    """A description, and a table of the fields, if any."""
    if "description" in schema:
        yield schema["description"]
        yield ""
    if "properties" not in schema:
        yield f"{_upper_first(_type(schema))}."
        return
    required = schema.get("required", ())
    yield "| field | type | what |"
    yield "|---|---|---|"
    fields = schema["properties"].items()
    for name, field in fields if is_answer else sorted(fields, key=lambda field: field[0] not in required):
        note = ""
        if not is_answer and name in required:
            note = " required"
        elif is_answer and name not in required:
            note = " may be absent"
        text = _type(field) if is_answer else _type(_without_null(field))
        yield f"| `{name}`{note} | {text} | {field.get('description', '')} |"


def _without_null(schema: Schema) -> Schema:
    """A request's field without null, which always means absent."""
    others = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    if not others or len(others) == len(schema["anyOf"]):
        return schema
    return others[0] if len(others) == 1 else schema | {"anyOf": others}


def _type(schema: Schema) -> str:
    """A type with its bounds, in words."""
    *others, last = dict.fromkeys(_alternatives(schema))
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(schema: Schema) -> Iterator[str]:
    said = schema.keys() - _SILENT
    if not said:
        yield "anything"
    elif said == {"$ref"}:
        yield _link(schema["$ref"])
    elif said <= {"anyOf", "oneOf"}:
        for key in said:
            for part in schema[key]:
                yield from _alternatives(part)
    elif said <= {"const", "enum", "type"} and said != {"type"}:
        yield from map(_value, schema.get("enum", [schema.get("const")]))
    else:
        yield _one_type(schema, said)


def _one_type(schema: Schema, said: set[str]) -> str:
    kind = schema["type"]
    bounds = ", ".join(_bounds(kind, schema))
    known = {"type", *_BOUNDS, *_LENGTHS.get(kind, ())}
    content = ""
    if kind == "array":
        known.add("items")
        items = list(_alternatives(schema.get("items", {})))
        if schema.get("maxItems") == 0:
            return "empty array"
        if items != ["anything"]:
            content = f" of {items[0]}" if len(items) == 1 else f" of ({_type(schema['items'])})"
    elif kind == "object":
        known |= {"additionalProperties", "properties", "propertyNames", "required"}
        others = schema.get("additionalProperties")
        if "properties" in schema:
            content = f" of {', '.join(f'`{name}`' for name in schema['properties'])}"
        elif isinstance(others, dict) and others != {"type": "null"}:
            content = f" of {_type(others)}"
        if "propertyNames" in schema:
            content += f", its keys {_type(schema['propertyNames'])}"
    elif kind == "string":
        known.add("pattern")
        if schema.get("format") == "binary":
            known.add("format")
            kind = "file"
    if said - known:
        raise ValueError(f"no words for {sorted(said - known)} in {schema}")
    return f"{kind} ({bounds}){content}" if bounds else f"{kind}{content}"


def _bounds(kind: str, schema: Schema) -> Iterator[str]:
    if kind in _LENGTHS:
        least, most, unit = _LENGTHS[kind]
        yield from (f"{words}{unit}" for words in _range(schema.get(least), schema.get(most)))
    if "minimum" in schema and "maximum" in schema:
        yield from _range(schema["minimum"], schema["maximum"])
    else:
        yield from (words.format(_number(schema[key])) for key, words in _BOUNDS.items() if key in schema)
    if "pattern" in schema:
        yield f"`{schema['pattern']}`"


def _range(least: float | None, most: float | None) -> Iterator[str]:
    if least is not None and most is not None:
        yield f"{_number(least)} to {_number(most)}"
    elif least is not None:
        yield f"at least {_number(least)}"
    elif most is not None:
        yield f"at most {_number(most)}"


def _number(value: float) -> str:
    """A number; bounds of machine words as powers of two."""
    size = abs(int(value))
    if size >= 2**31 and size.bit_count() == 1:
        return f"{'−' if value < 0 else ''}2<sup>{size.bit_length() - 1}</sup>"
    return str(value).replace("-", "−")


def _value(value: object) -> str:
    return "null" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _name(ref: str) -> str:
    return ref.removeprefix(_REF)


def _link(ref: str) -> str:
    name = _name(ref)
    return f"[{name}](#{name.lower()})"


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _of_answers(document: Schema) -> set[str]:
    """The objects of answers."""
    schemas = document["components"]["schemas"]
    found: set[str] = set()
    names = [name for item in document["paths"].values() for each in item.values() for name in _refs(each["responses"])]
    names += _refs(document["components"]["responses"])
    while names:
        name = names.pop()
        if name not in found:
            found.add(name)
            names += _refs(schemas[name])
    return found


def _refs(part: object) -> list[str]:
    return re.findall(f'"{_REF}(\\w+)"', json.dumps(part))
