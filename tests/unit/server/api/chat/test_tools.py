"""Tools of a chat: what may be offered, what the model is told, and what it may write."""

import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from pydantic import TypeAdapter, ValidationError

from stellarbyte_server.api.answers.tool_parser import CallArguments, CallStart, Content, ToolCallParser
from stellarbyte_server.api.chat.messages import messages_for_template, with_parsed_arguments, with_tool_prompt
from stellarbyte_server.api.chat.tools import Toolbox, check_tools, template_takes_tools, tool_format
from stellarbyte_server.api.contract.bodies.tools import FunctionTool, NamedTool, ToolCall, ToolChoice
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.structured.grammars import json_rule
from stellarbyte_server.api.structured.tool_calls import HERMES, LLAMA, tools_grammar
from stellarbyte_server.tokens.tokenizer import ChatTemplate
from tests.support.servers.fake_engine import CHAT_TEMPLATE, make_tokenizer

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
QWEN = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    '{{ "<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>" }}{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% generation %}<|im_end|>{% endgeneration %}{% continue %}{% endfor %}"
)
LLAMA_3 = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    '{%- if tools is not none %}{{- \'Respond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.' }}{% for t in tools %}{{- t | tojson(indent=4) }}{% endfor %}{% endif %}"
)
QWEN_CODER = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call>\n<function=name>\n</function>\n</tool_call>"
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools }}{% endif %}[TOOL_CALLS]"


@pytest.fixture(scope="module")
def llguidance_tokenizer():
    return LLTokenizer(make_tokenizer().to_str(), n_vocab=259, eos_token=256)


def offered(*tools):
    return tuple(FunctionTool.model_validate(tool) for tool in tools or TOOLS)


def named(name):
    return NamedTool.model_validate({"type": "function", "function": {"name": name}})


def refused_rest(tokenizer, grammar, text):
    """What of a text the model may not write; None: all of it is allowed, but it may not stop there."""
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    written = text.encode()
    rest = written[matcher.try_consume_tokens(list(written)) :]
    return rest.decode() if rest or matcher.is_accepting() else None


def assert_allows(tokenizer, grammar, text):
    """A text is a whole answer; with a | in it, the model may write what comes before that and no more of it."""
    _, bar, refused = text.partition("|")
    assert refused_rest(tokenizer, grammar, text.replace("|", "")) == (refused if bar else "")


def hermes(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama(name, arguments):
    return f'{{"name": "{name}", "parameters": {arguments}}}'


GET = hermes("get", '{"city": "São"}')
TIME = hermes("get_time", "{}")


@pytest.mark.parametrize(
    ("tool", "field"),
    [
        ({"type": "function", "function": {"name": "a b"}}, "name"),
        ({"type": "function", "function": {"name": "f\n"}}, "name"),
        ({"type": "function", "function": {"name": "x" * 65}}, "name"),
        ({"type": "function", "function": {"name": "f", "parameters": []}}, "parameters"),
        ({"type": "function", "function": {"name": "f", "strict": "yes"}}, "strict"),
    ],
)
def test_what_is_no_function_is_refused(tool, field):
    with pytest.raises(ValidationError) as caught:
        FunctionTool.model_validate(tool)
    assert caught.value.errors()[0]["loc"][-1] == field


@pytest.mark.parametrize(
    "choice",
    [
        *("any", 1, {}, {"type": "allowed_tools"}, {"type": "function"}, {"type": "function", "function": "f"}),
        *({"type": "function", "function": {"name": "f\n"}}, {"type": "custom", "function": {"name": "f"}}),
    ],
)
def test_a_wrong_choice_is_one_error_of_the_field_itself(choice):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(ToolChoice | None).validate_json(json.dumps(choice))
    assert [error["loc"] for error in caught.value.errors()] == [()]


@pytest.mark.parametrize(
    "choice", ["none", "auto", "required", {"type": "function", "function": {"name": "get"}}, None]
)
def test_a_choice_is_read(choice):
    parsed = TypeAdapter(ToolChoice | None).validate_json(json.dumps(choice))
    check_tools(offered(), parsed)
    assert (parsed.model_dump() if isinstance(parsed, NamedTool) else parsed) == choice


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ((TOOLS[0], TOOLS[1], TOOLS[0]), None, "tools[2].function.name"),
        ((TOOLS[0],), named("get_time"), "tool_choice"),
        ((), "required", "tool_choice"),
        ((), named("get"), "tool_choice"),
    ],
)
def test_tools_and_choice_that_do_not_fit_are_refused(tools, choice, param):
    with pytest.raises(ApiError) as caught:
        Toolbox.of([FunctionTool.model_validate(tool) for tool in tools], choice, None, None)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_without_tools_there_is_no_toolbox():
    assert Toolbox.of(None, "auto", None, QWEN) is None
    assert Toolbox.of([], "none", True, QWEN) is None


