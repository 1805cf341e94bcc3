"""The grammar of a custom tool's input: any text, a regular expression, or a grammar in Lark.

If the model writes arguments as JSON, the input is a string named `input`. An input with a grammar in Lark is written
without escapes and ends with the answer, because its text may contain any end mark.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.structured.json_patterns import rust_pattern
from stellarbyte_server.api.structured.offered_tools import INPUT, OfferedTool
from stellarbyte_server.api.structured.tagged_parameters import VALUE_END, text_rule

LAST_INPUT = f'{{"{INPUT}": "'  # precedes an input that ends the answer, if arguments are JSON
_DIRECTIVE = re.compile(r"%(json|lark|regex|llguidance)\b")
_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)  # an existing escape, or a character to escape


def input_schema(tool: OfferedTool) -> dict[str, Any]:
    """A schema of the custom tool's arguments, for the model and for JSON formats."""
    text: dict[str, Any] = {"type": "string"}
    if tool.grammar is not None and tool.grammar.syntax == "regex":
        text["pattern"] = f"^(?:{_without_anchors(tool.grammar.definition)})$"
    return {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}


def input_description(tool: OfferedTool) -> str:
    """The description of the tool and its input, for the model."""
    lines = [] if tool.description is None else [tool.description]
    if tool.grammar is not None:
        kind = "this grammar in Lark" if tool.grammar.syntax == "lark" else "this regular expression"
        lines.append(f"The {INPUT} follows {kind}:\n{tool.grammar.definition}")
    return "\n\n".join(lines)


def input_rules(rule: str, tool: OfferedTool, *, is_tagged: bool) -> Iterator[str]:
    """Rules in Lark for an input that is written without escapes; ApiError for a grammar that cannot be used.

    A custom tool's own grammar in Lark is referenced by the rule's name: see `input_grammar`.
    """
    opening = json.dumps(f"<parameter={INPUT}>\n" if is_tagged else LAST_INPUT)
    if tool.grammar is None:
        yield f"{rule}: {opening} {rule}_value"
        yield from text_rule(f"{rule}_value")
    elif tool.grammar.syntax == "regex":
        path = f"{tool.path}.format.grammar.definition"
        try:
            pattern = rust_pattern(_without_anchors(tool.grammar.definition))
        except ValueError as error:
            message = f"The field '{path}' contains {json.dumps(str(error))}, which is not supported."
            raise bad_request(message, path) from None
        yield f"{rule}: {opening} {rule.upper()}_VALUE"
        yield f"{rule.upper()}_VALUE: /(?:{_SLASH.sub(_escaped, pattern)})/ {json.dumps(VALUE_END + chr(10))}"
    else:
        yield f"{rule}: {opening} @{rule}"


def input_grammar(rule: str, tool: OfferedTool) -> dict[str, str]:
    """The tool's grammar as an entry of llguidance's `grammars`; ApiError for llguidance's extensions of Lark."""
    assert tool.grammar is not None and tool.grammar.syntax == "lark"
    path = f"{tool.path}.format.grammar.definition"
    if (directive := _DIRECTIVE.search(tool.grammar.definition)) is not None:
        message = f"The field '{path}' has the directive {directive[0]}, which is not supported."
        raise bad_request(message, path)
    return {"name": rule, "lark_grammar": tool.grammar.definition}


def _without_anchors(pattern: str) -> str:
    """The pattern without outer anchors, which are redundant because patterns must match the whole input."""
    if "|" in pattern:
        return pattern
    return pattern.removeprefix("^") if pattern.endswith("\\$") else pattern.removeprefix("^").removesuffix("$")


def _escaped(match: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(match[0], match[0])
