"""Texts with recipients become content and calls, however the texts are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.api.answers.addressed_calls import AddressedCallParser
from stellarbyte_server.api.answers.choices import ChoiceForm, ChoiceReader, Fragment
from stellarbyte_server.api.answers.tool_parser import CallArguments, CallStart, Content, Piece
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.tokens.token_bytes import TokenBytes
from tests.support.servers.fake_engine import make_tokenizer
from tests.support.tools.offered import by_name, custom, function

TOOLS = by_name(function("f", city={"type": "string"}), custom("run"), custom("sum", "lark", "start: /.*/"))
CASES: list[tuple[list[tuple[str, str]], list[Piece]]] = [
    ([("", "hello")], [Content("hello")]),
    (
        [("", "I look."), ("functions.f", '{"city": "}"}')],
        [Content("I look."), CallStart(0, "f"), CallArguments(0, '{"city": "}"}')],
    ),
    ([("f", ' {"a": {}}\n')], [CallStart(0, "f"), CallArguments(0, '{"a": {}}')]),
    (
        [("functions.f", "{}"), ("functions.f", '{"b": 1}'), ("", "and")],
        [CallStart(0, "f"), CallArguments(0, "{}"), CallStart(1, "f"), CallArguments(1, '{"b": 1}'), Content("and")],
    ),
    ([("functions.run", '{"input": "a\\n\\u00e9"}')], [CallStart(0, "run", True), CallArguments(0, "a\né")]),
    ([("functions.sum", '{"input": "1+"1"}')], [CallStart(0, "sum", True), CallArguments(0, '1+"1"}')]),
    ([("functions.nope", '{"x": 1}'), ("assistant", "y")], [Content('{"x": 1}y')]),
    ([("functions.f", "not JSON")], [Content("not JSON")]),
    ([("functions.run", '{"other": 1}')], [Content('{"other": 1}')]),
    # Cut off: arguments as far as they go, and nothing of what may have become a call.
    ([("functions.f", '{"city": "O')], [CallStart(0, "f"), CallArguments(0, '{"city": "O')]),
    ([("", "a"), ("functions.f", "")], [Content("a")]),
    ([("functions.run", '{"inp')], []),
]


def joined(pieces: list[Piece]) -> list[Piece]:
    whole: list[Piece] = []
    for piece in pieces:
        last = whole[-1] if whole else None
        if isinstance(piece, Content) and isinstance(last, Content):
            whole[-1] = Content(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments) and last.index == piece.index:
            whole[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            whole.append(piece)
    return whole


def changes_of(messages: list[tuple[str, str]]) -> list[tuple[int, str]]:
    starts = [sum(len(text) for _, text in messages[:i]) for i in range(len(messages))]
    return [(start, recipient) for start, (recipient, _) in zip(starts, messages, strict=True) if start or recipient]


@pytest.mark.parametrize(("messages", "pieces"), CASES, ids=range(len(CASES)))
@given(data=st.data())
def test_messages_are_calls_and_content_in_any_division(
    messages: list[tuple[str, str]], pieces: list[Piece], data: st.DataObject
) -> None:
    """A recipient comes with its text's first part, or before it."""
    text, changes = "".join(text for _, text in messages), changes_of(messages)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    parser, found = AddressedCallParser(TOOLS), []
    for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
        due = [change for change in changes if start <= change[0] < end or change[0] == end == len(text)]
        changes = [change for change in changes if change not in due]
        parser.address(due)
        found += parser.push(text[start:end])
    assert joined(found + parser.flush()) == pieces


def test_a_choice_is_made_of_them_and_ends_with_calls() -> None:
    form = ChoiceForm(kind="chat", with_tools=True)
    reader = ChoiceReader(form, TokenBytes(make_tokenizer()), AddressedCallParser(TOOLS))
    deltas = [
        Delta(request_id="r", text="", num_tokens=2, reasoning="why"),
        Delta(request_id="r", text='I look.{"ci', num_tokens=9, recipients=((7, "functions.f"),)),
        Delta(request_id="r", text='ty": 1}', num_tokens=9, finish_reason="stop"),
    ]
    fragments: list[Fragment] = [reader.read(delta) for delta in deltas]
    choice = reader.whole(0, fragments)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"city": 1}'}
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("I look.", "why")
    assert choice["finish_reason"] == "tool_calls"


def test_without_tools_all_texts_are_content() -> None:
    reader = ChoiceReader(ChoiceForm(kind="chat"), TokenBytes(make_tokenizer()))
    delta = Delta(request_id="r", text="{}", num_tokens=1, recipients=((0, "functions.f"),), finish_reason="stop")
    choice = reader.whole(0, [reader.read(delta)])
    assert (choice["message"]["content"], choice["finish_reason"]) == ("{}", "stop")
