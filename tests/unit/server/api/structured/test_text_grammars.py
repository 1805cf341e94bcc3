"""Regular expressions, choices and grammars as llguidance's Lark."""

import pytest
from llguidance import LLMatcher, LLTokenizer

from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.structured.text_grammars import choice_grammar, lark_grammar, regex_grammar
from stellarbyte_server.protocol.grammar import LIMITS, check_grammar
from tests.support.servers.fake_engine import make_tokenizer

FAKE = LLTokenizer(make_tokenizer().to_str(), eos_token=256)


def accepts(grammar: str, text: str) -> bool:
    check_grammar(grammar)
    matcher = LLMatcher(FAKE, grammar, log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.validate_tokens([*tokens, 256]) == len(tokens) + 1


@pytest.mark.parametrize(
    "pattern, allowed, others",
    [
        ("^a|bc$", ["a", "bc"], ["ab", "c", ""]),
        ("https?://[^/]+/", ["http://a/"], ["http:/a"]),
        (r"\d{3}\/x\\", ["123/x\\"], ["123"]),
        ("a\nb|\\\nc", ["a\nb", "\nc"], ["ab", "nc"]),
        ("(?i)yes|NO", ["YES", "no"], ["yesno"]),
    ],
)
def test_a_pattern_is_matched_by_the_whole_answer(pattern: str, allowed: list[str], others: list[str]) -> None:
    grammar = regex_grammar(pattern, "guided_regex")
    assert [accepts(grammar, text) for text in allowed + others] == [True] * len(allowed) + [False] * len(others)


def test_a_choice_is_one_of_its_texts() -> None:
    choices = ["a", "ab", 'say "hi"\n', "é😀\u2028\\", "/x/ | y", *(f"number {number}" for number in range(990))]
    grammar = choice_grammar(choices)
    for choice in choices[:30]:
        assert accepts(grammar, choice)
    for other in ("", "b", "number", "number 1 ", "say"):
        assert not accepts(grammar, other)


ARITHMETIC_LARK = """
// 1 + 2 & more
?start: expr
expr: NUMBER ("+" NUMBER)* "&"~0..1
%import common.NUMBER
%ignore / +/
"""


@pytest.mark.parametrize(
    "grammar, allowed, others",
    [
        (ARITHMETIC_LARK, ["1", "1 + 22", "1&"], ["+", "1 +", ""]),
        ('root ::= "a" root | item\nitem ::= [0-9]+', ["aa1", "07"], ["a", "root"]),
        ('start: "::=" "%json" /[%&~]/', ["::=%json~"], ["::="]),
    ],
)
def test_a_grammar_may_be_in_lark_or_gbnf(grammar: str, allowed: list[str], others: list[str]) -> None:
    lark = lark_grammar(grammar, "guided_grammar")
    assert [accepts(lark, text) for text in allowed + others] == [True] * len(allowed) + [False] * len(others)


@pytest.mark.parametrize(
    "make, text, why",
    [
        (regex_grammar, "a\\", "within an escape"),
        (lark_grammar, "root ::= (", "GBNF"),
        (lark_grammar, "root ::= " + "(" * 30_000, "GBNF"),
        (lark_grammar, 'start: %json {"type": "null"}', "'%json'"),
        (lark_grammar, '%llguidance {}\nstart: "a"', "'%llguidance'"),
        (lark_grammar, "start: A\nA: /a/ & /b/", "'&'"),
        (lark_grammar, "start: A\nA: ~/a/", "'~'"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused_in_one_sentence(make, text: str, why: str) -> None:
    with pytest.raises(ApiError, match="'guided_any'") as caught:
        make(text, "guided_any")
    assert caught.value.status == 400 and caught.value.param == "guided_any"
    assert why in str(caught.value) and "\n" not in str(caught.value)
