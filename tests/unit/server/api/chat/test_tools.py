"""Tools of a chat: what may be offered, what the model is told, and in which format it writes calls."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from stellarbyte_server.api.chat.tools import Toolbox, describe_tool, template_takes_tools, tool_format
from stellarbyte_server.api.contract.bodies.tools import Function, FunctionName, FunctionTool, Tool, ToolChoice
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.structured.tool_formats import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_LIST,
    MISTRAL_WITH_IDS,
    QWEN_CODER,
)
from tests.support.servers.fake_engine import CHAT_TEMPLATE
from tests.support.tools.offered import TOOLS, custom, named, offered
from tests.support.tools.templates import LLAMA_3, MISTRAL_IDS, MISTRAL_NEW, MISTRAL_OLD, QWEN, QWEN_TAGS

OTHER_TAGS = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call>name<arg_key>a</arg_key></tool_call>"


def read(tools):
    return TypeAdapter(list[Tool]).validate_json(json.dumps(tools))


def choice_of(value):
    return TypeAdapter(ToolChoice | None).validate_json(json.dumps(value))


@pytest.mark.parametrize(
    ("tool", "field"),
    [
        ({"type": "function", "function": {"name": "a b"}}, "name"),
        ({"type": "function", "function": {"name": "f\n"}}, "name"),
        ({"type": "function", "function": {"name": "x" * 65}}, "name"),
        ({"type": "function", "function": {"name": "f", "parameters": []}}, "parameters"),
        ({"type": "function", "function": {"name": "f", "strict": "yes"}}, "strict"),
        ({"type": "custom"}, "custom"),
        ({"type": "custom", "custom": {"name": ""}}, "name"),
        ({"type": "custom", "custom": {"name": "f", "format": {"type": "grammar"}}}, "format"),
        (custom("f", "ebnf", "x"), "syntax"),
        (custom("f", "lark", "x" * 16_385), "definition"),
        ({"type": "web_search", "function": {"name": "f"}}, "type"),
        ({"function": {"name": "f"}}, "type"),
        ("f", 0),
    ],
)
def test_what_is_no_tool_is_refused(tool, field):
    with pytest.raises(ValidationError) as caught:
        read([tool])
    (error,) = caught.value.errors()
    assert [step for step in error["loc"] if not str(step).startswith("variant ")][-1] == field


@pytest.mark.parametrize(
    "choice",
    [
        *("any", 1, {}, {"type": "allowed_tools"}, {"type": "function"}, {"type": "function", "function": "f"}),
        *({"type": "function", "function": {"name": "f\n"}}, {"type": "custom", "function": {"name": "f"}}),
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "custom", "custom": "f"}]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
    ],
)
def test_a_wrong_choice_is_one_error(choice):
    with pytest.raises(ValidationError) as caught:
        choice_of(choice)
    assert len(caught.value.errors()) == 1


def allowed(mode, *tools):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


GET = {"type": "function", "function": {"name": "get"}}
RUN = {"type": "custom", "custom": {"name": "run"}}


@pytest.mark.parametrize(
    ("choice", "mode", "called", "several"),
    [
        (None, "auto", ["get", "get_time", "run"], True),
        ("auto", "auto", ["get", "get_time", "run"], True),
        ("required", "required", ["get", "get_time", "run"], True),
        ("none", "none", [], True),
        (GET, "required", ["get"], False),
        (RUN, "required", ["run"], False),
        (allowed("auto", RUN, GET), "auto", ["get", "run"], True),
        (allowed("required", GET), "required", ["get"], True),
    ],
)
def test_a_choice_says_what_may_be_called_and_how_often(choice, mode, called, several):
    toolbox = Toolbox.of(read([*TOOLS, custom("run")]), choice_of(choice), None, QWEN)
    assert (toolbox.choice, [*toolbox.by_name], toolbox.several) == (mode, called, several)
    assert (toolbox.grammar() is None) == (toolbox.for_template is None) == (choice == "none")
    assert not Toolbox.of(read(TOOLS), None, False, QWEN).several


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ((TOOLS[0], TOOLS[1], TOOLS[0]), None, "tools[2].function.name"),
        ((TOOLS[0], custom("get")), None, "tools[1].custom.name"),
        ((TOOLS[0],), named("get_time"), "tool_choice"),
        ((TOOLS[0],), choice_of({"type": "custom", "custom": {"name": "get"}}), "tool_choice"),
        ((TOOLS[0],), choice_of(allowed("auto", GET, RUN)), "tool_choice"),
        ((), "required", "tool_choice"),
        ((), named("get"), "tool_choice"),
    ],
)
def test_tools_and_choice_that_do_not_fit_are_refused(tools, choice, param):
    with pytest.raises(ApiError) as caught:
        Toolbox.of(read(tools), choice, None, None)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_functions_are_tools_of_which_one_is_called_at_most():
    functions = [Function.model_validate(tool["function"]) for tool in TOOLS]
    toolbox = Toolbox.of_functions(functions, FunctionName(name="get"), QWEN)
    assert (toolbox.choice, [*toolbox.by_name], toolbox.several) == ("required", ["get"], False)
    assert not Toolbox.of_functions(functions, None, QWEN).several
    for wrong, choice, param in (
        ([functions[0]] * 2, None, "functions[1].name"),
        (functions, FunctionName(name="x"), "function_call"),
    ):
        with pytest.raises(ApiError) as caught:
            Toolbox.of_functions(wrong, choice, QWEN)
        assert caught.value.param == param


def test_without_tools_there_is_no_toolbox():
    assert Toolbox.of(None, "auto", None, QWEN) is None
    assert Toolbox.of([], "none", True, QWEN) is None
    assert Toolbox.of_functions([], "none", QWEN) is None


@pytest.mark.parametrize(
    ("source", "format", "takes_tools"),
    [
        (QWEN, HERMES, True),
        (QWEN_TAGS, QWEN_CODER, True),
        (LLAMA_3, LLAMA, True),
        (MISTRAL_NEW, MISTRAL, True),
        (MISTRAL_IDS, MISTRAL_WITH_IDS, True),
        (MISTRAL_OLD.replace("] [", "]["), MISTRAL_LIST, True),
        (OTHER_TAGS, HERMES, False),
        ("{% if tools %}{{ tools }}{% endif %}[TOOL_CALLS]", HERMES, False),
        (CHAT_TEMPLATE, HERMES, False),
        ("{% for message in messages %}{{ message.tools }}" + QWEN.partition("<|im_start|>")[0], HERMES, False),
        (None, HERMES, False),
    ],
)
def test_the_format_is_what_the_template_shows(source, format, takes_tools):
    assert tool_format(source) == format
    assert template_takes_tools(source) == takes_tools


def test_a_list_of_mistrals_begins_as_the_template_begins_it():
    assert tool_format(MISTRAL_OLD).opening == " ["


def test_a_custom_tool_is_told_as_a_function_with_a_text():
    (tool,) = offered(custom("run", "lark", 'start: "x"'))
    function = describe_tool(tool)["function"]
    assert function["parameters"]["required"] == ["input"]
    assert 'start: "x"' in function["description"]
    assert describe_tool(*offered(TOOLS[0])) == TOOLS[0]
    assert FunctionTool.model_validate(describe_tool(*offered(TOOLS[1]))).function.description is None
