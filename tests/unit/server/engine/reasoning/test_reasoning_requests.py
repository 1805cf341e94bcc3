"""Requests that reason, over the real engine core with scripted tokens: what counts, what ends, what is enforced."""

import json
import time
from typing import Any

import msgspec
import numpy as np
import pytest

from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.engine.reasoning.reasoning_grammar import ReasoningGrammar
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import Reasoning
from tests.support.engines.engine import make_request
from tests.support.engines.engine_core import END, drain, text_of
from tests.support.engines.reasoning_engine import (
    END_MARK,
    START,
    VOCABULARY,
    marks,
    reasoning_core,
    reasoning_tokenizer,
)
from tests.support.servers.fake_engine import make_tokenizer

OPEN = msgspec.structs.replace(marks(), is_open=True)
# The same as text, for a model whose tokenizer has no tokens for them.
TEXT = Reasoning(start="<t>", end="</t>", start_token_ids=tuple(b"<t>"), end_token_ids=tuple(b"</t>"))
NUMBER = json_grammar({"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]})


def answer(script: list[int] | bytes, reasoning: Reasoning | None, max_tokens: int = 50, **fields: Any) -> list[Delta]:
    core = reasoning_core(lambda _: list(script))
    request = make_request([1], max_tokens, reasoning=reasoning, **({"ignore_eos": False} | fields))
    return [item for item in drain(core, request)["r"] if isinstance(item, Delta)]


def compiled_number() -> TokenGrammar:
    """NUMBER for the vocabulary of `reasoning_tokenizer`."""
    grammars = reasoning_core(lambda _: []).grammars
    grammars.submit("g", NUMBER)
    while not (compiled := grammars.collect()):
        time.sleep(0.001)
    grammar = compiled[0][1]
    assert isinstance(grammar, TokenGrammar)
    return grammar


def reasoning_of(deltas: list[Delta]) -> tuple[str, int]:
    return "".join(d.reasoning for d in deltas), sum(d.num_reasoning_tokens for d in deltas)


@pytest.mark.parametrize(
    ("known", "script"),
    [
        (marks(), [START, *b"\nwhy\n", END_MARK, *b"\n\nso"]),
        (OPEN, [*b"\nwhy\n", END_MARK, *b"\n\nso"]),
        (TEXT, b"<t>\nwhy\n</t>\n\nso"),
        (msgspec.structs.replace(TEXT, is_open=True), b"\nwhy\n</t>\n\nso"),
    ],
)
def test_reasoning_is_kept_apart_and_its_tokens_are_counted(known: Reasoning, script: list[int] | bytes) -> None:
    deltas = answer(script, known)
    assert (reasoning_of(deltas), text_of(deltas)) == (("why", 5), "so")
    assert deltas[-1].finish_reason == "stop"
    assert not any(part in delta.text + delta.reasoning for delta in deltas for part in "<>")


def test_without_marks_the_same_tokens_are_the_answer() -> None:
    deltas = answer([START, *b"why", END_MARK, *b"so"], None)
    assert (reasoning_of(deltas), text_of(deltas)) == (("", 0), "<think>why</think>so")


def test_an_answer_that_is_cut_or_ends_while_it_reasons_has_no_text() -> None:
    for max_tokens, reason in ((3, "length"), (50, "stop")):
        deltas = answer(b"why", OPEN, max_tokens)
        assert (reasoning_of(deltas), text_of(deltas), deltas[-1].finish_reason) == (("why", 3), "", reason)


def test_stop_strings_end_the_answer_and_not_the_reasoning() -> None:
    deltas = answer([*b"a.b", END_MARK, *b"c.d"], OPEN, stop=(".",))
    assert (reasoning_of(deltas), text_of(deltas)) == (("a.b", 3), "c")


@pytest.mark.parametrize(
    ("known", "script"), [(marks(), [START, *b"wh", END_MARK, *b"\n\nso"]), (TEXT, b" <t>w</t>so")]
)
def test_log_probabilities_stay_beside_the_answer(known: Reasoning, script: list[int] | bytes) -> None:
    deltas = answer(script, known, logprobs=0)
    shown = [
        (entry.token_id, offset)
        for delta in deltas
        for entry, offset in zip(delta.logprobs, delta.offsets, strict=True)
        if entry.token_id != END
    ]
    assert shown == [(ord("s"), 0), (ord("o"), 1)]


def test_log_probabilities_are_not_lost_where_no_reasoning_comes() -> None:
    for script in (b" <tx", b"  <"):
        deltas = answer(script, TEXT, logprobs=0)
        shown = [entry.token_id for delta in deltas for entry in delta.logprobs if entry.token_id != END]
        assert (bytes(shown), text_of(deltas)) == (script, script.decode())
        offsets = [offset for delta in deltas for offset in delta.offsets]
        assert offsets[: len(script)] == list(range(len(script)))


@pytest.mark.parametrize("limit", [0, 1, 4])
@pytest.mark.parametrize("known", [marks(), OPEN, TEXT])
def test_the_reasoning_ends_when_its_tokens_are_spent(known: Reasoning, limit: int) -> None:
    begin = [] if known.is_open else [START] if known.start_id is not None else list(b"<t>")
    end = [END_MARK] if known.end_id is not None else list(b"</t>")
    thought = list(b"123456"[:limit])
    script = [*begin, *thought, *[ord("x")] * len(end), *b"so"]  # x: it would have gone on
    deltas = answer(script, msgspec.structs.replace(known, max_tokens=limit), return_token_ids=True)
    assert (reasoning_of(deltas), text_of(deltas)) == ((bytes(thought).decode(), limit), "so")
    assert [token for delta in deltas for token in delta.token_ids][: len(script)] == [*begin, *thought, *end, *b"so"]


def test_a_mark_that_is_being_written_when_tokens_are_spent_is_gone_on_with() -> None:
    known = msgspec.structs.replace(TEXT, is_open=True, max_tokens=3)
    deltas = answer(b"12</xxso", known)
    assert (reasoning_of(deltas), text_of(deltas)) == (("12", 2), "so")


@pytest.mark.parametrize(
    ("known", "script"),
    [
        (marks(), [START, END, *b"{}", END_MARK, *b'x"n": 7}']),
        (OPEN, [END, *b"{}", END_MARK, *b'x"n": 7}']),
        (TEXT, [*b"<t>", END, *b"{}</t>", *b'x"n": 7}']),
        (marks(), b'{"n": 7}'),
        (TEXT, b'{"n": 7}'),
    ],
)
def test_a_grammar_holds_for_the_answer_only(known: Reasoning, script: list[int] | bytes) -> None:
    """The end token is not sampled while it reasons, nor an x where the answer begins."""
    deltas = answer(script, known, grammar=NUMBER)
    assert json.loads(text_of(deltas)) == {"n": 7}
    assert deltas[-1].finish_reason == "stop"
    assert reasoning_of(deltas)[0].endswith("{}") == (script != b'{"n": 7}')


def test_a_grammar_that_allows_the_start_mark_as_text_begins_anew_after_the_reasoning() -> None:
    deltas = answer(b"<t>no</t><tag>yes", TEXT, grammar='start: /<t[a-z<>\\/]*/ "!"')
    assert (reasoning_of(deltas)[0], text_of(deltas)[:9]) == ("no", "<tag>yes!")


def test_no_token_goes_past_a_mark_of_text_before_a_grammar() -> None:
    """The grammar would not see the rest of such a token."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([">{", "x</t>{", "</t>", ">"])
    grammar = ReasoningGrammar(msgspec.structs.replace(TEXT, is_open=True), tokenizer, 262, compiled_number(), [END])

    def allowed() -> set[int]:
        words_W = np.zeros(grammar.num_words, np.uint32)
        grammar.mask(words_W)
        return set(np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist())

    assert allowed() == set(range(262)) - {END, 260}
    for token in b"</t":
        grammar.accept(token)
    assert allowed() == set(range(262)) - {END, 259, 260}


@pytest.mark.parametrize(
    ("known", "tokens"),
    [
        (marks(), [START, *b"abc", END_MARK, *b'{"n": ']),
        (OPEN, [*b"abc", END_MARK, *b'{"n": ']),
        (TEXT, b'<t>a</t>{"n": '),
    ],
)
@pytest.mark.parametrize("limit", [None, 3])
def test_a_rewind_restores_what_may_follow(known: Reasoning, tokens: list[int] | bytes, limit: int | None) -> None:
    known = msgspec.structs.replace(known, max_tokens=limit)
    grammar = ReasoningGrammar(known, reasoning_tokenizer(), VOCABULARY, compiled_number(), [END])

    def mask() -> list[int]:
        words_W = np.zeros(grammar.num_words, np.uint32)
        grammar.mask(words_W)
        return words_W.tolist()

    masks = [mask()]
    for token in tokens:
        grammar.accept(token)
        masks.append(mask())
    assert grammar.error is None
    for count in range(1, len(tokens) + 1):
        grammar.rewind(count)
        assert mask() == masks[len(tokens) - count]
        for token in tokens[len(tokens) - count :]:
            grammar.accept(token)
    assert mask() == masks[-1]
