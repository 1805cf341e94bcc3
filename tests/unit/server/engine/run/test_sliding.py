"""Contexts that slide: a model without a window goes on beyond its context, exactly as the formulas say."""

import re

import pytest
import torch

from stellarbyte.config import ByteModelConfig
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.start.serving_plan import (
    ServingPlan,
    StartupError,
    plan_cache,
    plan_serving,
    serving_config,
    tokens_a_step,
)
from tests.support.cases import each_pair_once
from tests.support.engines.engine import ModelEngine
from tests.support.models import oracle
from tests.support.models.byte_transformer import make_config, make_model, random_tokens

CONTEXT = 24
MIXED = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}


def settings(**flags) -> EngineSettings:
    return EngineSettings(model="none", **{"max_model_len": CONTEXT, "block_size": 4} | flags)


def served(config: ByteModelConfig, **flags) -> ByteModelConfig:
    return serving_config(config, settings(**flags))[0]


LENGTHS = [CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 4 * CONTEXT + 3]


@pytest.mark.parametrize(
    ("use_xpos", "sinks", "chunk", "length"), each_pair_once([True, False], [0, 4], [1, 7, 64], LENGTHS)
)
def test_a_model_without_a_window_slides_over_its_context(use_xpos: bool, sinks: int, chunk: int, length: int) -> None:
    """The prompt alone may be longer than the context. What is expected is spelled out as a windowed model."""
    model = make_model(use_xpos=use_xpos)
    tokens = random_tokens(length)
    window = make_config(use_xpos=use_xpos, sliding_window=CONTEXT - sinks, sink_tokens=sinks)
    expected = oracle.logprobs(model.state_dict(), window, tokens)
    options = {"max_model_len": CONTEXT, "max_num_batched_tokens": chunk, "num_blocks": 40}
    config = served(model.config, sink_tokens=sinks)
    for first in {1, length // 2, length}:
        engine = ModelEngine(model, config, **options)
        actual = engine.teacher_forced(tokens, first, context_overflow="slide")
        assert (actual - expected[first - 1 :]).abs().max() <= 1e-4
        assert engine.scheduler.pool.num_used == 0
        assert engine.scheduler.num_evicted == max(0, length + 1 - CONTEXT)


@pytest.mark.parametrize("model", [{}, MIXED, {"sliding_window": 8}, {"sliding_window": 100}], ids=str)
@pytest.mark.parametrize("flags", [{}, {"sink_tokens": 0}], ids=str)
def test_within_the_context_nothing_changes(model, flags) -> None:
    tokens = random_tokens(CONTEXT)
    transformer = make_model(**model)
    expected = oracle.logprobs(transformer.state_dict(), transformer.config, tokens)
    engine = ModelEngine(transformer, served(transformer.config, **flags), max_model_len=CONTEXT + 1)
    assert (engine.teacher_forced(tokens, 5) - expected[4:]).abs().max() <= 1e-4


def test_layers_with_a_window_of_their_own_keep_it_and_the_others_slide_over_the_context() -> None:
    model = make_model(**MIXED)
    config = served(model.config)
    assert config.windows == (CONTEXT, 8, CONTEXT)
    tokens = random_tokens(3 * CONTEXT)
    expected = oracle.logprobs(model.state_dict(), config, tokens)
    engine = ModelEngine(model, config, max_model_len=CONTEXT, max_num_batched_tokens=10)
    actual = engine.teacher_forced(tokens, CONTEXT + 5, context_overflow="slide")
    assert (actual - expected[CONTEXT + 4 :]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("model", "flags", "windows", "sinks"),
    [
        ({}, {}, {20}, 4),
        ({}, {"sink_tokens": 2}, {22}, 2),
        ({}, {"max_model_len": 3}, {1}, 2),
        ({}, {"max_model_len": None}, {252}, 4),
        ({}, {"sliding_window": 8}, {8}, 4),
        ({"sliding_window": 8, "sink_tokens": 3}, {}, {8}, 3),
        ({"sliding_window": 100}, {}, {24}, 0),
        ({"sliding_window": 8}, {"sliding_window": None}, {20}, 4),
        ({"sliding_window": 8}, {"max_model_len": 1000}, {8}, 0),
    ],
)
def test_windows_and_sinks_by_model_and_flags(model, flags, windows, sinks) -> None:
    config = served(make_config(**model), **flags)
    assert (set(config.windows), config.sink_tokens) == (windows, sinks)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ({}, {"max_model_len": 257}, "--max-model-len 257 exceeds the model's context of 256"),
        (MIXED, {"max_model_len": 257}, "--max-model-len 257 exceeds"),
        ({}, {"sink_tokens": CONTEXT}, "--sink-tokens 24 leaves no room in a context of 24"),
    ],
)
def test_what_cannot_be_served_is_refused(model, flags, message) -> None:
    with pytest.raises(StartupError, match=message):
        served(make_config(**model), **flags)


