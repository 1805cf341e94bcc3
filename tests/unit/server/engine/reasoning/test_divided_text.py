"""Reasoning and answer are told apart alike, however the text is divided into tokens, and no part of a mark is sent."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from stellarbyte_server.engine.reasoning.divided_text import DividedText
from stellarbyte_server.engine.reasoning.tracker import ReasoningTracker
from stellarbyte_server.engine.text import TextStream
from stellarbyte_server.protocol.request import Reasoning
from stellarbyte_server.tokens.token_bytes import TokenBytes
from tests.support.servers.fake_engine import byte_alphabet

ANSWERS = [  # written, opened by the prompt, reasoning, answer
    ("\n<think>\nab</thi\n\n</think>\n\nx\n", False, "ab</thi", "x\n"),
    ("\n\nwhy?\n</think>\n\nso</think>", True, "why?", "so</think>"),
    ("<think>\nagain\n</think>ok", True, "again", "ok"),
    ("<<think>a</think>b", False, "", "<<think>a</think>b"),
    (" <thin", False, "", " <thin"),
    ("a\n<</think>é", True, "a\n<", "é"),
    ("é漢\n\n<th</", True, "é漢\n\n<th</", ""),
    ("</think>\n", True, "", ""),
]


def divide(pieces: list[bytes], is_open: bool, stop: tuple[str, ...] = ()) -> tuple[list[str], list[str], int]:
    """The deltas of the reasoning and of the answer, and the number of the reasoning's tokens."""
    alphabet = byte_alphabet()
    vocabulary: dict[str, int] = {}
    ids = [vocabulary.setdefault("".join(alphabet[value] for value in piece), len(vocabulary)) for piece in pieces]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    known = Reasoning(start="<think>", end="</think>", start_token_ids=(), end_token_ids=(), is_open=is_open)
    text = DividedText(TextStream(tokenizer, stop), ReasoningTracker(known, TokenBytes(tokenizer)))
    reasoning, answer, num_tokens = [], [], 0
    for token_id in [*ids, None]:
        ready, stopped = (text.flush(), False) if token_id is None else text.push(token_id)
        more, count, _ = text.take()
        reasoning.append(more)
        answer.append(ready)
        num_tokens += count
        if stopped:
            break
    return reasoning, answer, num_tokens


def check(written: bytes, cuts: tuple[int, ...], is_open: bool, reasoning: str, answer: str) -> None:
    places = [0, *cuts, len(written)]
    pieces = [written[start:end] for start, end in pairwise(places)]
    thought, said, num_tokens = divide(pieces, is_open)
    assert ("".join(thought), "".join(said)) == (reasoning, answer)
    assert num_tokens <= len(pieces)
    for i, text in enumerate(thought):
        assert reasoning.startswith("".join(thought[: i + 1])) and "\ufffd" not in text


@pytest.mark.parametrize(("written", "is_open", "reasoning", "answer"), ANSWERS)
def test_all_divisions_into_up_to_three_tokens_and_the_one_into_bytes_say_the_same(
    written: str, is_open: bool, reasoning: str, answer: str
) -> None:
    data = written.encode()
    for number in range(3):
        for cuts in combinations(range(1, len(data)), number):
            check(data, cuts, is_open, reasoning, answer)
    check(data, tuple(range(1, len(data))), is_open, reasoning, answer)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ANSWERS), st.data())
def test_any_division_says_the_same(case: tuple[str, bool, str, str], data: st.DataObject) -> None:
    written, is_open, reasoning, answer = case
    cuts = data.draw(st.sets(st.integers(1, len(written.encode()) - 1)))
    check(written.encode(), tuple(sorted(cuts)), is_open, reasoning, answer)


def test_tokens_of_marks_are_not_counted_and_those_of_what_only_looked_like_one_are() -> None:
    assert divide([b"<th", b"ink>", b"a", b"</", b"x", b"</th", b"ink>", b"b"], False)[2] == 3
    assert divide([b"a", b"</"], True)[2] == 2, "at the end nothing becomes a mark any more"


def test_stop_strings_are_looked_for_in_the_answer_only() -> None:
    thought, said, _ = divide([b"a STOP b", b"</think>", b"c ST", b"OP d", b"e"], True, ("STOP",))
    assert ("".join(thought), "".join(said)) == ("a STOP b", "c ")
