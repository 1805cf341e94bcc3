"""What is known of forced tokens and masks is what llguidance says at each place, wherever a grammar was led before."""

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.grammar import vocabulary
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.mask_workers import QUICK_MASK_S, QUICK_MASKS_S, MaskWorkers
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.protocol.grammar import LIMITS

SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 9},
        "year_of_birth": {"type": "integer", "minimum": 1900, "maximum": 2020},
        "is_still_alive": {"type": "boolean"},
        "field_of_work": {"enum": ["mathematics", "music", 'müßig "x"']},
    },
    "required": ["first_name", "year_of_birth", "is_still_alive", "field_of_work"],
    "additionalProperties": False,
}
GRAMMARS = (
    json_grammar(SCHEMA),
    json_grammar({"type": "array", "minItems": 2, "maxItems": 3, "items": SCHEMA}),
    'start: "first_name first_name" (" is still" | " is stilled") /[0-9]{1,3}/ "field_of_work"',
    "start: /[a-f]{2}year_of_birth[0-9]?/",
    "start: /(ax|by|c[0-9]|dzz){20}/",
    'start: "' + "a first_name is still " * 20 + '" /[0-9]/',  # more than is tokenized at once
)
VOCAB_SIZE = 371  # fewer logits than the tokenizer has tokens, and no multiple of 32


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    """With byte-pair tokens of several bytes: those of forced bytes can be divided in many ways."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = json.dumps({"first_name": "Ada", "year_of_birth": 1815, "is_still_alive": False, "field_of_work": "music"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text, text.replace(" ", ""), "first_name is still"], trainer)
    compiler = GrammarCompiler(tokenizer, frozenset({0}), VOCAB_SIZE)
    yield compiler
    compiler.close()


def compiled(compiler: GrammarCompiler, grammar: str) -> TokenGrammar:
    compiler.submit("a", grammar)
    while not (done := compiler.collect()):
        pass
    assert isinstance(done[0][1], TokenGrammar), done
    return done[0][1]


def allowed(words: "np.ndarray | bytes") -> list[int]:
    bits_V = np.unpackbits(np.frombuffer(words, np.uint8), bitorder="little")
    return [token for token in np.flatnonzero(bits_V).tolist() if token < VOCAB_SIZE]


def mask_of(grammar: TokenGrammar) -> list[int]:
    words_W = np.zeros(grammar.num_words, np.uint32)
    grammar.mask(words_W)
    return allowed(words_W)


class Oracle:
    """A matcher that knows nothing but the accepted tokens."""

    def __init__(self, compiler: GrammarCompiler, grammar: str) -> None:
        self._first = LLMatcher(compiler._vocabulary.tokenizer(), grammar, log_level=0, limits=LIMITS)

    def after(self, tokens: list[int]) -> LLMatcher:
        matcher = self._first.deep_copy()
        for token in tokens:
            assert matcher.consume_token(token)
        return matcher

    def forced(self, tokens: list[int]) -> tuple[int, ...]:
        """Tokens that are alone in their masks, one after another."""
        matcher, forced = self.after(tokens), []
        while not matcher.is_stopped() and len(only := allowed(matcher.compute_bitmask())) == 1:
            matcher.consume_token(only[0])
            forced.append(only[0])
        return tuple(forced)


@pytest.mark.parametrize("share", [0.01, 0.5])
@pytest.mark.parametrize("number", range(len(GRAMMARS)))
def test_masks_and_forced_tokens_are_those_of_a_new_matcher(
    compiler: GrammarCompiler, number: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along answers that are taken back and go on otherwise, also after a token that the grammar does not allow."""
    monkeypatch.setattr(vocabulary, "SURE_SHARE", share)
    oracle, chance = Oracle(compiler, GRAMMARS[number]), random.Random(number)
    num_forced = 0
    for _ in range(4):
        grammar = compiled(compiler, GRAMMARS[number])
        tokens: list[int] = []
        for _ in range(60):
            matcher = oracle.after(tokens)
            assert grammar.is_complete == matcher.is_stopped()
            act = chance.random()
            if act < 0.15 and tokens:
                count = chance.randint(1, len(tokens))
                if chance.random() < 0.3:
                    wrong = next(token for token in range(VOCAB_SIZE) if not matcher.validate_tokens([token]))
                    grammar.accept(wrong)
                    assert grammar.error is not None
                    count += 1
                    tokens.append(wrong)
                grammar.rewind(count)
                del tokens[len(tokens) - count :]
                continue
            if matcher.is_stopped():
                continue
            expected = allowed(matcher.compute_bitmask())
            if act < 0.5:
                found, forced = grammar.forced(), oracle.forced(tokens)
                assert found == forced[: len(found)]
                assert len(found) == len(forced) or share < 0.5 or len(forced) > 30
                num_forced += len(found)
            elif act < 0.7:
                assert mask_of(grammar) == expected
            elif act < 0.8:
                grammar.begin_mask()
            else:
                tokens.append(chance.choice(expected))
                grammar.accept(tokens[-1])
        assert grammar.error is None
    assert num_forced > 5


def test_forced_tokens_are_kept_if_the_mask_after_them_fails(compiler: GrammarCompiler) -> None:
    """The answer gets them, and ends with the error when that mask is needed."""

    class Failing:
        """A matcher that fails at the mask after "ab"."""

        def __init__(self, matcher: LLMatcher) -> None:
            self._matcher = matcher

        def __getattr__(self, name: str) -> object:
            return getattr(self._matcher, name)

        def deep_copy(self) -> "Failing":
            return Failing(self._matcher.deep_copy())

        def unsafe_compute_mask_ptr(self, address: int, num_bytes: int) -> None:
            self._matcher.unsafe_compute_mask_ptr(address, num_bytes)
            if not self._matcher.compute_ff_tokens():
                self._matcher.consume_token(VOCAB_SIZE - 1)

    grammar = compiled(compiler, 'start: "year_of_birth" /[0-9]/')
    expected = grammar.forced()
    grammar._matcher, grammar._first = Failing(grammar._matcher), Failing(grammar._first)  # type: ignore[assignment]
    grammar._choices = []
    assert grammar.forced() == expected and len(expected) > 1
    assert grammar.error is None
    for token in expected:
        assert mask_of(grammar) == [token]
        grammar.accept(token)
    assert grammar.error is None
    assert mask_of(grammar) == [] and grammar.error is not None


def test_longer_steps_have_time_for_longer_masks() -> None:
    workers = MaskWorkers(lambda: None)
    assert not workers.may_leave(2 * QUICK_MASK_S)
    for step_s in (0.0, 0.001, 0.5, 0.0):
        workers.begin_step(step_s)
        most_s, all_s = max(QUICK_MASK_S, 0.02 * step_s), max(QUICK_MASKS_S, 0.05 * step_s)
        assert not workers.may_leave(1.01 * most_s)
        left = [part for part in [0.9 * most_s] * 100 if workers.may_leave(part)]
        assert all_s - most_s < sum(left) <= all_s
    workers.close()
