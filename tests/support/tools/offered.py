"""Tools that tests offer, and calls of them in the formats that models know."""

from typing import Any

from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.tools import NamedTool
from stellarbyte_server.api.structured.offered_tools import OfferedTool, offered_tools
from stellarbyte_server.api.structured.tool_formats import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_LIST,
    MISTRAL_WITH_IDS,
    QWEN_CODER,
    ToolFormat,
)

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "Weather of a city", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time"}},
]
FORMATS = {
    "hermes": HERMES,
    "qwen_coder": QWEN_CODER,
    "llama": LLAMA,
    "mistral_list": MISTRAL_LIST,
    "mistral": MISTRAL,
    "mistral_with_ids": MISTRAL_WITH_IDS,
}


def function(name: str, **properties: Any) -> dict[str, Any]:
    """A function of which every parameter is required."""
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def custom(name: str, syntax: str | None = None, definition: str = "") -> dict[str, Any]:
    """A custom tool, of which the input is any text or follows a grammar."""
    tool: dict[str, Any] = {"name": name}
    if syntax is not None:
        tool["format"] = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    return {"type": "custom", "custom": tool}


def offered(*tools: dict[str, Any]) -> tuple[OfferedTool, ...]:
    """Tools as a body has them, checked."""
    body = ChatBody.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": list(tools or TOOLS)}
    )
    return offered_tools(body.tools or ())


def by_name(*tools: dict[str, Any]) -> dict[str, OfferedTool]:
    return {tool.name: tool for tool in offered(*tools)}


def named(name: str) -> NamedTool:
    return NamedTool.model_validate({"type": "function", "function": {"name": name}})


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def mistral(name: str, arguments: str) -> str:
    return f"[TOOL_CALLS]{name}[ARGS]{arguments}"


def mistral_list(*calls: tuple[str, str]) -> str:
    return "[TOOL_CALLS][" + ", ".join(f'{{"name": "{name}", "arguments": {text}}}' for name, text in calls) + "]"


def qwen_coder(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def one_call(format: ToolFormat, city: str = "São") -> str:
    """A call of TOOLS[0] as a model of that format writes it."""
    arguments = f'{{"city": "{city}"}}'
    if format is QWEN_CODER:
        return qwen_coder("get", city=city)
    if format is MISTRAL_WITH_IDS:
        return f"[TOOL_CALLS]get[CALL_ID]a1B2c3D4e[ARGS]{arguments}"
    if format is MISTRAL_LIST:
        return mistral_list(("get", arguments))
    return {id(HERMES): hermes, id(LLAMA): llama, id(MISTRAL): mistral}[id(format)]("get", arguments)
