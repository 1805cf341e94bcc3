"""Where texts are cut: every piece by an example, nothing is lost, and `regex` cuts in the same places."""

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from stellarbyte.train.config.tokenizer import Splits
from stellarbyte.train.tokenizer.pretokens import pattern, pre_tokenizer


def pieces(text: str, splits: Splits | None = None) -> list[str]:
    """As tokenizers cuts it."""
    cut = pre_tokenizer(Splits() if splits is None else splits).pre_tokenize_str(text)
    decoder = decoders.ByteLevel()
    return [decoder.decode([piece]) for piece, _ in cut]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world, it's 2024!", ["Hello", " world", ",", " it", "'s", " ", "2", "0", "2", "4", "!"]),
        ("春眠不覺曉，處處聞啼鳥。", ["春眠不覺", "曉", "，", "處處聞啼", "鳥", "。"]),
        ("a中文b", ["a", "中文", "b"]),
        ("def f(x):\n    return x", ["def", " f", "(x", "):", "\n", "    ", "return", " x"]),
        ("\n\t\tif a_b:\n\n  c", ["\n", "\t\t", "if", " a", "_b", ":", "\n\n", "  ", "c"]),
        ("a  b   c", ["a", " ", " b", "  ", " c"]),
        ("x.append(y) += 1", ["x", ".append", "(y", ")", " +=", " ", "1"]),
        (r"\frac{a}{b} \le 2", ["\\frac", "{a", "}{", "b", "}", " ", "\\le", " ", "2"]),
        ("<think>so</think>\n<br/>", ["<think>", "so", "</think>", "\n", "<br/>"]),
        ("if (a)<b>;", ["if", " (", "a", ")", "<b>", ";"]),
        ("a<b </", ["a", "<b", " </"]),
        ("ひらがな カタカナ 한국어", ["ひらがな", " カタカナ", " 한국어"]),
        ("e\u0301té", ["e\u0301té"]),
        ("one \n two\r\n", ["one", " ", "\n", " two", "\r\n"]),
        ("end  ", ["end", "  "]),
    ],
)
def test_pieces(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize(
    ("splits", "text", "expected"),
    [
        (Splits(digits=3), "1234567", ["123", "456", "7"]),
        (Splits(han=1), "春眠不覺", ["春", "眠", "不", "覺"]),
        (Splits(han=6), "春眠不覺曉處處", ["春眠不覺曉處", "處"]),
    ],
)
def test_lengths_are_those_of_the_settings(splits: Splits, text: str, expected: list[str]) -> None:
    assert pieces(text, splits) == expected


LETTERS = st.characters(max_codepoint=0x52F, exclude_categories=["Cn"])  # that both engines know: old ones
TEXTS = st.text(st.sampled_from(" \t\n\r\u3000aZé\u0301中文，。ひ0٣½\\<>/_-'.(){}=#🙂\u200b\x00") | LETTERS)


@settings(max_examples=300)
@given(TEXTS)
@example("</b <1 \\1 </ \n ")
def test_nothing_is_left_out_and_regex_cuts_in_the_same_places(text: str) -> None:
    """The other engine is the oracle of what the pattern means."""
    found = pieces(text)
    assert "".join(found) == text
    assert found == regex.findall(pattern(Splits()), text)
    assert max(map(len, found), default=0) <= 36
