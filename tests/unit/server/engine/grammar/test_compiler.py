"""Grammars compiled on their thread and followed as masks, with one token for each byte."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from tokenizers import AddedToken

from stellarbyte_server.engine.grammar import compiler as grammar_module
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.protocol.grammar import GrammarRefused, check_grammar
from tests.support.servers.fake_engine import make_tokenizer
from tests.support.tools.readable import readable

END, IM_START, IM_END = 256, 257, 258
VOCAB_SIZE = 300  # more logits than tokens, and no multiple of 32
# Expressions that must all hold: each is harmless, together they take seconds.
HOSTILE = "start: TEXT\nTEXT: " + " & ".join(
    f"/(.*{chr(97 + i)}.{{1,30}}|\\p{{L}}{{3,9}}{chr(98 + i)})*/" for i in range(5)
)


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(make_tokenizer(), frozenset({END, IM_END}), VOCAB_SIZE)
    yield compiler
    compiler.close()


def collect(
    compiler: GrammarCompiler, count: int = 1, within_s: float = 20
) -> dict[str, TokenGrammar | GrammarRefused]:
    done: dict[str, TokenGrammar | GrammarRefused] = {}
    deadline_s = time.monotonic() + within_s
    while len(done) < count:
        assert readable([compiler.wake_up.fd], max(0, deadline_s - time.monotonic())), done
        done.update(compiler.collect())
    return done


def compiled(compiler: GrammarCompiler, grammar: str) -> TokenGrammar:
    compiler.submit("a", grammar)
    result = collect(compiler)["a"]
    assert isinstance(result, TokenGrammar), result
    return result


def allowed(grammar: TokenGrammar, vocab_size: int = VOCAB_SIZE) -> set[int]:
    words = np.full((vocab_size + 31) // 32, 0xFFFFFFFF, np.uint32)
    grammar.mask(words)
    assert grammar.error is None
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def feed(grammar: TokenGrammar, text: str) -> None:
    for token_id in text.encode():
        grammar.accept(token_id)


@contextmanager
def ticking() -> Iterator[list[float]]:
    """Measures how long this process's other threads had to wait, in seconds."""
    gaps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        last_s = time.perf_counter()
        while not stop.wait(0.005):
            now_s = time.perf_counter()
            gaps.append(now_s - last_s)
            last_s = now_s

    thread = threading.Thread(target=tick)
    thread.start()
    yield gaps
    stop.set()
    thread.join()


def test_a_mask_allows_exactly_what_some_complete_text_goes_on_with(compiler: GrammarCompiler) -> None:
    texts = ['{"a": 1}', '{"a": 12}', '{"b": [true]}', "[]", "[1, 2]", "é"]
    grammar = "start: " + " | ".join(f"/{re.escape(text)}/" for text in texts)
    for text in texts:
        state = compiled(compiler, grammar)
        read = b""
        for token_id in [*text.encode(), None]:
            follow = {
                other.encode()[len(read)]
                for other in texts
                if other.encode().startswith(read + b"") and len(other.encode()) > len(read)
            }
            ends = {END, IM_END} if read.decode(errors="replace") in texts else set()
            assert allowed(state) == follow | ends, read
            if token_id is not None:
                assert not state.is_complete
                state.accept(token_id)
                read += bytes([token_id])
        assert state.is_complete and state.error is None


def test_special_tokens_are_never_text(compiler: GrammarCompiler) -> None:
    state = compiled(compiler, "start: /(?s:.*)/")
    assert allowed(state) & {END, IM_START, IM_END} == {END, IM_END}
    feed(state, "<|im_start|>")
    assert IM_START not in allowed(state) and max(allowed(state)) == IM_END


def test_the_end_of_sequence_is_accepted_only_where_the_text_may_end(compiler: GrammarCompiler) -> None:
    state = compiled(compiler, "start: /a{2,3}/")
    feed(state, "a")
    assert allowed(state) == {ord("a")}
    feed(state, "a")
    assert allowed(state) == {ord("a"), END, IM_END} and not state.is_complete
    state.accept(IM_END)
    assert state.error is None
    wrong = compiled(compiler, "start: /a{2,3}/")
    wrong.accept(END)
    assert wrong.error is not None and "\n" not in wrong.error


