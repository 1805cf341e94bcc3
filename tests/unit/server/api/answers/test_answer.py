"""Answers made of the engine's deltas: several choices at once, tools, log-probabilities, failures, and their cost."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.api.answers.answer import AnswerPlan, TokenCount, _events, _read_all, interleaved
from stellarbyte_server.api.answers.choices import ChoiceForm, ChoiceReader, PromptEcho
from stellarbyte_server.api.answers.logprobs import ShownToken, TokenAligner
from stellarbyte_server.api.answers.sse import ChunkWriter
from stellarbyte_server.api.answers.tool_parser import ToolCallParser
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.contract.objects import AnswerMessage, ChatDelta
from stellarbyte_server.api.structured.tool_formats import HERMES
from stellarbyte_server.protocol.messages import Delta, TokenLogprob
from stellarbyte_server.protocol.request import GRAMMAR_REFUSED
from stellarbyte_server.tokens.token_bytes import TokenBytes
from tests.support.servers.fake_engine import make_tokenizer
from tests.support.tools.offered import by_name, custom, hermes

TOKEN_BYTES = TokenBytes(make_tokenizer())
TOOLS = by_name({"type": "function", "function": {"name": "f"}}, custom("run"))
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}\n</tool_call>'


class Stream:
    """Stands in for a DeltaStream: the deltas of a text, byte by byte, each a turn of the event loop later."""

    def __init__(self, text: str, *, logprobs: bool = False, fails: bool = False) -> None:
        self.was_closed = False
        data = text.encode()
        self._deltas = [
            Delta(
                request_id="r",
                text=chr(value),
                num_tokens=1,
                logprobs=(TokenLogprob(value, -1.0, ((value, -1.0), (65, -2.0))),) if logprobs else (),
                offsets=(i,) if logprobs else (),
                token_ids=(value,),
                finish_reason="stop" if i == len(data) - 1 else None,
            )
            for i, value in enumerate(data)
        ]
        if fails:
            self._deltas.append(Delta(request_id="r", text="", num_tokens=0, finish_reason="error", error="It broke."))

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Delta:
        await asyncio.sleep(0)
        if not self._deltas:
            raise StopAsyncIteration
        return self._deltas.pop(0)

    def close(self) -> None:
        self.was_closed = True


def plan(kind: str, num_choices: int, form: ChoiceForm, **fields: Any) -> AnswerPlan:
    def reader(_: int) -> ChoiceReader:
        return ChoiceReader(form, TOKEN_BYTES, ToolCallParser(HERMES, TOOLS) if form.with_tools else None)

    return AnswerPlan(
        kind=kind,
        model="m",
        requests=(),
        candidates=num_choices,
        choices=num_choices,
        reader=reader,
        stream=True,
        **fields,
    )


async def collected(events: AsyncIterator[bytes]) -> list[Any]:
    content = b"".join([event async for event in events])
    return [
        event if event == "[DONE]" else json.loads(event)
        for event in content.decode().split("data: ")[1:]
        for event in [event.strip()]
    ]


def streamed(streams: list[Stream], answer_plan: AnswerPlan) -> list[Any]:
    writer = ChunkWriter({"id": "x"}, answer_plan.kind, len(streams), include_usage=answer_plan.include_usage)
    return asyncio.run(collected(_events(streams, answer_plan, writer, TokenCount(3))))


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_streamed_choices_join_to_what_is_answered_whole(kind: str) -> None:
    texts = [f"text and {CALL}\n{CALL}" if kind == "chat" else "text", "other", CALL if kind == "chat" else "x"]
    form = ChoiceForm(kind=kind, logprobs=2, prompt_token_ids=[7], with_tools=kind == "chat")
    *chunks, done = streamed([Stream(text, logprobs=True) for text in texts], plan(kind, 3, form))
    assert done == "[DONE]"
    read = asyncio.run(_read_all([Stream(text, logprobs=True) for text in texts], plan(kind, 3, form), TokenCount(3)))
    for index in range(3):
        whole = read[index].reader.whole(index, read[index].fragments)
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [whole["finish_reason"]]
        assert parts[-1]["finish_reason"] == whole["finish_reason"]
        ids = [token_id for part in parts for token_id in part.get("token_ids", [])]
        assert ids == whole["token_ids"] == list(texts[index].encode())
        if kind == "completion":
            assert "".join(part["text"] for part in parts) == whole["text"] == texts[index]
            tokens = [token for part in parts for token in (part["logprobs"] or {}).get("tokens", [])]
            assert tokens == whole["logprobs"]["tokens"] == list(texts[index])
            continue
        message = whole["message"]
        assert "".join(part["delta"].get("content") or "" for part in parts) == (message["content"] or "")
        calls: dict[int, list[str]] = {}
        for call in [call for part in parts for call in part["delta"].get("tool_calls", [])]:
            calls.setdefault(call["index"], []).append(call["function"]["arguments"])
        arguments = [call["function"]["arguments"] for call in message.get("tool_calls", [])]
        assert ["".join(parts) for parts in calls.values()] == arguments
        assert len(arguments) == texts[index].count("<tool_call>")
        assert whole["finish_reason"] == ("tool_calls" if arguments else "stop")


@pytest.mark.parametrize("are_functions", [False, True])
def test_calls_of_custom_tools_and_of_functions_have_their_own_forms(are_functions: bool) -> None:
    form = ChoiceForm(kind="chat", with_tools=True, are_functions=are_functions)
    text = CALL if are_functions else f"{hermes('run', json.dumps({'input': 'a b'}))}\n{CALL}"
    fields = {"begins_with_text": False}
    first, *chunks, last, _ = streamed([Stream(text)], plan("chat", 1, form, **fields))
    read = asyncio.run(_read_all([Stream(text)], plan("chat", 1, form, **fields), TokenCount(3)))
    whole = read[0].reader.whole(0, read[0].fragments)
    message = AnswerMessage.model_validate(whole["message"])
    deltas = [ChatDelta.model_validate(chunk["choices"][0]["delta"]) for chunk in chunks]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert message.content is None and not any(delta.content for delta in deltas)
    assert last["choices"][0]["finish_reason"] == whole["finish_reason"]
    if are_functions:
        assert (whole["finish_reason"], message.tool_calls) == ("function_call", None)
        called = [delta.function_call for delta in deltas]
        assert called[0].name == message.function_call.name == "f"
        assert "".join(each.arguments for each in called) == message.function_call.arguments == CALL[39:-14]
        return
    assert whole["finish_reason"] == "tool_calls"
    run, f = message.tool_calls
    assert (run.type, run.custom.name, run.custom.input) == ("custom", "run", "a b")
    assert (f.type, f.function.name) == ("function", "f")
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert [(call.type, call.index) for call in calls if call.id] == [("custom", 0), ("function", 1)]
    assert "".join(call.custom.input for call in calls if call.index == 0) == "a b"
    assert "".join(call.function.arguments for call in calls if call.index == 1) == f.function.arguments


def test_a_failure_is_the_last_event_and_there_is_no_done() -> None:
    form = ChoiceForm(kind="completion")
    events = streamed([Stream("aaaa"), Stream("b", fails=True)], plan("completion", 2, form, include_usage=True))
    assert events[-1]["error"]["message"] == "It broke."
    assert "[DONE]" not in events


def test_a_grammar_that_cannot_be_followed_is_the_requests_own_fault() -> None:
    stream = Stream("")
    stream._deltas = [
        Delta(request_id="r", text="", num_tokens=1, finish_reason="error", error="Too hard.", code=GRAMMAR_REFUSED)
    ]
    (*_, event) = streamed([stream], plan("chat", 1, ChoiceForm(kind="chat"), grammar_param="response_format"))
    error = {"message": "Too hard.", "type": "invalid_request_error", "param": "response_format"}
    assert event["error"] == error | {"code": "grammar_refused"}


def test_when_one_of_several_fails_all_are_given_up() -> None:
    streams = [Stream("a", fails=True), Stream("b")]
    with pytest.raises(ApiError):
        asyncio.run(_read_all(streams, plan("completion", 2, ChoiceForm(kind="completion")), TokenCount(3)))
    assert all(stream.was_closed for stream in streams)


def test_streams_take_turns() -> None:
    async def order() -> list[int]:
        return [number async for number, _ in interleaved([Stream("abc"), Stream("defgh"), Stream("i")])]

    numbers = asyncio.run(order())
    assert Counter(numbers) == {0: 3, 1: 5, 2: 1} and set(numbers[:3]) == {0, 1, 2}


@given(st.text(max_size=30), st.lists(st.integers(0, 5), max_size=20), st.integers(0, 40))
def test_tokens_are_shown_once_their_text_is_and_never_when_it_was_cut_away(
    text: str, lengths: list[int], cut: int
) -> None:
    """Tokens of any number of characters, shown piece by piece; the text is cut after some, as by a stop string."""
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    tokens = [ShownToken(i, None, offset) for i, offset in enumerate(offsets)]
    text = (text * 40)[: min(cut, sum(lengths))].ljust(min(cut, sum(lengths)), "x")
    aligner = TokenAligner()
    aligner.add(tokens)
    shown: list[ShownToken] = []
    for i, character in enumerate(text):
        shown += aligner.show(character, None)
        assert shown == [token for token in tokens if token.offset <= i]
    assert shown + aligner.show("", "stop") == [token for token in tokens if token.offset < len(text)]
    aligner = TokenAligner()
    aligner.add(tokens)
    assert aligner.show(text, "length") == tokens


def test_log_probabilities_of_an_answer_without_text_are_an_empty_list() -> None:
    reader = ChoiceReader(ChoiceForm(kind="chat", logprobs=0), TOKEN_BYTES)
    end = Delta(request_id="r", text="", num_tokens=1, finish_reason="stop")
    assert reader.whole(0, [reader.read(end)])["logprobs"] == {"content": [], "refusal": None}


def test_an_echo_comes_before_the_answer_with_its_tokens() -> None:
    form = ChoiceForm(kind="completion", logprobs=0, echo=PromptEcho("hé", list("hé".encode()), [0, 1, 1]))
    reader = ChoiceReader(form, TOKEN_BYTES)
    prompt_logprobs = tuple(TokenLogprob(value, -0.5) for value in "hé".encode()[1:])
    answer = Delta(
        request_id="r", text="!", num_tokens=1, finish_reason="length", prompt_logprobs=prompt_logprobs,
        logprobs=(TokenLogprob(33, -0.25),), offsets=(0,),
    )  # fmt: skip
    choice = reader.whole(0, [reader.read(answer)])
    assert choice["text"] == "hé!"
    assert choice["logprobs"] == {
        "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [None, -0.5, -0.5, -0.25],
        "top_logprobs": [None, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}, {"!": -0.25}],
        "text_offset": [0, 1, 1, 2],
    }


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_token_on_its_way_out_builds_no_pydantic_object(kind: str) -> None:
    seen: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen[frame.f_globals.get("__name__", "").partition(".")[0]] += 1
        elif event == "c_call":
            seen[
                str(getattr(argument, "__module__", None) or type(argument.__self__).__module__).partition(".")[0]
            ] += 1

    form = ChoiceForm(kind=kind)
    sys.setprofile(note)
    try:
        streamed([Stream("x" * 500)], plan(kind, 1, form, include_usage=True))
    finally:
        sys.setprofile(None)
    assert seen["stellarbyte_server"] > 1000
    assert not any(name.startswith("pydantic") for name in seen)