@pytest.mark.parametrize(
    ("source", "format", "takes_tools"),
    [
        (QWEN, HERMES, True),
        (LLAMA_3, LLAMA, True),
        (QWEN_CODER, HERMES, False),
        (MISTRAL, HERMES, False),
        (CHAT_TEMPLATE, HERMES, False),
        ("{% for message in messages %}{{ message.tools }}" + QWEN.partition("<|im_start|>")[0], HERMES, False),
        (None, HERMES, False),
    ],
)
def test_the_format_is_what_the_template_shows(source, format, takes_tools):
    assert tool_format(source) == format
    assert template_takes_tools(source) == takes_tools


AUTO_TEXTS = [
    "",
    "plain é text\nwith <, <tool, <tool_cal and </tool_call>",
    '{"name": "get"}',
    f"I look.\n{GET}",
    f"<{TIME}",
    "a <tool_call>|b",
    f"{GET}| then",
    '<tool_call>\n{"name": "get|x"',
    '<tool_call>\n{"name": "get", "arguments": {"|town": "x"}}',
    '<tool_call>\n{"name": "get", "arguments": {|}}',
    '<tool_call>\n{"name": "get_time", "arguments": {|"city": "x"}}',
    '<tool_call>\n{"name": "get", "arguments": {"city": "x"|, "b": 1}}',
]


@pytest.mark.parametrize("text", [*AUTO_TEXTS, f"{GET}\n{TIME}\n{GET}", f"{GET}\n|\n{GET}"])
def test_with_auto_a_trigger_has_to_become_a_call(llguidance_tokenizer, text):
    assert_allows(llguidance_tokenizer, tools_grammar(offered(), "auto", True, HERMES), text)


@pytest.mark.parametrize("text", [*AUTO_TEXTS, f"{GET}|\n{TIME}", f"x{TIME}|\n"])
def test_not_parallel_means_one_call_at_most(llguidance_tokenizer, text):
    assert_allows(llguidance_tokenizer, tools_grammar(offered(), "auto", False, HERMES), text)


@pytest.mark.parametrize("text", ["|I look.", f"{GET}\n{TIME}", GET, f"|\n{GET}", f"{TIME}\n|I look."])
def test_required_means_calls_and_nothing_else(llguidance_tokenizer, text):
    assert_allows(llguidance_tokenizer, tools_grammar(offered(), "required", True, HERMES), text)


@pytest.mark.parametrize("choice", ["required", named("get")])
@pytest.mark.parametrize("format", [HERMES, LLAMA])
def test_nothing_is_no_answer_where_a_call_is_required(llguidance_tokenizer, choice, format):
    assert refused_rest(llguidance_tokenizer, tools_grammar(offered(), choice, True, format), "") is None


@pytest.mark.parametrize("text", [TIME, f"{TIME}|\n{TIME}", '<tool_call>\n{"name": "get|", "arg'])
def test_a_named_tool_is_called_once(llguidance_tokenizer, text):
    assert_allows(llguidance_tokenizer, tools_grammar(offered(), named("get_time"), True, HERMES), text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "plain text", '{"x": 1}', '{"names": 1}', "{", '{"nam', f"Well: {llama('other', 1)}"),
        *(llama("get", '{"city": "x"}'), llama("get_time", "{}"), f"{llama('get_time', '{}')}|; {{"),
        *('{"name": "|other"', '{"name":|1', llama("get", '{"|town": 1}')),
    ],
)
def test_an_answer_of_llama_is_text_or_one_call(llguidance_tokenizer, text):
    assert_allows(llguidance_tokenizer, tools_grammar(offered(), "auto", True, LLAMA), text)


