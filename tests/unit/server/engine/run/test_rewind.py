"""After a rewind, generation goes on as if the tokens that were taken back had never been there."""

import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellarbyte.sampling.sampler import RowSampling
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.engine.state.block_pool import CacheLayout
from stellarbyte_server.engine.state.sequence import Sequence
from tests.support.cases import each_value_once
from tests.support.engines.engine import (
    BACKENDS,
    Backend,
    ModelEngine,
    generated,
    make_request,
    make_scheduler,
    sampling_by,
)
from tests.support.engines.symbolic_cache import NUM_TOKENS, SymbolicRunner, continuation
from tests.support.models.byte_transformer import make_model, random_tokens
from tests.support.servers.fake_engine import make_tokenizer

VOCABULARY = 259
GRAMMARS = GrammarCompiler(make_tokenizer(), frozenset(), VOCABULARY)
LENGTH = 24
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "seed": 7},
    "penalties": {
        "temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": -1.5, "seed": 3,
    },
    "bans": {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": tuple(range(150)), "logit_bias": ((200, 3.0),)},
    "grammar": {"temperature": 1.0, "grammar": "start: /([a-f][0-9]){40}/"},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"full": {}, "window": {"sliding_window": 8, "sink_tokens": 2}}
REWINDS = {3: 1, 6: 6, 11: 4, 12: 1, 15: 7}  # tokens of the answer → of others that come then, and are taken back


def compiled(text: str) -> TokenGrammar:
    GRAMMARS.submit("grammar", text)
    while not (done := GRAMMARS.collect()):
        pass
    ((_, grammar),) = done
    assert isinstance(grammar, TokenGrammar)
    return grammar


