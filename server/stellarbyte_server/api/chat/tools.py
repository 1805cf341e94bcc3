"""The tools of a chat are checked, and the format in which its model writes calls is found.

A model writes its calls in the format that its chat template shows. A template that shows none that is known here gets
our own instructions in HERMES; so do Mistral's templates, because their calls begin with a special token, which is no
text.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta

from stellarbyte_server.api.contract.bodies.tools import Choice, FunctionTool, NamedTool
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.structured.tool_calls import HERMES, LLAMA, ToolFormat, callable_tools, tools_grammar


def tool_format(template_source: str | None) -> ToolFormat:
    """How a model with that chat template writes calls; HERMES where the template does not say."""
    return _shown_format(template_source) or HERMES


def _shown_format(template_source: str | None) -> ToolFormat | None:
    """The known format that a template shows: other ones have the same tag around something else than JSON."""
    source = "" if template_source is None else template_source.replace('\\"', '"')
    if HERMES.trigger in source:
        return HERMES if '"arguments":' in source else None
    return LLAMA if '{"name": ' in source and '"parameters":' in source else None


@functools.lru_cache(maxsize=8)
def template_takes_tools(template_source: str | None) -> bool:
    """Whether a chat template tells the model of tools, and of a format that is known here."""
    if template_source is None or _shown_format(template_source) is None:
        return False
    # A tag that only marks text for training; jinja2 does not know it.
    source = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template_source)
    try:
        parsed = jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).parse(source)
        return "tools" in jinja2.meta.find_undeclared_variables(parsed)
    except jinja2.TemplateError:  # no template; the tokenizer tells the user
        return False


def check_tools(tools: Sequence[FunctionTool], choice: Choice | None) -> None:
    """ApiError when tools have the same name, or the choice is none of them."""
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.function.name in names:
            raise bad_request(f"There are two tools named '{tool.function.name}'.", f"tools[{i}].function.name")
        names.add(tool.function.name)
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise bad_request(f"There is no tool named '{choice.function.name}'.", "tool_choice")
    if choice == "required" and not names:
        raise bad_request("The field 'tool_choice' requires a call, but there are no 'tools'.", "tool_choice")


@dataclass(frozen=True, kw_only=True)
class Toolbox:
    """The tools of one request, checked, and what was chosen of them."""

    tools: tuple[FunctionTool, ...]
    choice: Choice
    parallel: bool  # there may be several calls in one answer
    format: ToolFormat
    takes_tools: bool  # the template does; else the prompt gets our instructions

    @classmethod
    def of(
        cls,
        tools: Sequence[FunctionTool] | None,
        choice: Choice | None,
        parallel: bool | None,
        template_source: str | None,
    ) -> "Toolbox | None":
        """None without tools; ApiError when the fields do not fit each other."""
        offered = () if tools is None else tuple(tools)
        check_tools(offered, choice)
        if not offered:
            return None
        takes_tools = template_takes_tools(template_source)
        return cls(
            tools=offered,
            choice="auto" if choice is None else choice,
            parallel=parallel is not False,
            format=tool_format(template_source) if takes_tools else HERMES,
            takes_tools=takes_tools,
        )

    @property
    def names(self) -> frozenset[str]:
        """The tools that may be called."""
        return frozenset(tool.function.name for _, tool in callable_tools(self.tools, self.choice))

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """What the template is given as `tools`; with the choice "none" the model is told of no tools."""
        if not self.takes_tools or self.choice == "none":
            return None
        return [describe_tool(tool) for tool in self.tools]

    def grammar(self, content_rule: str | None = None) -> str | None:
        return tools_grammar(self.tools, self.choice, self.parallel, self.format, content_rule)


def describe_tool(tool: FunctionTool) -> dict[str, Any]:
    """A tool as chat templates know it."""
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    parameters = tool.function.parameters
    function["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters
    return {"type": "function", "function": function}
