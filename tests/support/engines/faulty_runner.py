"""A runner whose steps fail when the requests they hold are due to."""

from collections.abc import Iterable

from stellarbyte_server.engine.run.runner import Runner, RunningStep
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk, Sequence


class FaultyRunner:
    """Fails whenever it is given a request that is due to fail: `due` names requests, with the token of the answer."""

    def __init__(self, runner: Runner, due: dict[str, int], moment: str, error: type[Exception] = ValueError) -> None:
        self.num_steps_ahead = runner.num_steps_ahead
        self.num_runs = 0
        self._runner, self._due, self._moment, self._error = runner, due, moment, error

    def prepare(self) -> bool:
        return False

    def recover(self, sequences: Iterable[Sequence]) -> None:
        self._runner.recover(sequences)

    def start(self, chunks: list[Chunk]) -> RunningStep:
        self.num_runs += 1
        step = self._runner.start(chunks)
        fails = any(
            chunk.start + chunk.length >= chunk.sequence.num_prompt + due
            for chunk in chunks
            if (due := self._due.get(chunk.sequence.request.request_id, self._due.get("all"))) is not None
        )
        if fails and self._moment == "start":
            raise self._error("planted")
        return _Step(step, self._error if fails else None, self._moment)


class _Step:
    def __init__(self, step: RunningStep, error: type[Exception] | None, moment: str) -> None:
        self._step, self._error, self._moment = step, error, moment

    def finish(self) -> None:
        if self._error is not None and self._moment == "finish":
            raise self._error("planted")
        self._step.finish()

    def result(self) -> StepResult:
        if self._error is not None and self._moment == "result":
            raise self._error("planted")
        return self._step.result()
