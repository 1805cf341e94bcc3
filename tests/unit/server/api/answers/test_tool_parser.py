"""Text of answers to content and tool calls, however the text is cut."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.api.answers.tool_parser import CallArguments, CallStart, Content, ToolCallParser, new_call_id
from stellarbyte_server.api.structured.tool_formats import HERMES, LLAMA, MISTRAL, MISTRAL_LIST, QWEN_CODER
from tests.support.tools.offered import FORMATS, by_name, custom, function, mistral, mistral_list, one_call, qwen_coder

ANY_OBJECT = {"type": "object"}
TOOLS = by_name(
    *({"type": "function", "function": {"name": name, "parameters": ANY_OBJECT}} for name in ("f", "get_weather")),
    function("get", city={"type": "string"}),
    custom("run"),
    custom("sum", "lark", "start: /.*/"),
)
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
FRAGMENTS = [
    *("\n", " ", "<", "<tool", "<tool_call>", "\n<tool_call>", "</tool_call>", '{"name": "f"', '{"name": "nope", '),
    *('"arguments"', ': {"a": "}\\""}', "}", "{", '"', "\\", "text", "é", CALL, CALL.replace("\n", ""), "; "),
    *('{"name": "f", "parameters": {', '{"name": "f", "arguments": {', '"b": ["]"]}}'),
    *(
        "[TOOL_CALLS]",
        "[TOOL",
        "f[ARGS]",
        "[ARGS]{",
        "[",
        "]",
        ", ",
        "}]",
        mistral("f", '{"a": "]"}'),
        "<|python_tag|>",
    ),
    *("<tool_call>\n<function=f>\n", "<parameter=a>\n", "1", "\n</parameter>\n", "</function>\n", "</param", "null"),
    *(
        "<|python_tag|>",
        "[CALL_ID]abc123DEF[ARGS]",
        mistral_list(("f", "{}"), ("get", "{}")),
        qwen_coder("f", a="x\n<", b="[1]"),
    ),
    *('"run", "arguments": {"input": "a\\n\\u00e9', "<function=run>\n<parameter=input>\n", "sum[ARGS]", '{"input": "'),
]


def joined(pieces):
    """The pieces with neighbours of one kind as one."""
    whole = []
    for piece in pieces:
        if whole and isinstance(piece, Content) and isinstance(whole[-1], Content):
            whole[-1] = Content(whole[-1].text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(whole[-1], CallArguments):
            whole[-1] = CallArguments(piece.index, whole[-1].text + piece.text)
        else:
            whole.append(piece)
    return whole


def parse(*parts, format=HERMES, tools=TOOLS, required=False):
    parser = ToolCallParser(format, tools, required=required)
    pieces = [piece for part in parts for piece in parser.push(part)]
    return joined(pieces + parser.flush())


def test_calls_are_taken_out_of_the_text():
    text = f'Let me look.\n{CALL}\n<tool_call>\n{{"name": "get_weather", "arguments": {{}}}}\n</tool_call>'
    assert parse(text) == [
        Content("Let me look."),
        CallStart(0, "f"),
        CallArguments(0, '{"a": 1}'),
        CallStart(1, "get_weather"),
        CallArguments(1, "{}"),
    ]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.data(), st.sampled_from([*FORMATS.values()]))
def test_how_a_text_is_cut_changes_nothing(text, data, format):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(*parts, format=format) == parse(text, format=format) == parse(*text, format=format)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.sampled_from([*FORMATS.values()]))
def test_a_text_without_an_offered_tool_is_all_content(text, format):
    assert parse(*text, format=format, tools={}) == ([Content(text)] if text else [])


@given(
    st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4)),
    st.booleans(),
)
def test_arguments_arrive_as_they_were_written(arguments, ensure_ascii):
    written = json.dumps(arguments, ensure_ascii=ensure_ascii)
    call = f'{{"name": "f", "arguments": {written}}}'
    expected = [CallStart(0, "f"), CallArguments(0, written)]
    assert parse(f"<tool_call>\n{call}\n</tool_call>") == expected
    assert parse(call.replace('"arguments"', '"parameters"', 1), format=LLAMA) == expected


@pytest.mark.parametrize(
    "head",
    [
        '<tool_call>{"name":"f","arguments":',
        '<tool_call>\n\n{\n  "name" : "f" ,\n\t"arguments"\n:\r\n ',
        ' \n\n<tool_call>\n{"name": "f", "arguments": ',
    ],
)
def test_space_in_a_call_and_before_it_means_nothing(head):
    assert parse(*head, "{}", " \n} </tool_call>\n") == [CallStart(0, "f"), CallArguments(0, "{}")]


@pytest.mark.parametrize(
    "text",
    [
        "a < b, <tool and <tool_cal",
        "<tool_call> is a tag",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}, "name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>',
        '\n<tool_call>\n{"name": "f", "argu',
        "  \n",
        "text\n",
    ],
)
def test_what_is_no_call_is_content_to_the_last_character(text):
    assert parse(text) == [Content(text)]


@pytest.mark.parametrize("length", range(len(CALL) + 1))
def test_a_call_that_is_cut_off_yields_what_there_was(length):
    pieces = parse(CALL[:length])
    start = CALL.index('{"a"')
    if length <= start:
        assert pieces == ([Content(CALL[:length])] if length else [])
    else:
        assert pieces == [CallStart(0, "f"), CallArguments(0, CALL[start:length][: len('{"a": 1}')])]


@every_format
def test_a_forced_call_that_is_cut_off_before_its_arguments_is_no_content(format):
    call = one_call(format)
    for length in range(len(call) + 1):
        pieces = parse(*call[:length], format=format, required=True)
        assert not any(isinstance(piece, Content) for piece in pieces)
        assert pieces == [] or pieces[0] == CallStart(0, "get")


@every_format
def test_a_call_of_every_format_is_read_between_texts_and_after_another(format):
    expected = [CallStart(0, "get"), CallArguments(0, '{"city": "São"}')]
    call = one_call(format)
    assert parse(*call, format=format) == parse(call, format=format) == parse(f"\n{call}\n", format=format) == expected
    if format.separator is None:
        return
    assert parse(*f"I look.\n{call}", format=format) == [Content("I look."), *expected]
    again = call.removeprefix(format.trigger + format.opening) if format.is_list else call
    both = call.removesuffix(format.closing) + format.separator + again
    assert parse(*both, format=format) == [*expected, CallStart(1, "get"), CallArguments(1, '{"city": "São"}')]


def test_mistrals_calls_may_have_space_in_a_list_and_none_around_marks():
    text = '[TOOL_CALLS] [ {"name" : "f", "arguments": {"a": 1} } ,\n{"name": "get", "arguments": {}}]\n'
    expected = [CallStart(0, "f"), CallArguments(0, '{"a": 1}'), CallStart(1, "get"), CallArguments(1, "{}")]
    assert parse(*text, format=MISTRAL_LIST) == expected
    for text in ("[TOOL_CALLS]g[ARGS]{}", "[TOOL_CALLS]f[ARG]{}", "[TOOL_CALLS]f [ARGS]{}", "a[TOOL_CALLS][]"):
        assert parse(*text, format=MISTRAL) == [Content(text)]


def test_llamas_token_for_programs_before_a_call_is_dropped():
    call = one_call(LLAMA)
    assert parse(*f"<|python_tag|>{call}", format=LLAMA) == parse(call, format=LLAMA)
    assert parse(*"<|python_tag|>print()", format=LLAMA) == [Content("<|python_tag|>print()")]
    assert parse("<|python", format=LLAMA) == [Content("<|python")]


@given(
    st.text() | st.lists(st.sampled_from(['"', "\\", "\n", "😀", "\n</parameter", "}}", "<"]), max_size=8).map("".join)
)
def test_the_input_of_a_custom_tool_arrives_as_the_text_it_means(text):
    for ensure_ascii in (True, False):
        written = json.dumps({"input": text}, ensure_ascii=ensure_ascii)
        call = f'<tool_call>\n{{"name": "run", "arguments": {written}}}\n</tool_call>'
        for parts in (call, [call]):
            start, *said = parse(*parts, f"\n{CALL}")
            assert (start, start.is_custom) == (CallStart(0, "run", True), True)
            assert said == [
                *([CallArguments(0, text)] if text else []),
                CallStart(1, "f"),
                CallArguments(1, '{"a": 1}'),
            ]
    if "\n</parameter>" not in text:
        said = parse(*qwen_coder("run", input=text), format=QWEN_CODER)[1:]
        assert said == ([CallArguments(0, text)] if text else [])


@every_format
def test_an_input_with_a_grammar_is_all_that_is_left_of_the_answer(format):
    call = one_call(format).replace("get", "sum").replace("city", "input")
    begun = call[: call.index("São")]
    text = f'1 +\n "}}}}</function>{call}'
    assert parse(*begun, text, format=format) == [CallStart(0, "sum", True), CallArguments(0, text)]


def test_text_after_calls_is_content():
    assert parse(f"{CALL}\nDone. {CALL}")[2:] == [Content("\nDone. "), CallStart(1, "f"), CallArguments(1, '{"a": 1}')]


def test_a_call_may_follow_text_that_looked_like_one():
    assert parse("<tool_call>\n", CALL) == [Content("<tool_call>"), CallStart(0, "f"), CallArguments(0, '{"a": 1}')]
    assert parse("<tool", CALL) == [Content("<tool"), CallStart(0, "f"), CallArguments(0, '{"a": 1}')]


def test_a_call_without_its_end_is_ended_by_the_next_one():
    pieces = parse(CALL.removesuffix("</tool_call>"), CALL)
    assert [piece.index for piece in pieces] == [0, 0, 1, 1]


def test_a_llama_call_is_the_whole_answer():
    call = '{"name": "f", "parameters": {"a": {"b": "}"}}}'
    expected = [CallStart(0, "f"), CallArguments(0, '{"a": {"b": "}"}}')]
    assert parse(*call, format=LLAMA) == parse("\n\n", call, "\n", format=LLAMA) == expected
    for text in (f"Well: {call}", '{"name": "f"}', '{"x": 1}', CALL):
        assert parse(*text, format=LLAMA) == [Content(text)]


def test_nothing_is_held_back_but_what_may_become_a_call():
    parser = ToolCallParser(HERMES, TOOLS)
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push("\n<tool") == []
    assert joined(parser.push("s>")) == [Content("\n<tools>")]
    assert parser.push('\n<tool_call>\n{"name": "f", "arguments": ') == []
    assert joined(parser.push('{"ci')) == [CallStart(0, "f"), CallArguments(0, '{"ci')]
    assert parser.push("ty") == [CallArguments(0, "ty")]


def test_every_call_has_an_id_of_its_own():
    ids = [piece.id for piece in parse(f"{CALL}\n{CALL}") if isinstance(piece, CallStart)] + [new_call_id()]
    assert len(set(ids)) == 3
    assert all(re.fullmatch("call_[0-9a-f]{24}", id) for id in ids)


UNITS = ["<", "\n", " ", "<tool_call>\n", CALL, '{"', "\\", '<tool_call>{"name": "']
STARTS = ["", '<tool_call>{"name": "f", "arguments": {"', "<tool_call>"]
LONG_TEXTS = [
    *((HERMES, start, unit) for start in STARTS for unit in UNITS),
    (HERMES, '<tool_call>{"name": "run", "arguments": {"input": "', "\\"),
    (QWEN_CODER, "<tool_call><function=get><parameter=city>", "\n"),
    (QWEN_CODER, "<tool_call><function=f><parameter=", "<"),
    (QWEN_CODER, "<tool_call><function=f><parameter=a>", "\n</parameter"),
    (MISTRAL_LIST, '[TOOL_CALLS][{"name": "f", "arguments": {}}', ", "),
]


@pytest.mark.parametrize(("format", "start", "unit"), LONG_TEXTS)
def test_a_long_text_costs_no_more_for_each_character(format, start, unit):
    def seconds(size):
        text = start + unit * (size // len(unit))
        whole, cut = ToolCallParser(format, TOOLS), ToolCallParser(format, TOOLS)
        began = time.process_time()
        whole.push(text)
        for character in text:
            cut.push(character)
        return time.process_time() - began

    # 20 times as long: 400 times the cost if every character looked at the whole text again.
    assert min(seconds(40_000) for _ in range(3)) < 100 * min(seconds(2_000) for _ in range(3))
