"""Messages in the form that chat templates read, whatever they know of tools."""

import json

import pytest

from stellarbyte_server.api.chat.messages import messages_for_template, with_parsed_arguments
from stellarbyte_server.api.chat.tool_prompt import with_tool_prompt
from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract.bodies.chat import Message
from stellarbyte_server.api.contract.bodies.tools import FunctionTool
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.tokens.tokenizer import ChatTemplate
from tests.support.servers.fake_engine import CHAT_TEMPLATE
from tests.support.tools.offered import TOOLS, hermes, llama, mistral, offered, qwen_coder
from tests.support.tools.templates import (
    HARMONY,
    IN_TURNS,
    LLAMA_3,
    MISTRAL_IDS,
    MISTRAL_NEW,
    MISTRAL_OLD,
    QWEN,
    QWEN_TAGS,
)

GET = hermes("get", '{"city": "São"}')
TIME = hermes("get_time", "{}")
USER = {"role": "user", "content": "hi"}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"city":"São"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "get_time", "arguments": ""}},
    ],
}
RESULTS = [
    {"role": "tool", "content": "noon", "tool_call_id": "call_2"},
    {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
]


def shown(source, *messages, tools=True):
    """The prompt that a template makes of a chat."""
    toolbox = Toolbox.of([FunctionTool.model_validate(tool) for tool in TOOLS], None, None, source) if tools else None
    template = ChatTemplate(source, {})
    read = [Message.model_validate(message) for message in messages]
    converted = messages_for_template(read, toolbox, source, takes_system=template.takes_system)
    return template.render(converted, tools=None if toolbox is None else toolbox.for_template)


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize(
    ("source", "first", "second"),
    [
        (QWEN, GET, TIME),
        (CHAT_TEMPLATE, GET, TIME),
        (IN_TURNS, GET, TIME),
        (QWEN_TAGS, qwen_coder("get", city="São"), qwen_coder("get_time")),
        (LLAMA_3, llama("get", '{"city": "São"}'), llama("get_time", "{}")),
        (MISTRAL_NEW, mistral("get", '{"city": "São"}'), mistral("get_time", "{}")),
        (
            MISTRAL_OLD,
            '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "São"}, "id": "',
            '"get_time", "arg',
        ),
        (MISTRAL_IDS, "[TOOL_CALLS]get[CALL_ID]", "[TOOL_CALLS]get_time[CALL_ID]"),
        (
            HARMONY,
            'assistant to=functions.get<|channel|>commentary json<|message|>{"city": "São"}<|call|>',
            "assistant to=functions.get_time<|channel|>commentary json<|message|>{}<|call|>",
        ),
    ],
    ids=[
        "qwen",
        "no tools",
        "in turns",
        "qwen coder",
        "llama",
        "mistral",
        "mistral list",
        "mistral with ids",
        "harmony",
    ],
)
def test_calls_are_shown_in_the_templates_format_and_results_in_the_order_of_the_calls(source, first, second, tools):
    prompt = shown(source, USER, CALLED, *RESULTS, tools=tools)
    assert prompt.index(first) < prompt.index(second)
    assert prompt.index(first) < prompt.index("rain") < prompt.index("noon")
    assert ("Weather of a city" in prompt) == tools


@pytest.mark.parametrize("source", [MISTRAL_NEW, MISTRAL_OLD, MISTRAL_IDS])
def test_short_ids_are_those_of_their_calls(source):
    prompt = shown(source, USER, CALLED, *RESULTS)
    ids = [part.partition(" ")[0] for part in prompt.split("[TOOL_RESULTS]")[1:]]
    assert len({*ids}) == 2 and all(len(each) == 9 and each.isalnum() for each in ids)
    if source != MISTRAL_NEW:
        assert [prompt.count(each) for each in ids] == [2, 2]


def test_a_template_that_knows_tools_gets_arguments_as_objects():
    parsed = with_parsed_arguments([USER, CALLED, *RESULTS])
    assert [call["function"]["arguments"] for call in parsed[1]["tool_calls"]] == [{"city": "São"}, {}]
    assert [parsed[0], *parsed[2:]] == [USER, *RESULTS]


@pytest.mark.parametrize(
    "arguments", ["{", "[]", "null", '{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 5000 + "1" + "}" * 5000]
)
def test_arguments_that_are_no_json_object_are_shown_as_the_text_they_are(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, RESULTS[0] | {"tool_call_id": "c"}]
    for source in (QWEN, CHAT_TEMPLATE):
        assert hermes("f", json.dumps(arguments)) in shown(source, *messages)
    assert qwen_coder("f", arguments=arguments) in shown(QWEN_TAGS, *messages)


def test_a_refusal_is_the_content_where_there_is_none():
    assert "I will not." in shown(QWEN, USER, {"role": "assistant", "refusal": "I will not."}, tools=False)


def test_a_call_of_a_custom_tool_is_one_with_an_input():
    call = {"id": "c", "type": "custom", "custom": {"name": "run", "input": 'é "x"'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, RESULTS[0] | {"tool_call_id": "c"}]
    assert hermes("run", '{"input": "é \\"x\\""}') in shown(QWEN, *messages, tools=False)


def test_the_older_form_of_calls_and_results_is_read():
    called = {"role": "assistant", "function_call": {"name": "get", "arguments": '{"city": "São"}'}}
    result = {"role": "function", "name": "get", "content": "rain"}
    prompt = shown(QWEN, USER, called, result, USER, called, result)
    assert prompt.count(GET) == prompt.count("<|im_start|>tool\nrain") == 2


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "function", "name": "get", "content": "rain"}],
        [
            {"role": "assistant", "function_call": {"name": "get", "arguments": "{}"}},
            {"role": "function", "name": "get_time", "content": "noon"},
        ],
    ],
)
def test_a_result_of_the_older_form_needs_its_call(messages):
    with pytest.raises(ApiError) as caught:
        shown(QWEN, *messages)
    assert (caught.value.status, caught.value.param) == (400, f"messages[{len(messages) - 1}]")


