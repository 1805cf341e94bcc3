"""Reuse of what was computed before: found where it may be, exact against the float64 oracle, never across salts."""

import random

import pytest

from stellarbyte_server.engine.state.sequence import Sequence
from tests.support.cases import each_pair_once, each_value_once, some
from tests.support.engines.engine import (
    BACKENDS,
    Backend,
    ModelEngine,
    generated,
    is_complete,
    make_request,
    make_scheduler,
)
from tests.support.engines.symbolic_cache import SymbolicRunner, continuation
from tests.support.models import oracle
from tests.support.models.byte_transformer import make_model, random_tokens

W = 12


def run(scheduler, runner, *requests) -> list[Sequence]:
    sequences = [scheduler.add(request) for request in requests]
    while scheduler.has_work:
        chunks = scheduler.schedule()
        for sequence, _ in scheduler.apply(chunks, runner.run(chunks)):
            if is_complete(sequence):
                scheduler.remove(sequence)
    return sequences


@pytest.mark.parametrize(
    ("use_xpos", "sinks", "block_size", "chunk"), each_pair_once([True, False], [0, 4], [1, 4, 16], [1, 7, 64])
)
def test_reused_keys_match_the_oracle(use_xpos: bool, sinks: int, block_size: int, chunk: int) -> None:
    """A chat comes back longer, then forks within its first prompt; every answer starts after what was kept."""
    model = make_model(sliding_window=W, sink_tokens=sinks, use_xpos=use_xpos)
    chat = random_tokens(6 * W)
    fork = chat[:30] + random_tokens(20, seed=1)
    engine = ModelEngine(model, max_num_batched_tokens=chunk, block_size=block_size, num_blocks=400 // block_size)
    totals = engine.scheduler.totals
    for tokens, first, least_hit in ((chat[:50], 40, 0), (chat, 55, 49 - block_size), (fork, 45, 29 - block_size)):
        hits = totals.prefix_hits
        expected = oracle.logprobs(model.state_dict(), model.config, tokens)
        assert (engine.teacher_forced(tokens, first) - expected[first - 1 :]).abs().max() <= 1e-4
        assert totals.prefix_hits - hits >= least_hit
    assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize(("window", "temperature"), each_value_once([None, W], [0.0, 1.0]))
def test_a_warm_cache_gives_the_tokens_of_a_cold_one(window: int | None, temperature: float) -> None:
    model = make_model(sliding_window=window, sink_tokens=4 if window else 0)
    shared = random_tokens(40)
    requests = [
        make_request(shared + random_tokens(i, seed=i), 20, str(i), seed=i, temperature=temperature) for i in range(6)
    ]
    cold = [ModelEngine(model).generate([request])[0] for request in requests]
    engine = ModelEngine(model, num_blocks=200)
    for _ in range(2):
        assert [engine.generate([request])[0] for request in requests] == cold
    assert engine.scheduler.totals.prefix_hits > 10 * len(shared)
    assert ModelEngine(model, num_blocks=200, prefix_caching=False).generate(requests) == cold


@pytest.mark.parametrize(("window", "backend"), each_value_once([None, W], BACKENDS))
def test_a_seeded_request_gets_its_tokens_alone_in_a_batch_after_preemption_and_from_the_cache(
    window: int | None, backend: Backend
) -> None:
    model = make_model(sliding_window=window, sink_tokens=4 if window else 0)
    mine = make_request(random_tokens(21), 30, "mine", seed=7, temperature=0.9, top_p=0.95)
    alone = ModelEngine(model, backend=backend).generate([mine])[0]
    others = [make_request(random_tokens(9 + i, seed=i), 25, str(i), seed=i, temperature=1.0) for i in range(31)]
    big = ModelEngine(model, backend=backend, num_blocks=1000, max_num_seqs=32)
    assert big.generate([*others, mine])[-1] == alone
    assert big.generate([mine])[0] == alone, "warm"
    tight = ModelEngine(model, backend=backend, num_blocks=16, max_num_seqs=32)
    assert tight.generate([*others[:3], mine, *others[3:]])[3] == alone
    assert tight.scheduler.totals.num_preemptions > 0


@pytest.mark.parametrize("backend", some(BACKENDS, 1))
def test_sixty_four_requests_with_cancellations_and_preemptions_get_their_single_run_tokens(backend: Backend) -> None:
    chance = random.Random(0)
    model = make_model(sliding_window=24, sink_tokens=4)
    heads = [random_tokens(30, seed=seed) for seed in range(3)]
    requests = [
        make_request(
            chance.choice(heads)[: chance.randint(1, 30)] + random_tokens(chance.randint(1, 40), seed=100 + i),
            max_tokens=chance.randint(1, 40),
            request_id=str(i),
            seed=i,
            temperature=chance.choice([0.0, 1.0]),
            priority=chance.randint(-1, 1),
        )
        for i in range(64)
    ]
    cancelled = {i: chance.randint(0, 30) for i in range(0, 64, 4)}
    engine = ModelEngine(model, backend=backend, num_blocks=60, max_num_seqs=24, max_num_batched_tokens=48)
    scheduler = engine.scheduler
    sequences = [scheduler.add(request) for request in requests]
    for step in range(2000):
        for i, when in cancelled.items():
            if when == step and not is_complete(sequences[i]):
                scheduler.remove(sequences[i])
        if not scheduler.has_work:
            break
        engine.step()
    assert scheduler.totals.num_preemptions > 0 and scheduler.totals.prefix_hits > 0
    assert scheduler.pool.num_used == 0
    for request, sequence in zip(requests, sequences, strict=True):
        alone = ModelEngine(model, backend=backend).generate([request])[0]
        tokens = generated(sequence)
        assert tokens == alone[: len(tokens)]
        assert len(tokens) == len(alone) or int(request.request_id) in cancelled


def test_a_returning_chat_whose_middle_is_gone_skips_its_prefill() -> None:
    """The pool is far smaller than the chat, so its middle cannot be anywhere: sinks and last window are enough."""
    scheduler = make_scheduler(num_blocks=16, block_size=4, window=W, sink_tokens=4, max_num_batched_tokens=8)
    runner = SymbolicRunner(scheduler.layout)
    (chat,) = run(scheduler, runner, make_request([0] * 60, max_tokens=140))
    computed = runner.num_computed
    back = make_request([*chat.tokens, 1, 2, 1], max_tokens=5, request_id="back")
    (returned,) = run(scheduler, runner, back)
    assert returned.num_cached == 196  # the last whole block: 199 were computed, the 200th token was only sampled
    assert runner.num_computed - computed == 203 - 196 + 4  # four of five answers are read to get the next
    assert generated(returned) == continuation(back)


def test_what_the_chat_let_go_is_recomputed_when_its_window_is_gone() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4, window=W, sink_tokens=4, max_num_batched_tokens=8)
    runner = SymbolicRunner(scheduler.layout)
    (chat,) = run(scheduler, runner, make_request([0] * 20, max_tokens=40))
    run(scheduler, runner, make_request([1] * 30, max_tokens=1, request_id="other"))
    (returned,) = run(scheduler, runner, back := make_request([*chat.tokens, 1], max_tokens=5, request_id="back"))
    assert returned.num_cached < 20
    assert generated(returned) == continuation(back)


