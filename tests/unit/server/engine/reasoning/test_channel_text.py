"""Messages in channels become reasoning, text and calls alike, however their text is divided into tokens, and no header
is shown; marks are tokens, and their names in a text are text."""

import re
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from stellarbyte_server.engine.reasoning.channel_text import ChannelText
from stellarbyte_server.engine.reasoning.channel_tracker import ChannelTracker
from stellarbyte_server.engine.text import TextStream
from stellarbyte_server.protocol.messages import TokenLogprob
from stellarbyte_server.protocol.request import Channels
from stellarbyte_server.tokens.token_bytes import TokenBytes
from tests.support.engines.harmony_engine import MARKS, channels, harmony_tokenizer, tokens_of
from tests.support.servers.fake_engine import byte_alphabet

MARK = re.compile("({})".format("|".join(map(re.escape, MARKS))))
BEGUN = "<|start|>assistant"
NAMES = "<|channel|>final<|message|>x<|end|><|return|>"  # as the bytes of a text


class Told(NamedTuple):
    reasoning: str
    messages: list[tuple[str, str]]  # recipient, text
    num_tokens: int
    deltas: list[tuple[str, str]]  # reasoning, text


def divided(
    written: str, cuts: frozenset[int], begun: str = BEGUN, plain: str = "", stop: tuple[str, ...] = ()
) -> Told:
    """What is told of an answer. Between marks, its text is cut into tokens after these bytes; a § is the bytes of
    `plain`, which may name marks."""
    alphabet = byte_alphabet()
    vocabulary = {mark: i for i, mark in enumerate(MARKS)}

    def tokens(text: str) -> list[int]:
        ids, place = [], 0
        for part in MARK.split(text):
            if part in MARKS:
                ids.append(vocabulary[part])
                continue
            data = part.replace("§", plain).encode()
            ends = sorted({cut - place for cut in cuts if place < cut < place + len(data)} | {len(data)})
            for start, end in zip([0, *ends], ends, strict=False):
                piece = "".join(alphabet[value] for value in data[start:end])
                # A vocabulary has no second token with a mark's name.
                ids += [
                    vocabulary.setdefault(name, len(vocabulary))
                    for name in ([piece[0], piece[1:]] if piece in MARKS else [piece])
                    if name
                ]
            place += len(data)
        return ids

    opening, answer = tokens(begun), tokens(written)
    tokenizer = Tokenizer(models.BPE(vocab={text: i for text, i in vocabulary.items()}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    ids = {mark: i for i, mark in enumerate(MARKS)}
    channels = Channels(
        start_id=ids["<|start|>"],
        channel_id=ids["<|channel|>"],
        message_id=ids["<|message|>"],
        end_id=ids["<|end|>"],
        final_ids=(ids["<|return|>"], ids["<|call|>"]),
        constrain_id=ids["<|constrain|>"],
        role_token_ids=(),
        analysis_token_ids=(),
        commentary_token_ids=(),
        begun=tuple(opening),
    )
    text = ChannelText(TextStream(tokenizer, stop), ChannelTracker(channels, TokenBytes(tokenizer)))
    deltas, changes, num_tokens = [], [(0, "")], 0
    for token_id in [*answer, None]:
        ready, stopped = (text.flush(), False) if token_id is None else text.push(token_id)
        reasoning, count, recipients = text.take()
        deltas.append((reasoning, ready))
        changes += recipients
        num_tokens += count
        if stopped:
            break
    said = "".join(ready for _, ready in deltas)
    ends = [*(start for start, _ in changes[1:]), len(said)]
    messages = [(recipient, said[start:end]) for (start, recipient), end in zip(changes, ends, strict=True)]
    told = [(recipient, part) for recipient, part in messages if part or recipient]
    return Told("".join(thought for thought, _ in deltas), told, num_tokens, deltas)


ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"
ANSWERS = [  # written, begun, reasoning, messages
    (f"{ANALYSIS}why é§{NEXT}{FINAL}so §<|return|>", BEGUN, f"why é{NAMES}", [("", f"so {NAMES}")]),
    (f"{FINAL}漢字", BEGUN, "", [("", "漢字")]),
    (f"{ANALYSIS}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}c", BEGUN, "a\n\nb", [("", "c")]),
    (f"{ANALYSIS}{NEXT}{ANALYSIS}b", BEGUN, "b", []),
    (
        f"{ANALYSIS}a{NEXT}<|channel|>commentary<|message|>I look.{NEXT}"
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>',
        BEGUN,
        "a",
        [("", "I look."), ("functions.f", '{"x": 1}')],
    ),
    (' to=functions.g<|channel|>commentary json<|message|>{"é": 2}', BEGUN, "", [("functions.g", '{"é": 2}')]),
    (
        f"<|channel|>analysis to=functions.f code<|message|>{{}}{NEXT}{FINAL}b",
        BEGUN,
        "",
        [("functions.f", "{}"), ("", "b")],
    ),
    (f"<|channel|>analysis to=python code<|message|>1+1{NEXT}{FINAL}b", BEGUN, "1+1", [("", "b")]),
    (f"<|channel|>commentary<|message|>a{NEXT}{FINAL}b", BEGUN, "", [("", "a\n\nb")]),
    (f"{ANALYSIS}a<|channel|>final<|message|>b", BEGUN, "a", [("", "b")]),
    (f"{ANALYSIS}a<|start|>assistant{FINAL}b<|message|>c", BEGUN, "a", [("", "bc")]),
    ("<|message|>hello", BEGUN, "", [("", "hello")]),
    ("to be or §", BEGUN, "", [("", f"to be or {NAMES}")]),
    ("é no header", BEGUN, "", [("", "é no header")]),
    (f"{ANALYSIS}a{NEXT}s: bare", BEGUN, "a", [("", "s: bare")]),
    ("goes on", f"{BEGUN}{FINAL}it ", "", [("", "goes on")]),
    (f"on{NEXT}{FINAL}b", f"{BEGUN}{ANALYSIS}", "on", [("", "b")]),
    (f"<|start|>assistant{FINAL}b", "", "", [("", "b")]),
    ("<|return|>\n after", f"{BEGUN}{FINAL}", "", [("", "\n after")]),
    ("<|return|>assistant", f"{BEGUN}{FINAL}", "", [("", "assistant")]),
    (f" to={'é' * 150}", BEGUN, "", [("", f" to={'é' * 150}")]),  # too long for a header
    # Cut off in a header.
    (f"{ANALYSIS}a{NEXT}", BEGUN, "a", []),
    (f"{ANALYSIS}a{NEXT}<|channel|>fin", BEGUN, "a", []),
    (f"{ANALYSIS}a{NEXT} to=functions.f", BEGUN, "a", []),
    (f"{ANALYSIS}a<|end|><|start|>assis", BEGUN, "a", []),
    ("<|channel|>commentary to=functions.f <|constrain|>js", BEGUN, "", []),
]


def check(case: tuple[str, str, str, list[tuple[str, str]]], cuts: frozenset[int]) -> None:
    written, begun, reasoning, messages = case
    told = divided(written, cuts, begun, NAMES)
    assert (told.reasoning, told.messages) == (reasoning, messages)
    assert not any("\ufffd" in part for delta in told.deltas for part in delta)


@pytest.mark.parametrize("case", ANSWERS, ids=range(len(ANSWERS)))
def test_one_cut_anywhere_and_the_division_into_bytes_say_the_same(
    case: tuple[str, str, str, list[tuple[str, str]]],
) -> None:
    length = len((case[0] + case[1]).replace("§", NAMES).encode())
    for cut in range(length):
        check(case, frozenset({cut}))
    check(case, frozenset(range(length)))


texts = st.text(st.sampled_from("ab é\n漢<|>§t"), max_size=12)
answers = st.lists(
    st.tuples(
        st.sampled_from(["analysis", "final", "commentary", "in channel", "in role", "unknown"]),
        texts.filter(lambda text: MARK.search(text) is None),
    ),
    max_size=5,
)
HEADERS = {
    "analysis": ANALYSIS,
    "final": FINAL,
    "commentary": "<|channel|>commentary<|message|>",
    "in channel": "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
    "in role": " to=functions.f<|channel|>commentary<|message|>",
    "unknown": "<|channel|>other<|message|>",
}


def expected(messages: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
    """The reasoning, and the texts to the user and to tools in their order, with neighbours to the user as one."""
    thoughts = [text.replace("§", NAMES) for kind, text in messages if kind == "analysis" and text]
    shown: list[tuple[str, str]] = []
    has_spoken = False
    for kind, text in messages:
        plain = text.replace("§", NAMES)
        if kind == "analysis":
            continue
        if kind in ("in channel", "in role"):
            shown.append(("functions.f", plain))
            continue
        if not plain:
            continue
        said = "\n\n" * has_spoken + plain
        has_spoken = True
        if shown and not shown[-1][0]:
            shown[-1] = ("", shown[-1][1] + said)
        else:
            shown.append(("", said))
    return "\n\n".join(thoughts), shown


@settings(max_examples=150, deadline=None)
@given(answers, st.sets(st.integers(0, 300)))
def test_any_messages_in_any_division_are_told_apart(messages: list[tuple[str, str]], cuts: set[int]) -> None:
    written = NEXT.join(HEADERS[kind] + text for kind, text in messages)
    told = divided(written, frozenset(cuts), plain=NAMES)
    joined: list[tuple[str, str]] = []
    for recipient, text in told.messages:
        if joined and not recipient and not joined[-1][0]:
            joined[-1] = ("", joined[-1][1] + text)
        else:
            joined.append((recipient, text))
    assert (told.reasoning, joined) == expected(messages)


def scripted() -> ChannelText:
    tokenizer = harmony_tokenizer()
    return ChannelText(TextStream(tokenizer, ()), ChannelTracker(channels(), TokenBytes(tokenizer)))


def test_an_unfinished_character_at_the_end_of_a_message_stays_in_it() -> None:
    text = scripted()
    tokens = [*tokens_of(f"{ANALYSIS}a"), "é".encode()[0], *tokens_of(f"{NEXT}{FINAL}b")]
    said = "".join(text.push(token_id)[0] for token_id in tokens)
    assert (text.take().reasoning, said + text.flush()) == ("a\ufffd", "b")


def test_only_tokens_of_the_reasonings_text_are_counted() -> None:
    told = divided(f"{ANALYSIS}abc{NEXT}<|channel|>commentary<|message|>def{NEXT}{ANALYSIS}g", frozenset(range(99)))
    assert told.num_tokens == 4


def test_stop_strings_are_looked_for_in_the_answer_only() -> None:
    told = divided(f"{ANALYSIS}a STOP b{NEXT}{FINAL}c STOP d", frozenset(range(99)), stop=("STOP",))
    assert (told.reasoning, told.messages) == ("a STOP b", [("", "c ")])


@pytest.mark.parametrize(("written", "shown"), [(f"{ANALYSIS}a{NEXT}{FINAL}bc", "bc"), ("the", "the")])
def test_log_probabilities_are_those_of_the_answer(written: str, shown: str) -> None:
    text, told = scripted(), []
    for token_id in tokens_of(written):
        offset = text.num_decoded
        text.push(token_id)
        told += text.take_logprobs(TokenLogprob(token_id, -0.5), offset)
    assert [(chr(entry.token_id), offset) for entry, offset in told] == [(c, i) for i, c in enumerate(shown)]
