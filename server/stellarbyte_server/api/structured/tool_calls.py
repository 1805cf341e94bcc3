"""The grammar, in llguidance's Lark, of answers that consist of text and calls of the offered tools.

Calls have the format on which the model was trained.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.structured.custom_input import input_grammar, input_rules, input_schema
from stellarbyte_server.api.structured.grammars import json_rule
from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.api.structured.tagged_parameters import tagged_rules
from stellarbyte_server.api.structured.tool_formats import CALL_ID, ToolFormat

MAX_GRAMMAR_CHARACTERS = 2**22  # of all tools
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_JSON_LEXEME = re.compile(r'"[^"]*"|, |: |[{}]')
_NO_MARKS: Mapping[str, int] = {}


def tools_grammar(
    tools: Sequence[OfferedTool],
    format: ToolFormat,
    *,
    required: bool,
    several: bool,
    special_ids: Mapping[str, int] = _NO_MARKS,
    content_rule: str | None = None,
) -> str:
    """The grammar of an answer that may call `tools`.

    Free text may contain anything except the trigger, after which a call must follow. With `required`, an answer has at
    least one call and no text; without `several`, it has at most one call. `content_rule` is a rule in Lark for the
    text of an answer without calls; None: any text. `special_ids` has the format's marks that are special tokens.
    ApiError for a schema that cannot be enforced.
    """
    assert tools, "there is a tool that may be called"
    marks = _Marks(special_ids)
    trigger = [marks.lexeme(format.trigger)] if format.trigger else []
    rules = [*_start(format, marks, required, content_rule), *_calls(tools, format, trigger, several)]
    # The lexer takes the longest lexeme. As an alternative to TEXT, a call therefore begins with a lexeme longer than
    # TEXT can be. As an alternative to JSON, its lexemes are those of JSON up to the key that identifies a call;
    # otherwise the content could have no other key.
    is_beside_json = not required and content_rule is not None and not format.trigger
    heads: list[Sequence[str]] = []
    for tool in tools:
        head = list(_head(tool, format, marks))
        if is_beside_json:
            *lexemes, key, colon = _JSON_LEXEME.findall(format.begin + tool.name + format.name_end)
            head = [_quoted(lexeme) for lexeme in (*lexemes, key + colon)]
        heads.append(head)
    return with_calls(rules, tools, format, heads)


def with_calls(
    rules: Sequence[str], tools: Sequence[OfferedTool], format: ToolFormat, heads: Sequence[Sequence[str]]
) -> str:
    """The grammar of these rules, and one for each tool: `tool_0` is a call of the first, and so on.

    `heads` are the lexemes with which the calls begin, up to their arguments. ApiError as of `tools_grammar`.
    """
    of_calls: list[str] = []
    num_characters = 0
    for i, (tool, head) in enumerate(zip(tools, heads, strict=True)):
        more = list(_tool_rules(f"tool_{i}", tool, format, head))
        num_characters += sum(map(len, more))
        if num_characters > MAX_GRAMMAR_CHARACTERS:
            raise bad_request("The schemas of all tools together are too large.", tool.path)
        of_calls += more
    grammar = "\n".join([*rules, *of_calls]) + "\n"
    inputs = [input_grammar(f"tool_{i}_arguments", tool) for i, tool in enumerate(tools) if tool.is_last]
    return json.dumps({"grammars": [{"lark_grammar": grammar}, *inputs]}) if inputs else grammar


class _Marks:
    """Marks as lexemes: special tokens by their id, others as text."""

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._special_ids = special_ids

    def is_special(self, mark: str) -> bool:
        return mark in self._special_ids

    def lexeme(self, mark: str) -> str:
        return f"<[{self._special_ids[mark]}]>" if self.is_special(mark) else _quoted(mark)


def _start(format: ToolFormat, marks: _Marks, required: bool, content_rule: str | None) -> list[str]:
    if required:
        return ["start: calls"]
    if content_rule is not None:
        return [f"start: {content_rule.partition(':')[0].strip()} | calls", content_rule.strip()]
    if not format.trigger:
        tagged = f"| {marks.lexeme(format.prefix)} calls" if marks.is_special(format.prefix) else ""
        return [f"start: TEXT | calls {tagged}", r'TEXT: /(?s:.*)/ & ~/\s*\{\s*"name"\s*:(?s:.*)/']
    if marks.is_special(format.trigger):
        return ["start: TEXT | TEXT calls", "TEXT: /(?s:.*)/"]
    # The lazy lexeme ends with the first trigger, where it has precedence over TEXT.
    return [
        "start: TEXT | text_and_trigger after_trigger",
        "TEXT: /(?s:.*)/",
        f"text_and_trigger[lazy]: TEXT {_quoted(format.trigger)}",
    ]


def _calls(tools: Sequence[OfferedTool], format: ToolFormat, trigger: list[str], several: bool) -> Iterator[str]:
    """The rules `calls`, and `after_trigger` for what follows the first trigger."""
    ending = [f"tool_{i}" for i, tool in enumerate(tools) if tool.is_last]
    others = [f"tool_{i}" for i, tool in enumerate(tools) if not tool.is_last]
    separator = [_quoted(format.separator)] if format.separator else []
    again = " ".join([*separator, *([] if format.is_list else trigger)])
    opening, closing = (_quoted(text) if text else "" for text in (format.opening, format.closing))
    repeats = several and format.separator is not None
    sequences = []
    if others:
        yield f"call: {' | '.join(others)}"
        sequences.append(f"call {f'({again} call)* ' if repeats else ''}{closing}")
    if ending:
        yield f"last_call: {' | '.join(ending)}"
        before = f"(call {again})* " if repeats and others else ""
        sequences.append(f"{before}last_call")
    yield f"after_trigger: {opening} ({' | '.join(sequences)})"
    yield f"calls: {' '.join(trigger)} after_trigger"


def _head(tool: OfferedTool, format: ToolFormat, marks: _Marks) -> Iterator[str]:
    """The lexemes of a call up to its arguments; text between special tokens is one lexeme."""
    text = format.begin + tool.name
    marked = "|".join(map(re.escape, format.name_end_marks))
    for piece in re.split(f"({marked})", format.name_end) if marked else [format.name_end]:
        if marks.is_special(piece):
            if text:
                yield _quoted(text)
            yield marks.lexeme(piece)
            text = ""
        elif piece == CALL_ID and format.name_end_marks:
            if text:
                yield _quoted(text)
            yield "/[a-zA-Z0-9]{9}/"
            text = ""
        else:
            text += piece
    if text:
        yield _quoted(text)


def _tool_rules(rule: str, tool: OfferedTool, format: ToolFormat, head: Sequence[str]) -> Iterator[str]:
    end = [_quoted(format.end)] if format.end else []
    arguments = f"{rule}_arguments"
    if tool.is_last:
        end = []
    yield f"{rule}: {' '.join([*head, arguments, *end])}"
    if tool.is_custom and (format.arguments == "tags" or tool.is_last):
        yield from input_rules(arguments, tool, is_tagged=format.arguments == "tags")
    elif format.arguments == "tags":
        _check_type(tool)
        yield from tagged_rules(arguments, tool)
    elif tool.is_custom:
        yield json_rule(arguments, input_schema(tool), f"{tool.path}.format").strip()
    else:
        yield json_rule(arguments, _check_type(tool), f"{tool.path}.parameters", strict=tool.strict).strip()


def _quoted(text: str) -> str:
    return json.dumps(text)


def _check_type(tool: OfferedTool) -> dict[str, Any]:
    """The schema of a function's arguments; ApiError unless it is that of an object."""
    path = f"{tool.path}.parameters"
    schema = dict(_NO_PARAMETERS) if tool.parameters is None else {"type": "object", **tool.parameters}
    if schema["type"] != "object":
        raise bad_request(f"The field '{path}' is not valid: its type must be object.", path)
    return schema
