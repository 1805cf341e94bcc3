"""The server's cache against the float64 oracle: block-relative keys, windows, sinks, chunks, batches, preemption."""

import pytest

from tests.support.cases import each_pair_once, each_value_once, some
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine, make_request
from tests.support.models import oracle
from tests.support.models.byte_transformer import EXPERT_VARIANTS, VARIANTS, make_model, random_tokens

ALL_VARIANTS = VARIANTS | EXPERT_VARIANTS
W = 12
LENGTHS = [W - 1, W, W + 1, 2 * W, 4 * W + 3]


@pytest.mark.parametrize(
    ("use_xpos", "sinks", "chunk", "length"), each_pair_once([True, False], [0, 4], [1, 7, 64], LENGTHS)
)
def test_matches_oracle_at_every_position(use_xpos: bool, sinks: int, chunk: int, length: int) -> None:
    """Half of the sequence is a prompt taken in chunks, the other half is decoded one token a step."""
    model = make_model(sliding_window=W, sink_tokens=sinks, use_xpos=use_xpos)
    tokens = random_tokens(length)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    for first in {1, length // 2, length}:
        engine = ModelEngine(model, max_num_batched_tokens=chunk, num_blocks=40)
        assert (engine.teacher_forced(tokens, first) - expected[first - 1 :]).abs().max() <= 1e-4
        assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize(("variant", "block_size"), each_value_once(list(ALL_VARIANTS), [1, 5, 16]))
def test_every_kind_of_model_matches_oracle(variant: str, block_size: int) -> None:
    model = make_model(**ALL_VARIANTS[variant])
    tokens = random_tokens(4 * W + 3)
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    engine = ModelEngine(model, max_num_batched_tokens=10, block_size=block_size)
    assert (engine.teacher_forced(tokens, 2 * W) - expected[2 * W - 1 :]).abs().max() <= 1e-4


@pytest.mark.parametrize(("sinks", "backend"), each_value_once([5, 0], BACKENDS))
def test_positions_may_be_any_size(sinks: int, backend: Backend) -> None:
    """A stream of 3,000 tokens on a window of 12: XPos factors of absolute positions would have overflowed long
    before."""
    model = make_model(sliding_window=W, sink_tokens=sinks, xpos_scale_base=4)
    tokens = random_tokens(3000)
    engine = ModelEngine(model, backend=backend, max_num_batched_tokens=32, num_blocks=16)
    actual = engine.teacher_forced(tokens, 2900)
    expected = oracle.banded_logprobs(model.state_dict(), model.config, tokens, list(range(2899, 3000)))
    assert (actual - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", some(["llama", "qwen2", "xpos window sinks"], 2))
def test_batched_requests_get_their_single_run_tokens(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    requests = [
        make_request(
            random_tokens(3 + 5 * i, seed=i), max_tokens=20 + i, request_id=str(i), seed=i, temperature=float(i % 2)
        )
        for i in range(9)
    ]
    alone = [ModelEngine(model).generate([request])[0] for request in requests]
    assert ModelEngine(model, max_num_batched_tokens=16).generate(requests) == alone


def test_preempted_requests_get_their_single_run_tokens() -> None:
    model = make_model()
    requests = [
        make_request(random_tokens(20, seed=i), max_tokens=40, request_id=str(i), seed=i, temperature=float(i % 2))
        for i in range(6)
    ]
    alone = [ModelEngine(model).generate([request])[0] for request in requests]
    engine = ModelEngine(model, num_blocks=32, max_num_batched_tokens=24)  # 15 blocks a request: two fit to the end
    assert engine.generate(requests) == alone
    assert engine.scheduler.totals.num_preemptions > 0
    assert engine.scheduler.pool.num_used == 0


def test_a_windowed_stream_holds_a_bounded_number_of_blocks() -> None:
    model = make_model(sliding_window=W, sink_tokens=4)
    engine = ModelEngine(model, num_blocks=16, block_size=4, max_num_batched_tokens=8)
    engine.scheduler.add(make_request(random_tokens(50), max_tokens=300))
    most = 0
    while engine.scheduler.has_work:
        chunks = engine.step()
        if chunks and chunks[0].length == 1:
            most = max(most, engine.scheduler.pool.num_used)
    assert most <= -(-W // 4) + 1 + 1  # numerics: ceil(W/block) + 1 + ceil(s/block)
