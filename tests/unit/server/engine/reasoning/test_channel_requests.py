"""Requests to a model with channels, over the real engine core with scripted tokens: what ends, what is enforced."""

import json
import time
from typing import Any

import msgspec
import numpy as np
import pytest

from stellarbyte_server.api.chat.channels import calls_grammar, final_grammar
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.engine.reasoning.reasoning_grammar import ReasoningGrammar
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import Channels
from tests.support.engines.engine import make_request
from tests.support.engines.engine_core import drain
from tests.support.engines.harmony_engine import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END_OF_TEXT,
    MESSAGE,
    RETURN,
    START,
    VOCABULARY,
    channels,
    harmony_core,
    harmony_tokenizer,
    tokens_of,
)

ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
COMMENT, NEXT = "<|channel|>commentary<|message|>", "<|end|><|start|>assistant"
CALLED = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
KNOWN = channels()
NUMBER = final_grammar(json_grammar({"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]}), KNOWN)
SEVEN = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"], "additionalProperties": False}
TOOLS = [OfferedTool(name=name, path="tools[0].function", parameters=SEVEN) for name in ("f", "f_2")]
CALLS, REQUIRED = (calls_grammar(TOOLS, KNOWN, required=required) for required in (False, True))


def answer(script: str, known: Channels | None = KNOWN, max_tokens: int = 200, **fields: Any) -> Delta:
    core = harmony_core(lambda _: tokens_of(script))
    request = make_request([1], max_tokens, reasoning=known, **({"ignore_eos": False} | fields))
    return merged([item for item in drain(core, request)["r"] if isinstance(item, Delta)])


def told(delta: Delta) -> tuple[str, str, str | None]:
    return delta.reasoning, delta.text, delta.finish_reason


def compiled(text: str) -> TokenGrammar:
    grammars = harmony_core(lambda _: []).grammars
    grammars.submit("g", text)
    while not (done := grammars.collect()):
        time.sleep(0.001)
    grammar = done[0][1]
    assert isinstance(grammar, TokenGrammar)
    return grammar


def with_grammar(text: str | None, known: Channels = KNOWN) -> ReasoningGrammar:
    grammar = None if text is None else compiled(text)
    return ReasoningGrammar(known, harmony_tokenizer(), VOCABULARY, grammar, [END_OF_TEXT, RETURN, CALL])


def allowed(grammar: ReasoningGrammar) -> set[int]:
    words_W = np.zeros(grammar.num_words, np.uint32)
    grammar.mask(words_W)
    return set(np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("end", ["<|return|>", "<|call|>", "<|endoftext|>"])
def test_an_answer_ends_with_any_of_the_final_marks(end: str) -> None:
    """Of which files name some only."""
    delta = answer(f"{ANALYSIS}why{NEXT}{FINAL}so{end}more")
    assert told(delta) == ("why", "so", "stop")
    assert delta.num_reasoning_tokens == 3


def test_an_answer_that_is_cut_anywhere_shows_no_header() -> None:
    written = f"{ANALYSIS}why{NEXT}{CALLED}{{}}"
    whole = answer(written)
    assert (whole.reasoning, whole.text, whole.recipients) == ("why", "{}", ((0, "functions.f"),))
    for length in range(1, len(tokens_of(written)) + 1):
        cut = answer(written, max_tokens=length)
        assert "why".startswith(cut.reasoning) and "{}".startswith(cut.text)
        assert cut.recipients in ((), whole.recipients)
        assert cut.finish_reason == "length"


def test_without_channels_the_same_tokens_are_the_answer() -> None:
    delta = answer(f"{ANALYSIS}why{NEXT}{FINAL}so", None)
    assert told(delta) == ("", "analysiswhyassistantfinalso", "stop")


def test_the_reasoning_is_shown_token_by_token() -> None:
    core = harmony_core(lambda _: tokens_of(f"{ANALYSIS}why{NEXT}{FINAL}so"))
    told = drain(core, make_request([1], 99, reasoning=KNOWN, ignore_eos=False))["r"]
    deltas = [item for item in told if isinstance(item, Delta)]
    assert [d.reasoning for d in deltas if d.reasoning] == list("why")
    assert [d.text for d in deltas if d.text] == list("so")


@pytest.mark.parametrize("limit", [0, 2])
@pytest.mark.parametrize("grammar", [None, NUMBER])
def test_the_reasoning_ends_when_its_tokens_are_spent(limit: int, grammar: str | None) -> None:
    """All of it together: a second message of reasoning cannot begin."""
    known = msgspec.structs.replace(KNOWN, max_tokens=limit)
    reasoned = f"{ANALYSIS}{'ab'[:limit]}{NEXT}" if limit else ""
    delta = answer(f"{reasoned}{FINAL}" + '{"n": 7}', known, grammar=grammar, return_token_ids=True)
    assert told(delta) == ("ab"[:limit], '{"n": 7}', "stop")
    # The model would go on, with its reasoning, then with more of it.
    grammar_of = with_grammar(grammar, known)
    for token in tokens_of(reasoned.removesuffix(NEXT)):
        grammar_of.accept(token)
    for token in tokens_of(NEXT) if limit else ():
        assert allowed(grammar_of) == {token}
        grammar_of.accept(token)
    assert CHANNEL in allowed(grammar_of)
    grammar_of.accept(CHANNEL)
    assert ord("a") not in allowed(grammar_of) and ord("f") in allowed(grammar_of)


def test_messages_to_the_user_are_not_bounded_with_the_reasoning() -> None:
    known = msgspec.structs.replace(KNOWN, max_tokens=1)
    assert told(answer(f"{COMMENT}abc{NEXT}{ANALYSIS}d{NEXT}{FINAL}e", known)) == ("d", "abc\n\ne", "stop")


def test_a_grammar_holds_for_the_final_messages_text_only() -> None:
    """No end of the answer is sampled before it, no other mark in it, nor an x where it begins."""
    script = f"{ANALYSIS}{{}}<|return|>{NEXT}{FINAL}" + 'x"n": 7}'
    delta = answer(script, grammar=NUMBER)
    assert (json.loads(delta.text), delta.finish_reason) == ({"n": 7}, "stop")
    assert delta.reasoning.startswith("{}")


def test_what_a_grammar_leaves_of_headers() -> None:
    known = msgspec.structs.replace(KNOWN, may_comment=False)
    for text, may_comment, first, names in (
        (NUMBER, False, {CHANNEL}, b"af"),
        (CALLS, True, {CHANNEL, ord(" ")}, b"acf"),
        (CALLS, False, {CHANNEL, ord(" ")}, b"acf"),
        (REQUIRED, False, {CHANNEL, ord(" ")}, b"ac"),
    ):
        grammar = with_grammar(text, msgspec.structs.replace(known, may_comment=may_comment))
        assert allowed(grammar) == first
        grammar.accept(CHANNEL)
        assert allowed(grammar) == set(names)
        if b"c"[0] in names:
            for token in b"commentary":
                grammar.accept(token)
            assert allowed(grammar) == {ord(" "), *([MESSAGE] if may_comment else [])}


def test_within_reasoning_only_its_end_is_a_mark_before_a_grammar() -> None:
    grammar = with_grammar(NUMBER)
    for token in tokens_of(ANALYSIS):
        grammar.accept(token)
    assert allowed(grammar) == set(range(VOCABULARY)) - {START, CHANNEL, MESSAGE, CONSTRAIN, RETURN, CALL, END_OF_TEXT}
    for token in tokens_of(NEXT):
        grammar.accept(token)
        assert grammar.error is None
    assert allowed(grammar) == {CHANNEL}


@pytest.mark.parametrize(
    "header",
    [
        CALLED,
        "<|channel|>commentary to=functions.f<|message|>",
        "<|channel|>commentary to=functions.f json<|message|>",
        " to=functions.f<|channel|>commentary <|constrain|>json<|message|>",
        " to=functions.f<|channel|>commentary json<|message|>",
    ],
)
@pytest.mark.parametrize(
    "before", ["", f"{ANALYSIS}a{NEXT}", f"{COMMENT}b{NEXT}", f"{ANALYSIS}a{NEXT}{COMMENT}b{NEXT}"]
)
@pytest.mark.parametrize("name", ["f", "f_2"])
def test_calls_follow_their_tools_grammar(before: str, header: str, name: str) -> None:
    """Wherever the recipient stands; an x is not sampled where the arguments begin."""
    header = header.replace("functions.f", f"functions.{name}")
    delta = answer(before + header + 'x"n": 7}<|call|>', grammar=CALLS)
    assert json.loads(delta.text.removeprefix("b")) == {"n": 7}
    assert delta.recipients == ((int("b" in delta.text), f"functions.{name}"),)
    assert (delta.finish_reason, delta.reasoning) == ("stop", "a" * (ANALYSIS in before))


def test_a_final_message_may_come_beside_calls() -> None:
    assert told(answer(f"{ANALYSIS}a{NEXT}{FINAL}so<|return|>", grammar=CALLS)) == ("a", "so", "stop")


def test_a_header_that_the_prompt_has_begun_is_gone_on_with() -> None:
    for begun, rest in (
        (f"<|start|>assistant{FINAL}", ""),
        ("<|start|>assistant<|channel|>", "final<|message|>"),
        ("", None),
    ):
        known = channels(begun)
        script = f"<|start|>assistant{FINAL}" if rest is None else rest
        assert told(answer(script + "so", known)) == ("", "so", "stop")
        if rest != "":
            assert answer(script + '{"n": 7}', known, grammar=NUMBER).text == '{"n": 7}'


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize(
    ("text", "written"),
    [
        (NUMBER, f"{ANALYSIS}ab{NEXT}{ANALYSIS}c{NEXT}{FINAL}" + '{"n": '),
        (CALLS, f"{ANALYSIS}ab{NEXT}{COMMENT}hi{NEXT} to=functions.f<|channel|>commentary json<|message|>" + '{"n"'),
        (CALLS, f"{COMMENT}hi{NEXT}{CALLED}" + '{"n"'),
        (None, f"{ANALYSIS}ab{NEXT}{FINAL}c{NEXT}{ANALYSIS}"),
    ],
)
def test_a_rewind_restores_what_may_follow(text: str | None, written: str, limit: int | None) -> None:
    grammar, tokens = with_grammar(text, msgspec.structs.replace(KNOWN, max_tokens=limit)), tokens_of(written)
    masks = [allowed(grammar)]
    for token in tokens:
        assert token in masks[-1]
        grammar.accept(token)
        masks.append(allowed(grammar))
    assert grammar.error is None
    for count in range(1, len(tokens) + 1):
        grammar.rewind(count)
        assert allowed(grammar) == masks[len(tokens) - count]
        for token in tokens[len(tokens) - count :]:
            grammar.accept(token)
    assert allowed(grammar) == masks[-1]


def test_the_end_of_a_message_is_not_the_end_of_the_answer() -> None:
    assert told(answer(f"{FINAL}a{NEXT}{FINAL}b<|return|>c")) == ("", "a\n\nb", "stop")