@pytest.mark.parametrize(
    "text", [llama("get", '{"city": "x"}'), "|text", '{"|x": 1}', llama("get", '{"city": "x"}') + "|;"]
)
def test_llama_can_be_made_to_call(llguidance_tokenizer, text):
    assert_allows(llguidance_tokenizer, tools_grammar(offered(), "required", True, LLAMA), text)


@pytest.mark.parametrize("format", [HERMES, LLAMA])
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {"name": {"enum": ["get", "x"]}, "age": {"type": "integer"}}},
        {"type": "array", "items": {"type": "object"}},
    ],
)
@pytest.mark.parametrize(
    "value", [{}, {"name": "x"}, {"name": "get", "age": 3}, {"age": 1}, [{"name": "get"}, {}], "text"]
)
def test_a_format_of_the_content_and_tools_go_together(llguidance_tokenizer, format, schema, value):
    grammar = tools_grammar(offered(), "auto", True, format, json_rule("content", schema))
    call = llama("get", '{"city": "x"}') if format == LLAMA else GET
    assert_allows(llguidance_tokenizer, grammar, call)
    assert_allows(llguidance_tokenizer, grammar, "|plain text")
    assert_allows(llguidance_tokenizer, grammar, call.replace("city", "|town"))
    fits = jsonschema.Draft202012Validator(schema).is_valid(value)
    assert (refused_rest(llguidance_tokenizer, grammar, json.dumps(value)) == "") == fits


def test_none_leaves_the_answer_free_and_tells_of_no_tools():
    toolbox = Toolbox.of(offered(), "none", None, QWEN)
    assert (toolbox.grammar(), toolbox.for_template, toolbox.names) == (None, None, frozenset())
    parser = ToolCallParser(toolbox.format, toolbox.names)
    assert "".join(piece.text for piece in parser.push(GET) + parser.flush()) == GET


def test_a_tool_without_a_schema_takes_no_arguments_and_one_without_a_type_an_object(llguidance_tokenizer):
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    grammar = tools_grammar(offered({"type": "function", "function": function}), "required", True, HERMES)
    assert_allows(llguidance_tokenizer, grammar, hermes("f", '{"a": 1}'))
    assert_allows(llguidance_tokenizer, grammar, hermes("f", "|1"))


def test_a_schema_with_definitions_keeps_them(llguidance_tokenizer):
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "required": ["a"],
        "$defs": {"A": {"const": 7}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for format, call in ((HERMES, hermes), (LLAMA, llama)):
        grammar = tools_grammar(offered(tool, *TOOLS), "auto", True, format)
        assert_allows(llguidance_tokenizer, grammar, call("f", '{"a": 7}'))
        assert_allows(llguidance_tokenizer, grammar, call("f", '{"a": |8}'))


def test_as_many_tools_as_may_be_offered_can_be_called(llguidance_tokenizer):
    tools = offered(*({"type": "function", "function": {"name": f"f{i}", "parameters": CITY}} for i in range(128)))
    assert_allows(llguidance_tokenizer, tools_grammar(tools, "auto", True, HERMES), hermes("f127", '{"city": "x"}'))


@pytest.mark.parametrize("schema", [{"type": "string"}, {"properties": {"a": {"uniqueItems": True}}}])
def test_a_schema_that_cannot_be_enforced_is_refused_by_its_place(schema):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(ApiError) as caught:
        tools_grammar(offered(TOOLS[0], tool), "auto", True, HERMES)
    assert (caught.value.status, caught.value.param) == (400, "tools[1].function.parameters")


@given(
    st.lists(st.sampled_from([*AUTO_TEXTS, GET, TIME, "\n", "<", '{"', "}"]), max_size=6).map("".join), st.booleans()
)
@settings(deadline=None, max_examples=50)
def test_what_the_grammar_lets_through_is_read_as_its_calls(llguidance_tokenizer, text, parallel):
    matcher = LLMatcher(llguidance_tokenizer, tools_grammar(offered(), "auto", parallel, HERMES))
    count = matcher.try_consume_tokens(list(text.encode()))
    written = text.encode()[:count].decode(errors="ignore")
    if not matcher.is_accepting():
        return
    parser = ToolCallParser(HERMES, {"get", "get_time"})
    pieces = parser.push(written) + parser.flush()
    assert "<tool_call>" not in "".join(piece.text for piece in pieces if isinstance(piece, Content))
    assert sum(isinstance(piece, CallStart) for piece in pieces) == written.count("<tool_call>")
    for i in range(written.count("<tool_call>")):
        json.loads("".join(piece.text for piece in pieces if isinstance(piece, CallArguments) and piece.index == i))


CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"city":"São"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "get_time", "arguments": ""}},
    ],
}
RESULTS = [{"role": "tool", "content": "rain", "tool_call_id": "call_1"}, {"role": "tool", "content": "noon"}]