@pytest.mark.parametrize("num_steps_ahead", [0, 1])
@pytest.mark.parametrize("flags", [{}, {"sink_tokens": 0, "block_size": 5}, {"sliding_window": 8}], ids=str)
def test_too_little_memory_for_the_whole_context_is_enough_for_less(
    flags, num_steps_ahead, caplog: pytest.LogCaptureFixture
) -> None:
    """The longest whole number of blocks that fits, said in one line; a length that is given is not shortened."""

    def plan(budget: int, max_model_len: int | None = None) -> ServingPlan:
        asked = settings(**flags, max_model_len=max_model_len)
        config = make_config(max_position_embeddings=CONTEXT)
        return plan_serving(config, asked, torch.float32, 64, budget, num_steps_ahead=num_steps_ahead)

    with pytest.raises(StartupError, match="one sequence at full length needs") as caught:
        plan(100)
    (needed,) = map(int, re.findall(r"needs (\d+)", str(caught.value)))
    whole = plan(needed)
    assert whole.max_model_len == CONTEXT and caplog.messages == []

    budget = needed - whole.cache.bytes_per_block
    shorter = plan(budget)
    (line,) = caplog.messages
    assert f"serving --max-model-len {shorter.max_model_len};" in line and f"--kv-cache-memory {needed}" in line
    assert 0 < shorter.max_model_len < CONTEXT and shorter.cache.full_sequences == 1
    assert shorter.config.full_attention_window == shorter.max_model_len - shorter.config.sink_tokens
    assert plan(budget, max_model_len=shorter.max_model_len) == shorter
    with pytest.raises(StartupError, match=f"or --max-model-len {shorter.max_model_len}"):
        plan(budget, max_model_len=CONTEXT)


@pytest.mark.parametrize("flags", [{}, {"sink_tokens": 0, "block_size": 5}, {"sliding_window": 8}], ids=str)
def test_too_little_memory_is_refused_with_what_would_do(flags) -> None:
    """Both figures of the refusal are enough, and the cache they give runs a sequence of any length."""
    config = served(make_config(), **flags)
    with pytest.raises(StartupError) as caught:
        plan_cache(config, settings(**flags), torch.float32, 64, budget=9000)
    (needed,) = re.findall(r"--kv-cache-memory (\d+)", str(caught.value))
    plan = plan_cache(config, settings(**flags), torch.float32, 64, int(needed))
    assert plan.full_sequences == 1
    with pytest.raises(StartupError):
        plan_cache(config, settings(**flags), torch.float32, 64, int(needed) - 1)
    for context in re.findall(r"--max-model-len (\d+)", str(caught.value)):
        shorter = flags | {"max_model_len": int(context)}
        assert plan_cache(served(make_config(), **shorter), settings(**shorter), torch.float32, 64, 9000)

    engine = ModelEngine(make_model(), config, num_blocks=plan.num_blocks, block_size=plan.layout.block_size)
    tokens = random_tokens(2 * CONTEXT)
    engine.teacher_forced(tokens, 2 * CONTEXT - 3, context_overflow="slide")
    assert engine.scheduler.totals.num_preemptions == 0


def test_ample_memory_is_not_all_taken() -> None:
    config = served(make_config())
    plan = plan_cache(config, settings(max_num_seqs=3), torch.float32, 64, budget=2**40)
    assert 3 <= plan.full_sequences < 1000


def test_steps_are_shorter_on_a_cpu_unless_told_otherwise() -> None:
    assert tokens_a_step(settings(), "cpu") == (128, 32)
    assert tokens_a_step(settings(), "cuda") == (8192, None)
    assert tokens_a_step(settings(max_num_batched_tokens=7, max_prefill_tokens=3), "cpu") == (7, 3)
