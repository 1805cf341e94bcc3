"""The tools of a request, in one form for grammars and parsers, from either field."""

from collections.abc import Sequence
from dataclasses import dataclass

from stellarbyte_server.api.contract.bodies.tools import CustomGrammar, CustomTool, Function, FunctionTool, Schema

INPUT = "input"  # the model's name for the only parameter of a custom tool


@dataclass(frozen=True, kw_only=True)
class OfferedTool:
    """A function with arguments in JSON, or a custom tool with a text input."""

    name: str
    path: str  # in the request: tools[0].function
    description: str | None = None
    parameters: Schema | None = None  # None: no parameters
    strict: bool = False
    is_custom: bool = False
    grammar: CustomGrammar | None = None  # of a custom tool's input; None: any text

    @property
    def is_last(self) -> bool:
        """Whether a call ends the answer: an input with a grammar in Lark has no other end."""
        return self.grammar is not None and self.grammar.syntax == "lark"


def offered_tools(tools: Sequence[FunctionTool | CustomTool]) -> tuple[OfferedTool, ...]:
    return tuple(
        _custom(tool, f"tools[{i}].custom")
        if isinstance(tool, CustomTool)
        else _function(tool.function, f"tools[{i}].function")
        for i, tool in enumerate(tools)
    )


def offered_functions(functions: Sequence[Function]) -> tuple[OfferedTool, ...]:
    """The tools of the deprecated field `functions`."""
    return tuple(_function(function, f"functions[{i}]") for i, function in enumerate(functions))


def _function(function: Function, path: str) -> OfferedTool:
    return OfferedTool(
        name=function.name,
        path=path,
        description=function.description,
        parameters=function.parameters,
        strict=bool(function.strict),
    )


def _custom(tool: CustomTool, path: str) -> OfferedTool:
    custom = tool.custom
    grammar = None if custom.format is None else custom.format.grammar
    return OfferedTool(name=custom.name, path=path, description=custom.description, is_custom=True, grammar=grammar)
