"""Checks the tools of a chat, and detects the format in which its model writes calls.

A model writes calls in the format that its chat template shows. With a template that shows no known format, the prompt
gets this server's instructions, in the format HERMES.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.meta

from stellarbyte_server.api.contract.bodies.tools import (
    AllowedToolsChoice,
    Choice,
    CustomTool,
    Function,
    FunctionName,
    FunctionTool,
    NamedCustomTool,
    NamedTool,
)
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.structured.custom_input import input_description, input_schema
from stellarbyte_server.api.structured.offered_tools import OfferedTool, offered_functions, offered_tools
from stellarbyte_server.api.structured.tool_calls import tools_grammar
from stellarbyte_server.api.structured.tool_formats import HERMES, ToolFormat, shown_format

_NO_MARKS: Mapping[str, int] = {}


def tool_format(template_source: str | None) -> ToolFormat:
    """The call format of a model with this chat template; HERMES if the template shows no known format."""
    shown = shown_format(template_source)
    return shown if shown is not None and template_takes_tools(template_source) else HERMES


@functools.lru_cache(maxsize=8)
def template_takes_tools(template_source: str | None) -> bool:
    """Whether a chat template describes tools to the model, with a known call format."""
    if template_source is None or shown_format(template_source) is None:
        return False
    # {% generation %} marks text for training; jinja2 cannot parse it.
    source = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template_source)
    try:
        parsed = jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).parse(source)
        return "tools" in jinja2.meta.find_undeclared_variables(parsed)
    except jinja2.TemplateError:  # the tokenizer reports the error to the user
        return False


def _check_names(tools: Sequence[OfferedTool]) -> None:
    """ApiError if two tools have the same name."""
    names: set[str] = set()
    for tool in tools:
        if tool.name in names:
            raise bad_request(f"Two tools are named '{tool.name}'; names must differ.", f"{tool.path}.name")
        names.add(tool.name)


def _called(
    tools: Sequence[OfferedTool], choice: Choice | FunctionName | None, param: str
) -> tuple[Literal["none", "auto", "required"], tuple[OfferedTool, ...]]:
    """The mode of the choice, and the tools that may be called; ApiError if the choice names no tool of the request."""
    if isinstance(choice, NamedTool | NamedCustomTool | FunctionName):
        return "required", (_named(choice, tools, param),)
    if isinstance(choice, AllowedToolsChoice):
        allowed = {_named(each, tools, param).name for each in choice.allowed_tools.tools}
        return choice.allowed_tools.mode, tuple(tool for tool in tools if tool.name in allowed)
    if choice == "required" and not tools:
        raise bad_request("The field 'tool_choice' requires a call, but there are no 'tools'.", param)
    return "auto" if choice is None else choice, () if choice == "none" else tuple(tools)


def _named(choice: NamedTool | NamedCustomTool | FunctionName, tools: Sequence[OfferedTool], param: str) -> OfferedTool:
    is_custom = isinstance(choice, NamedCustomTool)
    for tool in tools:
        if (tool.name, tool.is_custom) == (choice.name, is_custom):
            return tool
    raise bad_request(f"There is no {'custom ' if is_custom else ''}tool named '{choice.name}'.", param)


@dataclass(frozen=True, kw_only=True)
class Toolbox:
    """The checked tools of one request, and the request's choice of tools."""

    tools: tuple[OfferedTool, ...]
    choice: Literal["none", "auto", "required"]
    called: tuple[OfferedTool, ...]  # the tools that may be called
    several: bool  # one answer may have several calls
    format: ToolFormat
    takes_tools: bool  # the template supports tools; else the prompt gets this server's instructions
    are_functions: bool = False  # request and answer have the deprecated form

    @classmethod
    def of(
        cls,
        tools: Sequence[FunctionTool | CustomTool] | None,
        choice: Choice | None,
        parallel: bool | None,
        template_source: str | None,
    ) -> "Toolbox | None":
        """None without tools; ApiError if the fields contradict each other."""
        offered = () if tools is None else offered_tools(tools)
        is_named = isinstance(choice, NamedTool | NamedCustomTool)
        return cls._checked(offered, choice, "tool_choice", template_source, parallel is not False and not is_named)

    @classmethod
    def of_functions(
        cls,
        functions: Sequence[Function],
        choice: Literal["none", "auto"] | FunctionName | None,
        template_source: str | None,
    ) -> "Toolbox | None":
        """As `of`, for the deprecated fields `functions` and `function_call`."""
        offered = offered_functions(functions)
        return cls._checked(offered, choice, "function_call", template_source, False, are_functions=True)

    @classmethod
    def _checked(
        cls,
        offered: tuple[OfferedTool, ...],
        choice: Choice | FunctionName | None,
        param: str,
        template_source: str | None,
        several: bool,
        are_functions: bool = False,
    ) -> "Toolbox | None":
        _check_names(offered)
        mode, called = _called(offered, choice, param)
        if not offered:
            return None
        return cls(
            tools=offered,
            choice=mode,
            called=called,
            several=several,
            format=tool_format(template_source),
            takes_tools=template_takes_tools(template_source),
            are_functions=are_functions,
        )

    @property
    def by_name(self) -> dict[str, OfferedTool]:
        """The tools that may be called."""
        return {tool.name: tool for tool in self.called}

    @property
    def requires_call(self) -> bool:
        return self.choice == "required"

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """The template's variable `tools`; None with the choice "none", so that the model sees no tools."""
        if not self.takes_tools or self.choice == "none":
            return None
        described = [describe_tool(tool) for tool in self.tools]
        if self.format.in_channels:
            for tool in described:
                tool["function"].setdefault("description", "")  # gpt-oss's template cannot do without one
        return described

    def grammar(self, special_ids: Mapping[str, int] = _NO_MARKS, content_rule: str | None = None) -> str | None:
        """The grammar of an answer; None: any text. `special_ids` has the format's marks that are special tokens."""
        if not self.called:
            return None
        return tools_grammar(
            self.called,
            self.format,
            required=self.requires_call,
            several=self.several,
            special_ids=special_ids,
            content_rule=content_rule,
        )


def describe_tool(tool: OfferedTool) -> dict[str, Any]:
    """A tool as a function, for a chat template. A custom tool has one parameter, its input."""
    function: dict[str, Any] = {"name": tool.name}
    description = input_description(tool) if tool.is_custom else tool.description
    if description:
        function["description"] = description
    parameters = input_schema(tool) if tool.is_custom else tool.parameters
    function["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters
    return {"type": "function", "function": function}
