"""The search for the requests that make a step fail, by recomputing parts of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from stellarbyte_server.engine.run.executor import DeviceLost
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk


class EngineBroken(Exception):
    """Even an empty probe step fails, so no request is at fault."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A chunk that fails alone."""

    chunk: Chunk
    error: Exception


@dataclass(kw_only=True)
class Findings:
    computed: list[tuple[list[Chunk], StepResult]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def isolate(chunks: list[Chunk], compute: Callable[[list[Chunk]], StepResult]) -> Findings:
    """Recompute the chunks of a failed step by bisection, down to the single chunks that fail.

    `compute` raises the exceptions of the step. If the retry succeeds, no request fails.

    Raises:
        DeviceLost: from `compute`.
    """
    findings = Findings()
    parts = _halves(chunks)
    while parts:
        part = parts.pop()
        try:
            findings.computed.append((part, compute(part)))
        except DeviceLost:
            raise
        except Exception as error:
            if len(part) > 1:
                parts += _halves(part)
            else:
                findings.faults.append(Fault(chunk=part[0], error=error))
    return findings


def _halves(part: list[Chunk]) -> list[list[Chunk]]:
    """The first half last; neither is empty."""
    middle = len(part) // 2
    return [half for half in (part[middle:], part[:middle]) if half]
