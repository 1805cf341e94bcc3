"""Plans are messages: a run is the same when all go through msgpack, and when a file of them is replayed."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from stellarbyte.backends.torch_model import TorchModel
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.run.step_plan import StepPlan
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.answers import assert_same
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.engines.engine_core import VOCABULARY, drain, model_core
from tests.support.engines.recorded_plans import RecordingExecutor, replay
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_model, random_tokens
from tests.support.schemas import SCHEMAS

WISHES: list[dict[str, Any]] = [
    {"grammar": json_grammar(SCHEMAS[0]), "temperature": 1.0},
    {"grammar": json_grammar(SCHEMAS[1]), "logprobs": 1},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 2},
    {"presence_penalty": 1.0, "temperature": 0.8, "logit_bias": ((5, 2.0),), "seed": 2**64 - 1},
    {"stop_token_ids": tuple(range(100)), "min_tokens": 4, "temperature": 1.0},
    {"prompt_logprobs": 1, "logprobs": 0, "temperature": 1.0, "top_p": 0.9},
    {"pooling": "mean", "max_tokens": 0},
    {"pooling": "last", "max_tokens": 0},
    {"temperature": 1.1, "top_k": 5, "min_p": 0.01},
    {},
]


def requests() -> list[GenerationRequest]:
    """What requests can ask for; the last one's prompt begins like the one before."""
    prompts = [random_tokens(9 + 5 * i, seed=i) for i in range(len(WISHES))]
    prompts[-1] = [*prompts[-2], *random_tokens(3)]
    return [
        make_request(
            prompts[i], request_id=str(i),
            **{"max_tokens": 20, "seed": i, "return_token_ids": True, "context_overflow": "slide"} | wish,
        )
        for i, wish in enumerate(WISHES)
    ]  # fmt: skip


def make_core(shape: dict[str, Any], num_blocks: int, num_steps_ahead: int) -> EngineCore:
    core = model_core(
        make_model(vocab_size=VOCABULARY, **shape), TorchModel, num_blocks=num_blocks, max_num_batched_tokens=20,
        num_steps_ahead=num_steps_ahead, **({"window": 24, "sink_tokens": 2} if shape else {}),
    )  # fmt: skip
    core.runner.executor.num_steps_ahead = num_steps_ahead
    core.runner = PlanRunner(core.runner.executor)
    return core


def answers(core: EngineCore) -> dict[str, Delta]:
    said = drain(core, *requests(), limit_s=100)
    while core.has_work:
        core.step()
    assert core.scheduler.pool.num_used == 0
    return {name: merged([item for item in items if isinstance(item, Delta)]) for name, items in said.items()}


@pytest.mark.parametrize(
    ("shape", "num_blocks", "num_steps_ahead"),
    [({}, 400, 0), ({}, 30, 1), ({"sliding_window": 24, "sink_tokens": 2}, 400, 1)],
    ids=["plain", "preempted, ahead", "window, ahead"],
)
def test_a_run_is_the_same_by_messages_and_from_a_file(
    shape: dict[str, Any], num_blocks: int, num_steps_ahead: int, tmp_path: Path
) -> None:
    expected = answers(make_core(shape, num_blocks, num_steps_ahead))
    core = make_core(shape, num_blocks, num_steps_ahead)
    recorder = RecordingExecutor(core.runner.executor)
    core.runner = PlanRunner(recorder)
    found = answers(core)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():  # when a grammar is compiled varies, and with it who is in which batch
        assert_same(found[name], delta)
    totals = core.scheduler.totals
    assert totals.prefix_hits > 0 and (totals.num_preemptions > 0) == (num_blocks == 30)
    recorder.save(tmp_path / "plans")
    fresh = make_core(shape, num_blocks, num_steps_ahead).runner.executor
    assert replay(tmp_path / "plans", fresh) == core.stats().num_steps_total


def test_adapters_and_their_scales_are_in_the_plans(tmp_path: Path) -> None:
    model = make_model()
    adapters = {name: random_adapter(model.config, seed=i, share=0.8) for i, name in enumerate("ab")}
    wanted = [
        make_request(random_tokens(5 + 3 * i, seed=i), 9, str(i), adapter=[None, "a", "b"][i % 3], adapter_scale=scale)
        for i, scale in enumerate((1.0, 0.5, 2.0, 1.0, 1.0, 0.7))
    ]
    expected = ModelEngine(model, adapters=adapters).generate(wanted)
    engine = ModelEngine(model, adapters=adapters, max_num_batched_tokens=13)
    recorder = RecordingExecutor(engine.executor)
    engine.runner = PlanRunner(recorder)
    assert engine.generate(wanted) == expected
    recorder.save(tmp_path / "plans")
    assert replay(tmp_path / "plans", ModelEngine(model, adapters=adapters).executor) > 9


def test_a_step_like_the_one_before_says_nothing() -> None:
    """What a plan costs, on its way and to make, must not grow with the number of sequences."""
    engine = ModelEngine(make_model(), block_size=8, max_num_seqs=4)
    recorder = RecordingExecutor(engine.executor)
    engine.runner = PlanRunner(recorder)
    engine.generate([make_request(random_tokens(5, seed=i), 9, str(i), temperature=0.5 * i) for i in range(4)])
    plans = [msgspec.msgpack.decode(e.message, type=StepPlan) for e in recorder.events if e.call == "start"]
    is_empty = [plan == StepPlan() for plan in plans]
    # The prompts; rows; positions 6 and 7; a block for position 8; the others.
    assert is_empty == [False, False, True, True, False, True, True, True, True]
    assert [len(plans[4].tables), plans[4].decode_slots] == [4, None]


def test_slots_are_used_again_and_their_number_stays_within_that_of_running_sequences() -> None:
    engine = ModelEngine(make_model(), max_num_seqs=2)
    recorder = RecordingExecutor(engine.executor)
    engine.runner = PlanRunner(recorder)
    engine.generate([make_request(random_tokens(3, seed=i), 1 + i % 3, str(i)) for i in range(9)])
    plans = [msgspec.msgpack.decode(e.message, type=StepPlan) for e in recorder.events if e.call == "start"]
    assert {begin.slot for plan in plans for begin in plan.begins} == {1, 2}
    assert sum(len(plan.begins) for plan in plans) == 9
