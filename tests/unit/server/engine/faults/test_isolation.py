"""A step that fails ends the requests that make it fail, and nobody else notices; a broken engine ends."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stellarbyte_server.engine.faults.isolation import EngineBroken, isolate
from stellarbyte_server.engine.live_answers import NO_MEMORY
from stellarbyte_server.engine.run.device_errors import device_errors
from stellarbyte_server.engine.run.executor import DeviceLost, OutOfDeviceMemory
from stellarbyte_server.engine.run.runner import RunningStep
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import FAILED, Delta, merged
from tests.support.engines.checked_engine import CheckedEngine
from tests.support.engines.engine import make_request
from tests.support.engines.faulty_runner import FaultyRunner

MOMENTS = ("start", "finish", "result")


def faulty_engine(
    due: dict[str, int], moment: str, num_steps_ahead: int = 0, error: type[Exception] = ValueError, **options: Any
) -> CheckedEngine:
    engine = CheckedEngine(num_steps_ahead, num_blocks=120, **options)
    engine.core.runner = FaultyRunner(engine.core.runner, due, moment, error)
    return engine


def answer(engine: CheckedEngine, request_id: str) -> tuple[Any, ...]:
    delta = merged(engine.said[request_id])
    return delta.text, delta.token_ids, delta.finish_reason


@settings(max_examples=3 * settings().max_examples, deadline=None)
@given(data=st.data())
def test_only_the_requests_at_fault_end_whenever_their_steps_fail(data: st.DataObject) -> None:
    ahead = data.draw(st.sampled_from([0, 1]), "steps ahead")
    moment = data.draw(st.sampled_from(MOMENTS[: 3 - ahead]), "moment")
    prompts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=9))
    requests = [
        make_request(prompt, 12, str(i), seed=i, return_token_ids=True, context_overflow="slide")
        for i, prompt in enumerate(prompts)
    ]
    bad = data.draw(st.sets(st.sampled_from([request.request_id for request in requests]), max_size=3), "bad")
    due = {name: data.draw(st.integers(-20, 10), "token") for name in bad}
    options: dict[str, Any] = {"max_num_batched_tokens": 20, "max_num_seqs": data.draw(st.integers(1, 9))}
    if data.draw(st.booleans(), "window"):
        options |= {"window": 12, "sink_tokens": 3}

    sound = CheckedEngine(ahead, num_blocks=120, **options)
    sound.drain(*requests)
    engine = faulty_engine(due, moment, ahead, **options)
    engine.drain(*requests)
    for request in requests:
        name = request.request_id
        text, tokens, reason = answer(engine, name)
        if name in bad:
            last = engine.said[name][-1]
            assert (reason, last.error) == ("error", FAILED)
            assert len(tokens) == max(0, due[name]), "not one token before is lost, and none comes after"
            assert answer(sound, name)[1][: len(tokens)] == tokens
        else:
            assert (text, tokens, reason) == answer(sound, name)
    assert engine.core.stats().num_blocks_used == 0

    # What the cache keeps is true: the symbolic runner would see a wrong key.
    again = [make_request(prompt, 12, f"again {i}", seed=i, return_token_ids=True, context_overflow="slide")
             for i, prompt in enumerate(prompts)]  # fmt: skip
    engine.drain(*again)
    assert [answer(engine, f"again {i}") for i in range(len(prompts))] == [
        answer(sound, request.request_id) for request in requests
    ]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [1, 2, 7])
def test_an_engine_that_fails_at_everything_ends(moment: str, number: int) -> None:
    engine = faulty_engine({"all": -1000}, moment)
    with pytest.raises(EngineBroken):
        engine.drain(*[make_request([1, 2, 3], 5, str(i)) for i in range(number)])


def test_requests_at_fault_that_come_alone_one_after_the_other_do_not_end_the_engine() -> None:
    engine = faulty_engine({str(i): 0 for i in range(50)}, "start")
    for i in range(50):
        engine.drain(make_request([1, 2, 3], 5, str(i)))
    assert all(said[-1].finish_reason == "error" for said in engine.said.values())
    assert engine.core.stats().num_blocks_used == 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_lost_device_ends_the_engine_at_once(moment: str) -> None:
    engine = faulty_engine({"1": 3}, moment, error=DeviceLost)
    with pytest.raises(DeviceLost):
        engine.drain(*[make_request([1, 2, 3], 9, str(i)) for i in range(3)])


def test_a_device_that_turns_out_to_be_lost_when_the_step_is_computed_again_ends_the_engine() -> None:
    engine = faulty_engine({"1": 3}, "start")

    def recover(sequences: Iterable[Sequence]) -> None:
        raise DeviceLost(len(list(sequences)))

    engine.core.runner.recover = recover
    with pytest.raises(DeviceLost):
        engine.drain(*[make_request([1, 2, 3], 9, str(i)) for i in range(3)])


def test_an_error_of_the_accelerator_is_a_loss_and_one_of_memory_is_not() -> None:
    with pytest.raises(DeviceLost), device_errors():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(OutOfDeviceMemory), device_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(IndexError), device_errors():
        raise IndexError


def test_one_log_entry_with_the_traceback_of_each_fault(caplog: pytest.LogCaptureFixture) -> None:
    engine = faulty_engine({"3": 2, "5": 2}, "finish")
    engine.drain(*[make_request([1, 2, 3], 5, str(i)) for i in range(9)])
    assert sorted(record.args for record in caplog.records) == [("3",), ("5",)]
    assert all(record.exc_info is not None for record in caplog.records)


def test_a_fault_that_does_not_come_again_ends_nobody(caplog: pytest.LogCaptureFixture) -> None:
    engine = faulty_engine({"all": 2}, "start")
    faulty = engine.core.runner

    class Once(FaultyRunner):
        def start(self, chunks: list[Chunk]) -> RunningStep:
            try:
                return super().start(chunks)
            except ValueError:
                self._due = {}
                raise

    engine.core.runner = Once(faulty._runner, {"all": 2}, "start")
    engine.drain(*[make_request([1, 2, 3], 5, str(i)) for i in range(4)])
    assert {said[-1].finish_reason for said in engine.said.values()} == {"length"}
    assert len(caplog.records) == 1


def test_an_answer_that_cannot_be_made_into_text_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CheckedEngine(0, num_blocks=120)
    for i in range(3):
        engine.core.submit(make_request([1, 2, 3], 5, str(i)))

    def push(*_: object) -> Delta:
        raise UnicodeError

    monkeypatch.setattr(engine.core.answers._live["1"], "push", push)
    engine.drain()
    assert [engine.said[str(i)][-1].finish_reason for i in range(3)] == ["length", "error", "length"]
    assert engine.core.stats().num_blocks_used == 0


def test_a_request_without_memory_alone_is_told_so() -> None:
    engine = faulty_engine({"0": 1}, "start", error=OutOfDeviceMemory)
    engine.drain(make_request([1, 2, 3], 5, "0"))
    assert engine.said["0"][-1].error == NO_MEMORY


@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=4))
def test_faults_are_found_in_few_runs(number: int, bad: set[int]) -> None:
    """With one fault of 40 at most 12 parts are computed: the search is for one request, not through all."""
    chunks = [Chunk(None, i, 1, False) for i in range(number)]  # type: ignore[arg-type]
    runs = []

    def compute(part: list[Chunk]) -> StepResult:
        runs.append(part)
        if any(chunk.start in bad for chunk in part):
            raise ValueError
        return StepResult(tokens=[])

    findings = isolate(chunks, compute)
    assert {fault.chunk.start for fault in findings.faults} == {i for i in bad if i < number}
    computed = [chunk.start for part, _ in findings.computed for chunk in part]
    assert sorted(computed) == [i for i in range(number) if i not in bad]
    assert len(runs) <= 2 + 12 * max(1, len(bad))