class Stream:
    """One sequence, and its grammar as `Answer` leads it."""

    def __init__(self, engine: ModelEngine, prompt: list[int], kind: dict[str, Any], name: str = "r") -> None:
        self.engine = engine
        self.sequence = engine.add(make_request(prompt, LENGTH, name, **kind))
        self.sequence.end_token_ids = frozenset(kind.get("stop_token_ids", ()))
        self.grammar = compiled(kind["grammar"]) if "grammar" in kind else None
        self.sequence.grammar = self.grammar

    def step(self) -> None:
        before = self.sequence.num_generated
        self.engine.step()
        if self.grammar is not None and not self.sequence.is_over:
            for token in generated(self.sequence)[before:]:
                self.grammar.accept(token)
                self.grammar.begin_mask()
            while not self.grammar.is_ready:
                time.sleep(0.001)

    def astray(self, count: int) -> None:
        """Go on by other tokens than those it would get, and take them back."""
        chance = random.Random(count)

        def sample(logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
            allowed = [row_V.isfinite().nonzero()[:, 0].tolist() for row_V in logits_RV]
            return [chance.choice(ids) for ids in allowed][: len(rows)]

        wanted = self.sequence.num_generated + count
        with sampling_by(self.engine.executor, sample):
            while self.sequence.num_generated < wanted:
                self.step()
        self.engine.scheduler.rewind(self.sequence, count)

    def run(self, rewinds: dict[int, int]) -> list[int]:
        left = dict(rewinds)
        while not self.sequence.is_over:
            count = left.pop(self.sequence.num_generated, 0)
            if count:
                self.astray(count)
            self.step()
        return generated(self.sequence)


@pytest.mark.parametrize(("name", "shape", "backend"), each_value_once(list(KINDS), list(SHAPES), BACKENDS))
def test_it_goes_on_as_if_they_had_never_been_there(name: str, shape: str, backend: Backend) -> None:
    kind = KINDS[name]
    model, prompt = make_model(vocab_size=VOCABULARY, **SHAPES[shape]), random_tokens(9)
    expected = Stream(ModelEngine(model, backend=backend), prompt, kind).run({})
    engine = ModelEngine(model, backend=backend)
    assert Stream(engine, prompt, kind).run(REWINDS) == expected
    assert engine.scheduler.pool.num_used == 0
    # What the cache keeps, of either, is true.
    longer = [*prompt, *expected[:17]]
    engine_tokens = Stream(engine, longer, {}, "again").run({})
    assert engine_tokens == Stream(ModelEngine(model, backend=backend), longer, {}).run({})
    assert engine.scheduler.totals.prefix_hits > 0 or shape


def test_a_block_that_another_sequence_shares_is_not_written_to() -> None:
    model, prompt = make_model(vocab_size=VOCABULARY), random_tokens(9)
    engine = ModelEngine(model)
    stream = Stream(engine, prompt, {})
    while stream.sequence.num_generated < 16:
        stream.step()
    begun = generated(stream.sequence)
    shares = Stream(engine, [*prompt, *begun[:14]], {}, "shares")  # the first 20 tokens, in 5 blocks
    stream.step()
    assert shares.sequence.num_cached == 20
    engine.scheduler.rewind(stream.sequence, stream.sequence.num_generated - 10)  # into the last of them
    assert stream.sequence.num_computed == 16, "what is before the rewind in the shared block is computed again"
    while not shares.sequence.is_over or not stream.sequence.is_over:
        stream.step()
    alone = [Stream(ModelEngine(model), [*prompt, *begun[:14]], {}), Stream(ModelEngine(model), prompt, {})]
    assert [generated(shares.sequence), generated(stream.sequence)] == [each.run({}) for each in alone]


def test_a_rewind_to_the_prompt_gives_every_block_of_the_answer_back() -> None:
    engine = ModelEngine(make_model(vocab_size=VOCABULARY))
    stream = Stream(engine, random_tokens(9), {})
    while stream.sequence.num_generated < 10:
        stream.step()
    assert engine.scheduler.pool.num_used == 5
    engine.scheduler.rewind(stream.sequence, 10)
    assert engine.scheduler.pool.num_used == 2, "positions 0..7; the prompt's last token is computed again"
    assert (stream.sequence.num_computed, stream.sequence.num_pending) == (8, 1)


@settings(max_examples=3 * settings().max_examples, deadline=None)
@given(
    data=st.data(),
    window=st.none() | st.integers(1, 20),
    sink_tokens=st.integers(0, 6),
    block_size=st.integers(1, 9),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 6),
    spare_blocks=st.integers(0, 10),
    prefix_caching=st.booleans(),
)
def test_random_traffic_that_goes_astray_and_back_gets_its_tokens(
    data, window, sink_tokens, block_size, budget, max_num_seqs, spare_blocks, prefix_caching
) -> None:
    """The symbolic cache sees a key that is not there, that is another's, or that was overwritten."""
    sinks = sink_tokens if window else 0
    layout = CacheLayout(block_size=block_size, window=window, sink_tokens=sinks)
    scheduler = make_scheduler(
        num_blocks=layout.peak_blocks(90, 1) + spare_blocks, block_size=block_size, window=window, sink_tokens=sinks,
        max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, prefix_caching=prefix_caching,
    )  # fmt: skip
    runner = SymbolicRunner(layout)
    chance = random.Random(data.draw(st.integers(0, 10**6), "chance"))
    requests = [
        make_request([0] * chance.randint(1, 40) + [chance.randrange(2)], chance.randint(1, 30), str(i))
        for i in range(data.draw(st.integers(1, 7), "requests"))
    ]
    sequences = [scheduler.add(request) for request in requests]
    astray: dict[Sequence, int] = {}  # tokens of the answer that are right
    num_left = 20  # times that some sequence goes astray
    while scheduler.has_work:
        chunks = scheduler.schedule()
        sampled = runner.run(chunks)
        for chunk, tokens in zip(chunks, sampled, strict=True):
            sequence = chunk.sequence
            limit = sequence.request.sampling.max_tokens
            may_stray = num_left and sequence.num_generated + 1 < limit and sequence not in astray
            if tokens and may_stray and chance.random() < 0.3:
                num_left -= 1
                astray[sequence] = sequence.num_generated
                tokens[0] = (tokens[0] + 1) % NUM_TOKENS
        grown = scheduler.apply(chunks, sampled)
        for sequence, _ in grown:
            is_last = sequence.num_generated == sequence.request.sampling.max_tokens
            if sequence in astray and (is_last or chance.random() < 0.3):
                scheduler.rewind(sequence, sequence.num_generated - astray.pop(sequence))
            elif is_last:
                scheduler.remove(sequence)
    assert [generated(sequence) for sequence in sequences] == [continuation(request) for request in requests]
    assert scheduler.pool.num_used == 0


def test_a_grammar_that_went_on_and_back_allows_what_it_allowed() -> None:
    grammar = compiled("start: /[a-f][0-9]{3}x/")

    def mask() -> list[int]:
        words_W = np.zeros(grammar.num_words, np.uint32)
        grammar.mask(words_W)
        return words_W.tolist()

    masks = [mask()]
    for token in b"a12":
        grammar.accept(token)
        masks.append(mask())
    grammar.accept(ord("3"))
    grammar.begin_mask()
    for count, expected in ((1, masks[3]), (1, masks[2]), (2, masks[0])):
        grammar.rewind(count)
        assert mask() == expected
    assert grammar.error is None
