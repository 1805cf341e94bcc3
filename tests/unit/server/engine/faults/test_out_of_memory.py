"""A step for which the device has no memory is computed in parts; what is too large by itself ends, nothing else."""

from collections.abc import Iterable
from typing import Any

import pytest

from stellarbyte.backends.torch_model import TorchModel
from stellarbyte_server.engine.run.executor import OutOfDeviceMemory
from stellarbyte_server.engine.run.runner import Runner, RunningStep
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import Delta, merged
from tests.support.engines.engine import Ahead, make_request
from tests.support.engines.engine_core import VOCABULARY, drain, model_core
from tests.support.models.byte_transformer import make_model, random_tokens


class SmallDevice:
    """Has no memory for steps of more than `most` tokens; says so when they start or when they are finished."""

    def __init__(self, runner: Runner, most: int, late: bool) -> None:
        self.num_steps_ahead = runner.num_steps_ahead
        self.num_failures = 0
        self._runner, self._most, self._late = runner, most, late

    def recover(self, sequences: Iterable[Sequence]) -> None:
        self._runner.recover(sequences)

    def prepare(self) -> bool:
        return False

    def start(self, chunks: list[Chunk]) -> RunningStep:
        if sum(chunk.length for chunk in chunks) <= self._most:
            return self._runner.start(chunks)
        self.num_failures += 1
        if not self._late:
            raise OutOfDeviceMemory
        return _Failing()


class _Failing:
    def finish(self) -> None:
        raise OutOfDeviceMemory

    def result(self) -> Any:
        raise AssertionError("a step that failed has no result")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_request_too_large_for_any_step_ends_and_the_others_go_on(late: bool, is_ahead: bool) -> None:
    model = make_model(vocab_size=VOCABULARY)
    small = [
        make_request(random_tokens(5 + i, seed=i), 12, str(i), seed=i, temperature=0.7 * (i % 2), return_token_ids=True)
        for i in range(3)
    ]
    large = make_request(random_tokens(60, seed=9), 12, "large")

    def make(wraps: bool) -> Any:
        core = model_core(model, TorchModel, num_blocks=200, num_steps_ahead=int(is_ahead))
        runner: Any = Ahead(core.runner) if is_ahead else core.runner
        core.runner = SmallDevice(runner, 40, late) if wraps else runner
        return core

    expected = drain(make(False), *small)
    core = make(True)
    said = drain(core, *small, large)
    last = said.pop("large")[-1]
    assert isinstance(last, Delta) and last.finish_reason == "error"
    assert last.error == "The device has too little memory for this request."

    def answers(items: dict[str, list[Any]]) -> list[Any]:
        deltas = [merged([item for item in of if isinstance(item, Delta)]) for of in items.values()]
        return [(delta.text, delta.token_ids, delta.finish_reason) for delta in deltas]

    assert answers(said) == answers(expected)
    assert not core.has_work and core.stats().num_blocks_used == 0


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_step_too_large_for_the_memory_ends_nobody(is_ahead: bool) -> None:
    requests = [make_request(random_tokens(15, seed=i), 12, str(i), return_token_ids=True) for i in range(6)]
    said = []
    for most in (1000, 40):
        core = model_core(make_model(vocab_size=VOCABULARY), TorchModel, num_blocks=200, num_steps_ahead=int(is_ahead))
        core.runner = SmallDevice(Ahead(core.runner) if is_ahead else core.runner, most, late=False)
        items = drain(core, *requests)
        said.append(
            {name: merged([item for item in of if isinstance(item, Delta)]).token_ids for name, of in items.items()}
        )
    assert core.runner.num_failures > 0 and said[0] == said[1]


def test_a_device_that_never_has_memory_ends_every_request() -> None:
    core = model_core(make_model(vocab_size=VOCABULARY), TorchModel, num_blocks=200)
    core.runner = SmallDevice(core.runner, 0, late=False)
    said = drain(core, *[make_request(random_tokens(4), 5, str(i)) for i in range(4)])
    assert all(of[-1].finish_reason == "error" for of in said.values())
    assert core.stats().num_blocks_used == 0