def test_a_model_with_fewer_logits_than_tokens_or_no_end_gets_a_mask_of_its_own_size() -> None:
    compiler = GrammarCompiler(make_tokenizer(), frozenset(), 100)
    state = compiled(compiler, "start: /[a-z]*/")
    assert allowed(state, 100) == {*range(ord("a"), 100)}
    end = compiled(compiler, 'start: "b"')
    feed(end, "b")
    assert allowed(end, 100) == set() and end.is_complete


def test_requests_with_one_grammar_do_not_disturb_each_other(compiler: GrammarCompiler) -> None:
    """Copies of one compiled grammar share its lexer, whose limit on states then ends all their answers."""
    grammar = "start: /.*a.{14}/"
    for key in ("busy", "calm"):
        compiler.submit(key, grammar)
    states = collect(compiler, 2)
    busy, calm = states["busy"], states["calm"]
    assert isinstance(busy, TokenGrammar) and isinstance(calm, TokenGrammar)
    before = allowed(calm)
    words, rng = np.zeros((VOCAB_SIZE + 31) // 32, np.uint32), np.random.default_rng(0)
    for token_id in rng.choice([*b"ab"], 100_000).tolist():
        busy.mask(words)
        if busy.error is not None:
            break
        busy.accept(token_id)
    assert busy.error is not None and "too complex" in busy.error
    assert allowed(calm) == before
    feed(calm, "a")
    assert calm.error is None


def test_a_refusal_says_what_is_wrong_in_one_sentence(compiler: GrammarCompiler) -> None:
    refused = {
        'start: %json {"not": {}}': "The schema's keyword 'not' is not supported.",
        'start: %json {"format": "colour"}': "The schema's format 'colour' is not supported.",
        'start: %json {"pattern": "(?=a)"}': "look-around",
        'start: %json {"pattern": "(a$|b)c"}': "lookarounds",
        'start: %json {"type": "string", "minLength": 2, "maxLength": 1}': "No value can satisfy the schema",
        'start: %json {"$ref": "#/$defs/a"}': "'#/$defs/a' does not exist",
        "start: nowhere": "unknown name",
        "start: (((": "The grammar cannot be used",
        "start: " + "a? " * 60_000 + '\na: "a"': "The grammar is too complex.",
    }
    for grammar, why in refused.items():
        with pytest.raises(GrammarRefused) as caught:
            check_grammar(grammar)
        sentence = str(caught.value)
        assert why in sentence and "\n" not in sentence and sentence.endswith("."), sentence
        compiler.submit("a", grammar)
        assert str(collect(compiler)["a"]) == sentence
    check_grammar('start: %json {"type": "object"}')


def test_a_grammar_that_no_text_satisfies_is_refused(compiler: GrammarCompiler) -> None:
    compiler.submit("a", 'start: %json {"$ref": "#"}')
    assert str(collect(compiler)["a"]) == "No text can satisfy the grammar."


def test_what_is_cancelled_is_not_answered(compiler: GrammarCompiler) -> None:
    compiler.submit("a", 'start: "a"')
    assert readable([compiler.wake_up.fd], 10)
    compiler.cancel("a")
    compiler.submit("a", 'start: "b"')
    compiler.submit("z", 'start: "z"')
    done = collect(compiler, 2)
    state = done["a"]
    assert isinstance(state, TokenGrammar) and allowed(state) == {ord("b")}
    assert compiler.collect() == [] and not readable([compiler.wake_up.fd], 0)


def test_a_hostile_grammar_is_refused_in_time_and_holds_up_nobody_for_longer() -> None:
    compiler = GrammarCompiler(make_tokenizer(), frozenset({END}), VOCAB_SIZE, compile_limit_s=0.5)
    compiler.prepare()
    with ticking() as gaps:
        started_s = time.perf_counter()
        compiler.submit("hostile", HOSTILE)
        compiler.submit("good", 'start: "a"')
        done = collect(compiler, 2)
        taken_s = time.perf_counter() - started_s
    assert str(done["hostile"]) == "The grammar is too complex."
    assert isinstance(done["good"], TokenGrammar)
    assert taken_s < 3 and max(gaps) < 0.5
    compiler.close()


def test_grammars_that_cannot_be_stopped_do_not_pile_up() -> None:
    compiler = GrammarCompiler(make_tokenizer(), frozenset({END}), VOCAB_SIZE, compile_limit_s=0.05)
    before = threading.active_count()
    for number in range(6):
        compiler.submit(str(number), HOSTILE)
    answers = [str(answer) for answer in collect(compiler, 6).values()]
    assert answers[-1] == "The server is busy with other grammars; try again later."
    assert threading.active_count() <= before + 3
    compiler.close()


def test_grammars_of_one_owner_that_cannot_be_stopped_refuse_only_its_own() -> None:
    compiler = GrammarCompiler(make_tokenizer(), frozenset({END}), VOCAB_SIZE, compile_limit_s=0.05)
    for number in range(4):
        compiler.submit(str(number), HOSTILE, owner="greedy")
    compiler.submit("good", 'start: "a"', owner="other")
    done = collect(compiler, 5)
    assert isinstance(done["good"], TokenGrammar)
    assert str(done["3"]) == "The server is busy with other grammars; try again later."
    compiler.close()


def test_owners_take_turns(compiler: GrammarCompiler) -> None:
    for number in range(20):
        compiler.submit(f"many {number}", 'start: "a"', owner="many")
    compiler.submit("few", 'start: "a"', owner="few")
    order = list(collect(compiler, 21))
    assert order.index("few") < 5


def test_added_tokens_that_are_no_special_ones_are_text() -> None:
    """Qwen's <tool_call> is such a token: banned, the model would have to spell out what it has a token for."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("two words", special=False)])
    size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer, frozenset({256}), size)
    grammar = compiled(compiler, 'start: /(?s:.*)/ "!"')
    call, words = tokenizer.token_to_id("<tool_call>"), tokenizer.token_to_id("two words")
    assert {call, words} <= allowed(grammar, size) and 257 not in allowed(grammar, size)
    grammar = compiled(compiler, 'start: "a<tool_call>two words"')
    for token_id in (ord("a"), call, words):
        assert token_id in allowed(grammar, size)
        grammar.accept(token_id)
    assert grammar.is_complete
    compiler.close()


def test_grammars_that_can_wait_let_others_go_first(monkeypatch: pytest.MonkeyPatch, compiler: GrammarCompiler) -> None:
    may_go_on, compile_now = threading.Event(), grammar_module._compile
    monkeypatch.setattr(grammar_module, "_compile", lambda *of: (may_go_on.wait(5), compile_now(*of))[1])
    for i in range(5):
        compiler.submit(f"waits {i}", f'start: "{i}"', can_wait=True)
    compiler.submit("next", 'start: "a"')
    may_go_on.set()
    assert list(collect(compiler, 6)).index("next") <= 1  # one may have been begun


@pytest.mark.parametrize("ends", [set(), {END}, {IM_END}, {END, IM_END, 270, 4000}])
@pytest.mark.parametrize("vocab_size", [300, 259, 258, 256, 200])
def test_a_mask_shows_only_tokens_that_there_are_and_the_model_has_logits_for(vocab_size: int, ends: set[int]) -> None:
    """The tokenizer has 259: more logits are padding, fewer leave some of its tokens, ends among them, without one."""
    compiler = GrammarCompiler(make_tokenizer(), frozenset(ends), vocab_size)
    grammar = compiled(compiler, "start: /[0-9]{1,3}/")
    digits = set(range(ord("0"), ord("9") + 1))
    assert allowed(grammar, vocab_size) == digits
    feed(grammar, "1")
    assert allowed(grammar, vocab_size) == digits | {end for end in ends if end < min(vocab_size, 259)}
    feed(grammar, "23")
    assert grammar.is_complete
    compiler.close()
