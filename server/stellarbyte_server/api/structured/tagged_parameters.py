"""Arguments of models that write each parameter in a tag: strings without quotes, other values as JSON.

<parameter=city>
Paris
</parameter>
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.structured.grammars import json_rule
from stellarbyte_server.api.structured.offered_tools import INPUT, OfferedTool

VALUE_END = "\n</parameter>"
MAX_PARAMETERS = 1000  # of one tool
MAX_RULE_CHARACTERS = 2**18  # of one tool
_MAX_REFERENCES = 8  # in a chain
_MAX_PARTS = 200  # of one schema; further parts are ignored

# text: a string without quotes. nullable: likewise, but null is null. json: JSON. any: JSON if it is valid, else text.
Kind = Literal["text", "nullable", "json", "any"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    name: str
    kind: Kind
    schema: Mapping[str, Any]
    is_required: bool
    choices: tuple[str, ...] | None = None  # the allowed texts; None: any


def parameters_of(schema: Mapping[str, Any] | None) -> list[Parameter]:
    """The properties named by an object's schema: at its root, behind a $ref, or in a part of allOf, anyOf or oneOf."""
    if schema is None:
        return []
    properties: dict[str, Any] = {}
    required: set[str] = set()
    for part, is_certain in _parts(schema, schema, True, set()):
        named, wanted = part.get("properties"), part.get("required")
        properties = {**(named if isinstance(named, dict) else {}), **properties}
        if is_certain and isinstance(wanted, list):
            required.update(name for name in wanted if isinstance(name, str))
    return [_parameter(name, value, schema, name in required) for name, value in properties.items()]


