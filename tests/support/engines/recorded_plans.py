"""An executor whose messages all go through msgpack and are kept, and the replay of a file of them."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stellarbyte_server.engine.run.executor import Executor, ExecutorStep
from stellarbyte_server.engine.run.step_plan import Finish, StepPlan, StepResult


class Event(msgspec.Struct, frozen=True, array_like=True):
    """A call, in the order of all calls; `message` is what goes in, or for "result" what comes out."""

    call: str
    step: int
    message: bytes


class RecordingExecutor:
    """Executes only what is left of plans after msgpack and back."""

    def __init__(self, executor: Executor) -> None:
        self.num_steps_ahead = executor.num_steps_ahead
        self.takes_drafts = executor.takes_drafts
        self.events: list[Event] = []
        self._executor = executor
        self._num_steps = 0

    def start(self, plan: StepPlan) -> "_RecordedStep":
        number, self._num_steps = self._num_steps, self._num_steps + 1
        return _RecordedStep(self, number, self._executor.start(self.sent("start", number, plan)))

    def recover(self) -> None:
        self._executor.recover()

    def prepare(self) -> bool:
        return False

    def sent(self, call: str, number: int, message: Any) -> Any:
        """What arrives of a message."""
        data = msgspec.msgpack.encode(message)
        self.events.append(Event(call, number, data))
        return msgspec.msgpack.decode(data, type=type(message))

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.msgpack.encode(self.events))


class _RecordedStep:
    def __init__(self, recorder: RecordingExecutor, number: int, step: ExecutorStep) -> None:
        self._recorder, self._number, self._step = recorder, number, step

    def finish(self, finish: Finish) -> None:
        self._step.finish(self._recorder.sent("finish", self._number, finish))

    def result(self) -> StepResult:
        return self._recorder.sent("result", self._number, self._step.result())


def replay(path: Path, executor: Executor) -> int:
    """Execute the plans of a file and compare what comes of them; how many there are."""
    steps: dict[int, ExecutorStep] = {}
    num_steps = 0
    for event in msgspec.msgpack.decode(path.read_bytes(), type=list[Event]):
        if event.call == "start":
            steps[event.step] = executor.start(msgspec.msgpack.decode(event.message, type=StepPlan))
            num_steps += 1
        elif event.call == "finish":
            steps[event.step].finish(msgspec.msgpack.decode(event.message, type=Finish))
        else:
            assert_same(steps.pop(event.step).result(), msgspec.msgpack.decode(event.message, type=StepResult))
    return num_steps


def assert_same(found: StepResult, expected: StepResult) -> None:
    assert found.tokens == expected.tokens
    for ours, theirs in ((found.logprobs, expected.logprobs), (found.prompt_logprobs, expected.prompt_logprobs)):
        assert ours.keys() == theirs.keys()
        for row, entries in ours.items():
            assert [entry.token_id for entry in entries] == [entry.token_id for entry in theirs[row]]
            np.testing.assert_allclose([e.logprob for e in entries], [e.logprob for e in theirs[row]], atol=1e-5)
    assert found.pooled.keys() == expected.pooled.keys()
    for row, pooled in found.pooled.items():
        our_vector, their_vector = (np.frombuffer(vector, np.float32) for vector in (pooled, expected.pooled[row]))
        np.testing.assert_allclose(our_vector, their_vector, atol=1e-5)
