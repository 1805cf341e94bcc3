"""A step is scheduled while the one before it runs: whoever asks must not be able to tell, and nothing may be left."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.adapters.absent import no_adapters
from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.adapters.slots import PATIENCE_S
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.block_pool import CacheLayout
from stellarbyte_server.engine.state.sequence import Chunk
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.checked_engine import GRAMMARS, TOKENIZER, CheckedEngine
from tests.support.engines.engine import BACKENDS, Ahead, Backend, ComputedStep, make_request, make_scheduler
from tests.support.engines.engine_core import VOCABULARY, drain, model_core
from tests.support.engines.symbolic_cache import continuation
from tests.support.models.adapters import FakeStore, listed, touch_adapter
from tests.support.models.byte_transformer import make_model, random_tokens
from tests.support.schemas import SCHEMAS

MAX_MODEL_LEN = 90


@st.composite
def traffic(draw):
    """Requests in order of arrival, as (step, request, step of its abort or None). Some are choices of one prompt."""
    requests = []
    for number in range(draw(st.integers(1, 10))):
        prompt = [draw(st.integers(0, 1))] * draw(st.integers(1, 60))
        prompt[-1] = draw(st.integers(0, 2))
        fields: dict[str, Any] = {
            "max_tokens": draw(st.integers(0, 30)),
            "priority": draw(st.integers(-2, 2)),
            "cache_salt": draw(st.sampled_from(["", "a"])),
            "stop_token_ids": draw(st.sampled_from([(), (), (1,), (2,)])),
            "stop": draw(st.sampled_from([(), (), ("\0\1",), ("\2\2", "\1\0\2")])),
        }
        step = draw(st.integers(0, 20))
        for choice in range(draw(st.sampled_from([1, 1, 1, 3]))):
            follows = {"choice": choice, "follows": f"{number}.0"} if choice else {}
            request = make_request(prompt, request_id=f"{number}.{choice}", return_token_ids=True, **fields, **follows)
            requests.append((step, request, draw(st.none() | st.none() | st.integers(step, 60))))
    return sorted(requests, key=lambda item: item[0])


def play(requests: list[tuple[int, GenerationRequest, int | None]], **options: Any) -> CheckedEngine:
    engine = CheckedEngine(max_model_len=MAX_MODEL_LEN, **options)
    arriving = list(requests)
    for step in range(5000):
        while arriving and arriving[0][0] == step:
            engine.core.submit(arriving.pop(0)[1])
        for _, request, abort_step in requests:
            if abort_step == step:
                engine.core.abort(request.request_id)
        if engine.core.has_work:
            engine.step()
        elif not arriving:
            break
    engine.check_nothing_is_left()
    return engine


@settings(max_examples=3 * settings().max_examples, deadline=None)
@given(
    requests=traffic(),
    window=st.none() | st.integers(1, 20),
    sink_tokens=st.integers(0, 6),
    block_size=st.integers(1, 9),
    budget=st.integers(1, 40),
    prefill_budget=st.none() | st.integers(1, 20),
    max_num_seqs=st.integers(1, 6),
    spare_blocks=st.integers(0, 10),
    prefix_caching=st.booleans(),
)
def test_random_traffic_gets_the_same_answers_a_step_ahead(
    requests, window, sink_tokens, block_size, budget, prefill_budget, max_num_seqs, spare_blocks, prefix_caching
) -> None:
    engines = []
    for num_steps_ahead in (0, 1):
        layout = CacheLayout(
            block_size=block_size,
            window=window,
            sink_tokens=sink_tokens if window else 0,
            num_steps_ahead=num_steps_ahead,
        )
        engine = play(
            requests,
            num_steps_ahead=num_steps_ahead,
            num_blocks=layout.peak_blocks(MAX_MODEL_LEN, 1) + spare_blocks,
            block_size=block_size,
            window=window,
            sink_tokens=layout.sink_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_prefill_tokens=prefill_budget,
            prefix_caching=prefix_caching,
        )
        engines.append(engine)
    for _, request, abort_step in requests:
        said = [
            [(d.text, d.token_ids, d.finish_reason, d.evicted_tokens) for d in engine.said.get(request.request_id, [])]
            for engine in engines
        ]
        if abort_step is None:
            assert said[0] == said[1] and said[0][-1][2] is not None
        for deltas in said:
            tokens = [token for _, token_ids, _, _ in deltas for token in token_ids]
            assert tokens == continuation(request)[: len(tokens)]


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_token_past_a_stop_is_computed_and_dropped(block_size: int) -> None:
    """The host learns of the stop when the next step runs already; nobody is told, and no block is kept of it."""
    request = make_request([0] * 6, 20, return_token_ids=True)
    expected = continuation(request)
    last = expected[7]
    number = expected.index(last) + 1
    engine = CheckedEngine(1, block_size=block_size)
    engine.drain(make_request([0] * 6, 20, return_token_ids=True, stop_token_ids=(last,)))
    assert engine.answer() == (expected[:number], "stop")
    assert engine.runner.num_sampled == number + 1
    engine.check_nothing_is_left()


def test_nothing_is_computed_past_max_tokens() -> None:
    engine = CheckedEngine(1)
    engine.drain(make_request([0] * 6, 5, "answer"), make_request([0] * 6, 0, "prompt"))
    assert engine.runner.num_sampled == 5
    assert [delta.finish_reason for delta in engine.said["prompt"]] == ["length"]
    engine.check_nothing_is_left()


def test_choices_wait_until_the_prompt_they_share_is_known_to_be_computed() -> None:
    engine = CheckedEngine(1, max_num_batched_tokens=1000)
    prompt = [0, 1] * 20
    engine.drain(*(make_request(prompt, 3, str(i), choice=i, follows="0" if i else None) for i in range(4)))
    assert [engine.said[str(i)][-1].cached_tokens for i in range(4)] == [0, 36, 36, 36]
    engine.check_nothing_is_left()


def test_a_sequence_preempted_while_a_step_runs_gets_that_steps_token_once() -> None:
    engine = CheckedEngine(1, num_blocks=6, block_size=4)
    old = make_request([0] * 8, 10, "old", cache_salt="a", return_token_ids=True)
    young = make_request([0] * 8, 10, "young", return_token_ids=True)
    for request in (old, young):
        engine.core.submit(request)
    while not engine.scheduler.totals.num_preemptions:
        told = len(engine.said.get("young", []))
        engine.step()
    assert len(engine.said["young"]) == told + 1
    (waiting,) = engine.scheduler.waiting
    assert (waiting.num_computed, waiting.num_launched, waiting.num_unread) == (0, 0, 0)
    engine.drain()
    for request in (old, young):
        assert engine.answer(request.request_id) == (continuation(request), "length")
    engine.check_nothing_is_left()


@pytest.mark.parametrize("budget", [1, 7, 64])
@pytest.mark.parametrize("sink_tokens", [0, 5])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_stream_holds_a_block_more_and_runs_in_the_smallest_pool(
    block_size: int, sink_tokens: int, budget: int
) -> None:
    """A long prompt took every block for the step in flight, found none for the next one, and preempted itself."""
    layout = CacheLayout(block_size=block_size, window=12, sink_tokens=sink_tokens, num_steps_ahead=1)
    request = make_request([0] * 60, 100, return_token_ids=True, context_overflow="slide")
    engine = CheckedEngine(
        1,
        num_blocks=layout.steady_blocks,
        block_size=block_size,
        window=12,
        sink_tokens=sink_tokens,
        max_num_batched_tokens=budget,
    )
    engine.drain(request)
    assert engine.answer() == (continuation(request), "length")
    assert engine.scheduler.totals.num_preemptions == 0
    today = CacheLayout(block_size=block_size, window=12, sink_tokens=sink_tokens)
    assert engine.runner.most_blocks == layout.steady_blocks == today.steady_blocks + 1
    engine.check_nothing_is_left()


def test_a_slot_moves_to_another_adapter_while_a_step_runs(tmp_path: Path) -> None:
    """Two requests share one slot in turns; each preemption falls into a step in flight."""
    for name in "ab":
        touch_adapter(tmp_path / name)
    now_s = [0.0]
    store = FakeStore()
    adapters = Adapters(AdapterFolder(str(tmp_path), {}), store, num_slots=1, max_in_memory=3, clock=lambda: now_s[0])
    engine = CheckedEngine(1, adapters, store, num_blocks=200, clock=lambda: now_s[0])
    requests = [make_request([0] * 5, 60, name, adapter=name, return_token_ids=True) for name in "ab"]
    for request in requests:
        engine.core.submit(request)
    while engine.core.has_work:
        now_s[0] += PATIENCE_S / 10
        engine.step()
    assert engine.scheduler.totals.num_preemptions > 1
    for request in requests:
        assert engine.answer(request.request_id) == (continuation(request), "length")
    assert all(card.num_running == card.num_waiting == 0 for card in listed(adapters))
    engine.check_nothing_is_left()


def test_one_step_is_in_flight_and_the_engine_does_not_rest_meanwhile() -> None:
    events: list[str] = []

    class Step(ComputedStep):
        def finish(self) -> None:
            events.append(f"finish {self.number}")

        def result(self) -> StepResult:
            events.append(f"read {self.number}")
            return self.computed

    class Runner:
        num_steps_ahead = 1
        num_started = 0

        def prepare(self) -> bool:
            return False

        def start(self, chunks: list[Chunk]) -> Step:
            step = Step(StepResult(tokens=[[97]] * len(chunks)))
            step.number, self.num_started = self.num_started, self.num_started + 1
            events.append(f"start {step.number}")
            return step

    scheduler = make_scheduler(num_steps_ahead=1)
    core = EngineCore(scheduler, Runner(), TOKENIZER, frozenset(), no_adapters(), GRAMMARS)
    core.submit(make_request([1], 2))
    while core.has_work:
        core.step()
        assert not core.is_blocked
        events.append("-")
    assert " ".join(events) == "start 0 finish 0 - start 1 read 0 finish 1 - read 1 -"
    core.submit(make_request([1], 9))
    core.step()
    core.abort("r")
    assert core.has_work and not scheduler.has_work
    assert core.step() == [] and not core.has_work and core.stats().generation_tokens_total == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_blocks", [400, 30])
def test_whatever_a_request_asks_of_a_model_it_gets_a_step_ahead(backend: Backend, num_blocks: int) -> None:
    """Grammars, penalties and bans need the tokens before; some requests end, or go away, while they are computed."""
    model = make_model(vocab_size=VOCABULARY)
    wishes: list[dict[str, Any]] = [
        {"grammar": json_grammar(SCHEMAS[0]), "temperature": 1.0},
        {"grammar": json_grammar(SCHEMAS[1])},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 2},
        {"presence_penalty": 1.0, "temperature": 0.8, "logit_bias": ((5, 2.0),)},
        {"stop_token_ids": tuple(range(100)), "min_tokens": 4, "temperature": 1.0},
        {"prompt_logprobs": 1, "logprobs": 0, "temperature": 1.0, "top_p": 0.9},
        {"pooling": "mean", "max_tokens": 0},
        {"pooling": "last", "max_tokens": 0},
        {},
    ]
    requests = [
        make_request(random_tokens(9 + 5 * i, seed=i), **{"max_tokens": 24, "request_id": str(i), "seed": i} | wish)
        for i, wish in enumerate(wishes)
    ]
    found: list[dict[str, Delta]] = []
    for num_steps_ahead in (0, 1):
        core = model_core(
            model, backend, num_blocks=num_blocks, max_num_batched_tokens=20, num_steps_ahead=num_steps_ahead
        )
        if num_steps_ahead:
            core.runner = Ahead(core.runner)
        core.submit(make_request(random_tokens(30), 9, "aborted", prompt_logprobs=0))
        core.step()
        core.abort("aborted")
        said = drain(core, *requests, limit_s=100)  # the first use of the kernels may compile them
        while core.has_work:
            core.step()
        assert core.scheduler.pool.num_used == 0
        assert (core.stats().num_preemptions_total > 0) == (num_blocks == 30)
        deltas = {name: [item for item in items if isinstance(item, Delta)] for name, items in said.items()}
        found.append({name: merged(parts) for name, parts in deltas.items()})
    for request in requests:
        now, ahead = (answers[request.request_id] for answers in found)
        assert (ahead.text, ahead.num_tokens, ahead.finish_reason) == (now.text, now.num_tokens, now.finish_reason)
        for field in ("logprobs", "prompt_logprobs"):
            expected, given = ([(e.token_id, e.logprob) for e in getattr(d, field)] for d in (now, ahead))
            assert [token_id for token_id, _ in given] == [token_id for token_id, _ in expected]
            np.testing.assert_allclose([p for _, p in given], [p for _, p in expected], atol=1e-4)
        vectors = [np.frombuffer(delta.embedding or b"", np.float32) for delta in (now, ahead)]
        np.testing.assert_allclose(*vectors, atol=1e-4)
