"""A grammar restricts calls of tools to the format that the model knows.

A grammar (llguidance's Lark) lets the model write nothing but text and calls of the offered tools.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stellarbyte_server.api.contract.bodies.tools import Choice, FunctionTool, NamedTool
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.structured.grammars import json_rule

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a model writes a call: trigger, begin, {"name": NAME, ARGUMENTS_KEY: {...}}, end."""

    trigger: str  # ends free text; "": a call is the whole answer
    begin: str
    arguments_key: str
    end: str
    separator: str | None  # between calls; None: there is one at most


HERMES = ToolFormat(
    trigger="<tool_call>", begin="\n", arguments_key="arguments", end="\n</tool_call>", separator="\n"
)  # Qwen 2.5 and 3, Hermes
LLAMA = ToolFormat(trigger="", begin="", arguments_key="parameters", end="", separator=None)  # Llama 3.1 and later


def callable_tools(tools: Sequence[FunctionTool], choice: Choice) -> Iterator[tuple[int, FunctionTool]]:
    """The tools that a choice lets the model call, with their places in the request."""
    for i, tool in enumerate(tools):
        if choice in ("auto", "required") or (
            isinstance(choice, NamedTool) and choice.function.name == tool.function.name
        ):
            yield i, tool


def tools_grammar(
    tools: Sequence[FunctionTool],
    choice: Choice,
    parallel: bool,
    format: ToolFormat,
    content_rule: str | None = None,
) -> str | None:
    """What an answer has to be, in llguidance's Lark; None: any text, or `content_rule` if there is one.

    Free text may hold anything but the trigger, after which a call has to follow. `content_rule` is a rule in Lark
    that an answer without calls follows instead of being free. A named tool is called exactly once. ApiError for a
    schema that cannot be enforced.
    """
    called = list(callable_tools(tools, choice))
    if not called:
        return None
    is_one = format.separator is None or not parallel or isinstance(choice, NamedTool)
    more = "" if is_one else f" ({_quoted(format.separator or '')} call)*"
    rules = []
    if choice != "auto":
        rules.append(f"start: call{more}")
    elif content_rule is not None:
        rules += [f"start: {content_rule.partition(':')[0].strip()} | call{more}", content_rule]
    elif format.trigger:
        # The lazy lexeme ends with the first trigger; there it wins over TEXT.
        rules += [f"start: TEXT | text_and_trigger body{more}", "TEXT: /(?s:.*)/"]
        rules.append(f"text_and_trigger[lazy]: TEXT {_quoted(format.trigger)}")
    else:
        rules += [f"start: TEXT | call{more}", r'TEXT: /(?s:.*)/ & ~/\s*\{\s*"name"\s*:(?s:.*)/']
    # The lexer takes the longest lexeme. So beside TEXT a call begins with one that is longer than TEXT can be. Beside
    # JSON its lexemes are those of JSON, or no other key could stand there, up to the one that tells it is a call.
    is_beside_json = choice == "auto" and content_rule is not None
    head = _quoted(format.begin + '{"name": ')
    if is_beside_json and not format.trigger:
        head = " ".join(_quoted(lexeme) for lexeme in ("{", '"name"', ": "))
    rules.append(f"call: {_quoted(format.trigger)} body" if format.trigger else "call: body")
    rules.append(f"body: {head} ({' | '.join(f'tool_{i}' for i, _ in called)}) {_quoted('}' + format.end)}")
    for i, tool in called:
        name, key = f'"{tool.function.name}"', f'"{format.arguments_key}": '
        name_and_key = [name, ", ", key] if is_beside_json else [f"{name}, {key}"]
        rules.append(f"tool_{i}: {' '.join(_quoted(lexeme) for lexeme in name_and_key)} arguments_{i}")
        rules.append(_arguments_rule(f"arguments_{i}", tool, f"tools[{i}].function.parameters"))
    return "\n".join(rules) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _arguments_rule(rule: str, tool: FunctionTool, path: str) -> str:
    parameters = tool.function.parameters
    schema = dict(_NO_PARAMETERS) if parameters is None else {"type": "object", **parameters}
    if schema["type"] != "object":
        raise bad_request(f"The field '{path}' is not valid: its type must be object.", path)
    return json_rule(rule, schema, path).strip()