def _parts(
    node: Any, root: Mapping[str, Any], is_certain: bool, seen: set[tuple[int, bool]]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The schemas that apply to an object certainly (True) or possibly, each once."""
    if not isinstance(node, dict) or (id(node), is_certain) in seen or len(seen) > _MAX_PARTS:
        return
    seen.add((id(node), is_certain))
    yield node, is_certain
    if "$ref" in node:
        yield from _parts(_target(node["$ref"], root), root, is_certain, seen)
    for keyword in ("allOf", "anyOf", "oneOf"):
        for branch in _list(node.get(keyword)):
            yield from _parts(branch, root, is_certain and keyword == "allOf", seen)


def _target(reference: Any, root: Mapping[str, Any]) -> Any:
    """The target of a reference such as "#/$defs/NAME", or None."""
    steps = reference.split("/") if isinstance(reference, str) else []
    if len(steps) != 3 or steps[0] != "#" or steps[1] not in ("$defs", "definitions"):
        return None
    named = root.get(steps[1])
    return named.get(steps[2].replace("~1", "/").replace("~0", "~")) if isinstance(named, dict) else None


def _parameter(name: str, schema: Any, root: Mapping[str, Any], is_required: bool) -> Parameter:
    node, is_nullable = _without_null(schema, root)
    choices = _choices(node)
    kind: Kind = "json"
    if choices is not None or _is_any_text(node):
        kind = "nullable" if is_nullable else "text"
    return Parameter(name=name, kind=kind, schema=schema, is_required=is_required, choices=choices)


def _without_null(schema: Any, root: Mapping[str, Any]) -> tuple[Any, bool]:
    """The schema of a value other than null, and whether null is allowed."""
    node, is_nullable = schema, False
    for _ in range(_MAX_REFERENCES):
        if not isinstance(node, dict):
            break
        if "$ref" in node:
            node = _target(node["$ref"], root)
        elif len(branches := _list(node.get("anyOf"))) == 2 and {"type": "null"} in branches:
            node, is_nullable = next((each for each in branches if each != {"type": "null"}), None), True
        elif isinstance(types := node.get("type"), list) and len(types) == 2 and "null" in types:
            node, is_nullable = node | {"type": next((each for each in types if each != "null"), "null")}, True
        else:
            break
    return node, is_nullable


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _choices(node: Any) -> tuple[str, ...] | None:
    values = [node["const"]] if isinstance(node, dict) and "const" in node else None
    if values is None and isinstance(node, dict) and isinstance(node.get("enum"), list):
        values = [value for value in node["enum"] if value is not None]
    if not values or not all(isinstance(value, str) and VALUE_END not in f"\n{value}" for value in values):
        return None
    return tuple(dict.fromkeys(values))


def _is_any_text(node: Any) -> bool:
    """Whether a schema allows any string. Strings of other schemas are written as JSON, whose grammar enforces them."""
    limits = ("pattern", "format", "minLength", "maxLength", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if")
    return isinstance(node, dict) and node.get("type") == "string" and not any(limit in node for limit in limits)


def is_open(tool: OfferedTool) -> bool:
    """Whether a function takes parameters of any name, because its schema names none."""
    schema = tool.parameters
    return schema is not None and schema.get("additionalProperties") is not False and not parameters_of(schema)


def kinds_of(tool: OfferedTool) -> dict[str, Kind]:
    """The kind of each named parameter's value; all others have the kind any."""
    return {INPUT: "text"} if tool.is_custom else {each.name: each.kind for each in parameters_of(tool.parameters)}


def tagged_rules(rule: str, tool: OfferedTool) -> list[str]:
    """Rules in Lark for the arguments of a function; ApiError for a schema that cannot be enforced."""
    path = f"{tool.path}.parameters"
    if is_open(tool):
        return [
            f"{rule}: ({rule}_name {rule}_value)*",
            f'{rule}_name: "<parameter=" /[a-zA-Z_][a-zA-Z0-9_.-]{{0,63}}/ ">\\n"',
            *text_rule(f"{rule}_value"),
        ]
    parameters = parameters_of(tool.parameters)
    if len(parameters) > MAX_PARAMETERS:
        raise bad_request(f"The schema has more than {MAX_PARAMETERS} properties.", path)
    named = [f"{rule}_{i}" if each.is_required else f"{rule}_{i}?" for i, each in enumerate(parameters)]
    rules = [f"{rule}: {' '.join(named)}"]
    num_characters = 0
    for i, parameter in enumerate(parameters):
        if any(sign in parameter.name for sign in ">\n"):
            raise bad_request(f"The schema has a property that this model cannot write: {parameter.name!r:.80}.", path)
        more = _rules_of(f"{rule}_{i}", parameter, tool, path)
        num_characters += sum(map(len, more))
        if num_characters > MAX_RULE_CHARACTERS:
            raise bad_request("The schema is too large for this model's calls.", path)
        rules += more
    return rules


def _rules_of(rule: str, parameter: Parameter, tool: OfferedTool, path: str) -> list[str]:
    root = tool.parameters or {}
    opening = json.dumps(f"<parameter={parameter.name}>\n", ensure_ascii=False)
    if parameter.choices is not None:
        texts = [*parameter.choices, *(["null"] if parameter.kind == "nullable" else [])]
        values = " | ".join(json.dumps(f"{text}{VALUE_END}\n", ensure_ascii=False) for text in dict.fromkeys(texts))
        return [f"{rule}: {opening} ({values})"]
    if parameter.kind != "json":
        return [f"{rule}: {opening} {rule}_value", *text_rule(f"{rule}_value")]
    schema = parameter.schema
    if isinstance(schema, dict) and "$ref" in json.dumps(schema):
        schema = {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **schema}
    value = json_rule(f"{rule}_value", schema, path, strict=tool.strict).strip()  # type: ignore[arg-type]
    return [f"{rule}: {opening} {rule}_value {json.dumps(f'{VALUE_END}' + chr(10))}", value]


def text_rule(rule: str) -> list[str]:
    """A rule for any text up to the first VALUE_END."""
    return [f"{rule}[lazy]: /(?s:.*)/ {json.dumps(VALUE_END + chr(10))}"]
