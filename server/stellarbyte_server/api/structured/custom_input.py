"""The input of a custom tool as a grammar: a text, a regular expression, or a grammar in Lark.

Where a model writes arguments as JSON, the input is a string of that name. A grammar in Lark is written into it as it
is, without escapes, and ends with the answer: no mark could tell its end from its text.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.structured.json_patterns import rust_pattern
from stellarbyte_server.api.structured.offered_tools import INPUT, OfferedTool
from stellarbyte_server.api.structured.tagged_parameters import VALUE_END, text_rule

LAST_INPUT = f'{{"{INPUT}": "'  # before an input that ends the answer, where arguments are JSON
_DIRECTIVE = re.compile(r"%(json|lark|regex|llguidance)\b")
_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)  # of which a backslash already has its own


def input_schema(tool: OfferedTool) -> dict[str, Any]:
    """The arguments of a custom tool as the schema of a function's, for the model and for formats of JSON."""
    text: dict[str, Any] = {"type": "string"}
    if tool.grammar is not None and tool.grammar.syntax == "regex":
        text["pattern"] = f"^(?:{_without_anchors(tool.grammar.definition)})$"
    return {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}


def input_description(tool: OfferedTool) -> str:
    """What the tool does and what its input is, for the model."""
    lines = [] if tool.description is None else [tool.description]
    if tool.grammar is not None:
        kind = "this grammar in Lark" if tool.grammar.syntax == "lark" else "this regular expression"
        lines.append(f"The {INPUT} follows {kind}:\n{tool.grammar.definition}")
    return "\n\n".join(lines)


def input_rules(rule: str, tool: OfferedTool, *, is_tagged: bool) -> Iterator[str]:
    """Rules in Lark for an input that is written without escapes; ApiError for a grammar that cannot be used.

    A grammar in Lark is one of `input_grammars`, by the name of the rule.
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
            message = f"The field '{path}' has {json.dumps(str(error))} in it, which is not supported."
            raise bad_request(message, path) from None
        yield f"{rule}: {opening} {rule.upper()}_VALUE"
        yield f"{rule.upper()}_VALUE: /(?:{_SLASH.sub(_escaped, pattern)})/ {json.dumps(VALUE_END + chr(10))}"
    else:
        yield f"{rule}: {opening} @{rule}"


def input_grammar(rule: str, tool: OfferedTool) -> dict[str, str]:
    """A grammar in Lark as llguidance has one of several; ApiError for what it could do beyond Lark."""
    assert tool.grammar is not None and tool.grammar.syntax == "lark"
    path = f"{tool.path}.format.grammar.definition"
    if (directive := _DIRECTIVE.search(tool.grammar.definition)) is not None:
        message = f"The field '{path}' has the directive {directive[0]}, which is not supported."
        raise bad_request(message, path)
    return {"name": rule, "lark_grammar": tool.grammar.definition}


def _without_anchors(pattern: str) -> str:
    """Regular expressions are for the whole input."""
    if "|" in pattern:
        return pattern
    return pattern.removeprefix("^") if pattern.endswith("\\$") else pattern.removeprefix("^").removesuffix("$")


def _escaped(match: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(match[0], match[0])