# A template that knows nothing of tools


def test_a_template_that_knows_no_tools_is_told_of_everything_in_text():
    before = [{"role": "system", "content": "Be brief."}, USER, *with_parsed_arguments([CALLED]), *RESULTS]
    system, user, called, results = with_tool_prompt(before, offered())
    assert system["content"].startswith("Be brief.\n\n")
    listed = system["content"].partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"]["name"] for line in listed] == ["get", "get_time"]
    assert (user, called) == (USER, {"role": "assistant", "content": f"{GET}\n{TIME}"})
    assert results["role"] == "user"
    assert results["content"].count("<tool_response>\n") == 2
    assert before[0]["content"] == "Be brief."


def test_the_tool_prompt_makes_a_system_message_where_there_is_none():
    assert [message["role"] for message in with_tool_prompt([USER], offered())] == ["system", "user"]
    assert with_tool_prompt([USER], ()) == [USER]


def test_the_tool_prompt_holds_no_call_that_a_model_could_copy():
    (system,) = with_tool_prompt([], offered())
    for line in system["content"].splitlines():
        try:
            call = json.loads(line)
        except ValueError:
            continue
        assert "arguments" not in call


def test_instructions_go_into_the_users_first_message_where_the_template_knows_no_system():
    prompt = shown(IN_TURNS, USER, CALLED, *RESULTS, {"role": "user", "content": "Thanks."})
    assert prompt.count("<|im_start|>user") == 2 and prompt.count("<|im_start|>") == 3
    assert prompt.index("<tools>") < prompt.index("hi") < prompt.index(GET) < prompt.index("rain")
    assert prompt.index("rain") < prompt.index("Thanks.")
    (user,) = with_tool_prompt([], offered(), takes_system=False)
    assert user["role"] == "user"


@pytest.mark.parametrize(
    ("source", "takes_system"),
    [(CHAT_TEMPLATE, True), (QWEN, True), (IN_TURNS, False), ("{{ messages[-1].content }}", False)],
)
def test_whether_a_template_knows_messages_by_the_system_is_tried(source, takes_system):
    assert ChatTemplate(source, {}).takes_system == takes_system


def test_a_thought_before_calls_in_channels_is_shown_once_with_the_content_after_it():
    called = CALLED | {"reasoning_content": "why", "content": "I look."}
    prompt = shown(HARMONY, USER, called, *RESULTS)
    assert "<|channel|>analysis<|message|>why\nI look.<|end|><|start|>assistant to=functions.get<" in prompt
    assert prompt.count("analysis") == 1
    alone = shown(HARMONY, USER, CALLED | {"content": "I look."}, *RESULTS)
    assert "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant to=functions.get<" in alone


def test_a_thought_without_a_call_reaches_the_templates_field_apart_from_the_content():
    prompt = shown(HARMONY, USER, {"role": "assistant", "content": "so", "reasoning": "why"}, tools=False)
    assert "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>so" in prompt