def test_nothing_is_shared_across_salts() -> None:
    scheduler = make_scheduler()
    runner = SymbolicRunner(scheduler.layout)
    for salt, expected in (("", 0), ("a", 0), ("b", 0), ("a", 36), ("", 36)):
        (sequence,) = run(scheduler, runner, make_request([1] * 40, max_tokens=3, cache_salt=salt))
        assert sequence.num_cached == expected


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make_scheduler(block_size=4)
    runner = SymbolicRunner(scheduler.layout)
    for expected in (0, 4):
        (sequence,) = run(scheduler, runner, make_request([1] * 8, max_tokens=1))
        assert sequence.num_cached == expected


def test_requests_that_run_together_share_their_full_blocks() -> None:
    scheduler = make_scheduler(num_blocks=14, block_size=4)
    runner = SymbolicRunner(scheduler.layout)
    prompt = [1] * 41
    first = scheduler.add(make_request(prompt, max_tokens=6, request_id="first"))
    chunks = scheduler.schedule()
    scheduler.apply(chunks, runner.run(chunks))
    second = scheduler.add(make_request(prompt, max_tokens=6, request_id="second"))
    chunks = scheduler.schedule()
    assert [chunk.sequence for chunk in chunks] == [first, second], "two do not fit without sharing"
    assert second.num_cached == 40 and scheduler.pool.num_used == 12
    scheduler.apply(chunks, runner.run(chunks))
    run(scheduler, runner)
    assert scheduler.totals.num_preemptions == 0


def test_an_endless_stream_uses_the_same_few_blocks_over_and_over() -> None:
    """Otherwise its memory would grow to all of the cache, block by block, for content nobody asks for again."""
    scheduler = make_scheduler(num_blocks=1000, block_size=4, window=W, sink_tokens=4)
    stream = scheduler.add(make_request([0] * 20, max_tokens=3000))
    used: set[int] = set()
    while not is_complete(stream):
        chunks = scheduler.schedule()
        used |= {block for block, _ in stream.table.entries()}
        scheduler.apply(chunks, [[1] * chunk.samples for chunk in chunks])
    assert len(used) < 12