def test_a_template_that_knows_tools_gets_arguments_as_objects():
    user = {"role": "user", "content": "hi"}
    shown = with_parsed_arguments([user, CALLED, *RESULTS])
    assert [call["function"]["arguments"] for call in shown[1]["tool_calls"]] == [{"city": "São"}, {}]
    assert [shown[0], *shown[2:]] == [user, *RESULTS]
    assert GET in ChatTemplate(QWEN, {}).render(shown)


@pytest.mark.parametrize(
    "arguments", ["{", "[]", "null", '{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 5000 + "1" + "}" * 5000]
)
def test_arguments_that_are_no_json_object_are_shown_as_the_text_they_are(arguments):
    good, bad = CALLED["tool_calls"]
    bad = bad | {"function": {"name": "f", "arguments": arguments}}
    called = CALLED | {"tool_calls": [good, bad]}
    (shown,) = with_parsed_arguments([called])
    assert [call["function"]["arguments"] for call in shown["tool_calls"]] == [{"city": "São"}, arguments]
    (shown,) = with_tool_prompt([called], ())
    assert shown["content"] == f"{GET}\n{hermes('f', json.dumps(arguments))}"


def test_a_template_that_knows_no_tools_is_told_of_everything_in_text():
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}, CALLED, *RESULTS]
    system, user, called, results = with_tool_prompt(before, offered())
    assert system["content"].startswith("Be brief.\n\n")
    listed = system["content"].partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"]["name"] for line in listed] == ["get", "get_time"]
    assert (user, called) == (before[1], {"role": "assistant", "content": f"{GET}\n{TIME}"})
    assert results["role"] == "user"
    assert results["content"].count("<tool_response>\n") == 2
    assert before[0]["content"] == "Be brief."


def test_the_tool_prompt_makes_a_system_message_where_there_is_none():
    shown = with_tool_prompt([{"role": "user", "content": "hi"}], offered())
    assert [message["role"] for message in shown] == ["system", "user"]
    assert with_tool_prompt([{"role": "user", "content": "hi"}], ()) == [{"role": "user", "content": "hi"}]


class Message:
    def __init__(self, role, content, tool_calls=None, tool_call_id=None):
        self.role, self.content, self.name, self.refusal = role, content, None, None
        self.tool_calls, self.tool_call_id = tool_calls, tool_call_id


@pytest.mark.parametrize("choice", [None, "none", "required"])
@pytest.mark.parametrize("source", [QWEN, CHAT_TEMPLATE])
def test_calls_and_results_reach_the_model_whatever_its_template(source, choice):
    toolbox = None if choice is None else Toolbox.of(offered(), choice, None, source)
    call = ToolCall.model_validate(CALLED["tool_calls"][0])
    messages = [Message("developer", "d"), Message("assistant", None, [call]), Message("tool", "rain", None, "call_1")]
    shown = messages_for_template(messages, toolbox, source)
    for_template = None if toolbox is None else toolbox.for_template
    prompt = ChatTemplate(source, {}).render(shown, tools=for_template)
    assert "<|im_start|>system\nd" in prompt
    assert GET in prompt
    assert "rain" in prompt
    assert ("Weather of a city" in prompt) == (choice == "required")
